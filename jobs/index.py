"""A blocking job: a plain function, so it runs in a thread and may read files as slowly as it likes."""

from __future__ import annotations

import collections
import json
import re
from pathlib import Path

from supervisor import ThreadContext

WORD = re.compile(r"[A-Za-z_]{4,}")


def words(ctx: ThreadContext, source: str, path: str, every: float = 10.0) -> None:
    """Count the words of all Python files below `source` into `path`, again and again. In a thread, `sleep` blocks."""
    while True:
        files = sorted(Path(source).rglob("*.py"))
        counts: collections.Counter[str] = collections.Counter()
        for done, file in enumerate(files, 1):
            counts.update(WORD.findall(file.read_text(errors="replace")))
            if ctx.stopping:
                return
            if done == len(files):
                ctx.progress(done, len(files))
        Path(path).write_text(json.dumps({"files": len(files), "words": counts.most_common(20)}, indent=2))
        ctx.log.info("indexed", files=len(files), words=counts.total())
        if not ctx.sleep(every):
            return
