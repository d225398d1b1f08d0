"""Words of the contract that are not built yet: refused as such, explained, and never suggested for a misspelt key.

Whoever builds one adds the field to its spec and takes it out here.
"""

from __future__ import annotations

TABLES = {
    "http": "an HTTP page: health, metrics, status, events",
    "access": "who may read, control and administer over the socket",
    "hooks": "what is called when something happens",
    "queues": "where work waits for the workers of queue jobs",
}

KEYS = {
    "LogSpec": {"rotate": "when the log file is put aside, and how many are kept"},
    "JobSpec": {
        "queue": "handles the items of this queue",
        "into": "the queue that gets what the job returns",
        "batch": "hands several items to one run",
        "serialize_by": "a field of the item: one at a time for each value",
    },
    "Recycle": {"runs": "it has handled so many items"},
}
"""By the name of the spec that will hold them."""
