"""Words of the contract that are not built yet: refused as such, explained, and never suggested for a misspelt key.

Whoever builds one adds the field to its spec and takes it out here.
"""

from __future__ import annotations

TABLES = {
    "http": "an HTTP page: health, metrics, status, events",
    "access": "who may read, control and administer over the socket",
    "hooks": "what is called when something happens",
    "limits": "limits that jobs share by name: concurrency, rate, breaker",
    "queues": "where work waits for the workers of queue jobs",
}

KEYS = {
    "DaemonSpec": {
        "threads": "how many threads the daemon may use",
        "processes": "how many worker processes the daemon may use",
    },
    "LogSpec": {"rotate": "when the log file is put aside, and how many are kept"},
    "JobSpec": {
        "queue": "handles the items of this queue",
        "timeout": "how long one attempt may take",
        "deadline": "how long a whole run may take, retries included",
        "retry": "another attempt after a failed one, within the run",
        "breaker": "stops trying for a while after many failures",
        "rate": "how many runs a second or a minute",
        "bulkhead": "how many runs at the same time",
        "fallback": "a function whose value counts when the run failed",
        "into": "the queue that gets what the job returns",
        "batch": "hands several items to one run",
        "serialize_by": "a field of the item: one at a time for each value",
    },
    "Recycle": {"runs": "it has handled so many items"},
}
"""By the name of the spec that will hold them."""

WORDS = {("JobSpec", "kind"): ("process", "asyncio")}
"""Values that a key will know."""
