"""Work for a queue: pictures are ordered, and painted by whichever worker is free, each in a process of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TypedDict

from supervisor import Context


class Order(TypedDict):
    """A picture that somebody wants: a square of the Mandelbrot set."""

    name: str
    x: float
    y: float
    width: float


PLACES = {
    "whole": (-0.6, 0.0, 3.0),
    "seahorses": (-0.745, 0.113, 0.02),
    "elephants": (0.275, 0.007, 0.02),
    "spiral": (-0.0875, 0.6555, 0.02),
    "satellite": (-1.768, 0.0, 0.08),
}


async def order(ctx: Context, count: int = 2) -> None:
    """Order some pictures. One that is ordered and not painted yet is not ordered twice: the queue merges the two."""
    for name in random.sample(sorted(PLACES), count):
        x, y, width = PLACES[name]
        await ctx.put("pictures", Order(name=name, x=x, y=y, width=width))


def paint(picture: Order, directory: str, size: int = 96) -> str:
    """Paint it, pixel by pixel, into a file that appears whole. Now and then the brush breaks, and it is tried again."""
    if random.random() < 0.05:
        raise OSError("the brush is broken (this job fails on purpose)")
    step = picture["width"] / size
    left, top = picture["x"] - picture["width"] / 2, picture["y"] - picture["width"] / 2
    pixels = bytes(_shade(complex(left + column * step, top + row * step)) for row in range(size) for column in range(size))
    target = Path(directory) / f"{picture['name']}.pgm"
    target.parent.mkdir(exist_ok=True)
    draft = target.with_suffix(".draft")
    draft.write_bytes(b"P5 %d %d 255\n" % (size, size) + pixels)
    draft.rename(target)
    return str(target)


def _shade(point: complex, limit: int = 255) -> int:
    """How long a point takes to escape."""
    value = 0j
    for count in range(limit):
        value = value * value + point
        if abs(value) > 2:
            return count
    return limit
