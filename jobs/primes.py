"""A CPU-bound job: it runs in a Python process of its own, so that it has a core for itself and can be killed."""

from __future__ import annotations

from pathlib import Path

from supervisor import ThreadContext


def count(ctx: ThreadContext, path: str, below: int = 200_000) -> None:
    """Count the primes below ever larger numbers, and write down how many there are."""
    while not ctx.stopping:
        sieve = bytearray([1]) * below
        sieve[:2] = b"\0\0"
        for number in range(2, int(below**0.5) + 1):
            if sieve[number]:
                sieve[number * number :: number] = bytes(len(range(number * number, below, number)))
        Path(path).write_text(f"{sum(sieve)} primes below {below}\n")
        if not ctx.sleep(2.0):
            return
        below += 100_000
