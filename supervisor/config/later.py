"""Words of the contract that are not built yet: refused as such, explained, and never suggested for a misspelt key.

Whoever builds one adds the field to its spec and takes it out here.
"""

from __future__ import annotations

TABLES = {
    "http": "an HTTP page: health, metrics, status, events",
    "access": "who may read, control and administer over the socket",
    "hooks": "what is called when something happens",
}

KEYS = {
    "LogSpec": {"rotate": "when the log file is put aside, and how many are kept"},
}
"""By the name of the spec that will hold them."""
