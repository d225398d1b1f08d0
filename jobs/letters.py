"""Two jobs that make sense only together: a task writes letters into a spool, a thread files them away, compressed."""

from __future__ import annotations

import gzip
import random
from pathlib import Path

from supervisor import Context, ThreadContext


async def write(ctx: Context, spool: str, every: float = 1.0) -> None:
    """Write one letter after another. A letter appears whole or not at all: it is renamed into place."""
    number = 0
    while await ctx.sleep(every):
        number += 1
        draft = Path(spool) / f".{number}.draft"
        draft.write_text(f"letter {number} of {ctx.run}\n" * 100)
        draft.rename(Path(spool) / f"{ctx.run.replace('#', '-')}-{number:04}.txt")


def file_away(ctx: ThreadContext, spool: str, archive: str, every: float = 2.0) -> None:
    """Compress what lies in the spool into the archive. Once in a while a letter cannot be read, and it gives up."""
    while ctx.sleep(every):
        for letter in sorted(Path(spool).glob("*.txt")):
            if random.random() < 0.02:
                raise ValueError(f"{letter.name} is illegible (this job fails on purpose)")
            (Path(archive) / f"{letter.stem}.gz").write_bytes(gzip.compress(letter.read_bytes()))
            letter.unlink()
