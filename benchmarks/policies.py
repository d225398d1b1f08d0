"""What a policy costs a call that succeeds: ours, what Trio has itself, and libraries that do the same.

    python -m benchmarks.policies                   microseconds a call over a bare await, and JSON in benchmarks/results/

The body is an empty async function, so that nothing but the layers is measured. Each measurement is a process of its own, on
the loop its library is written for, with the bare await measured beside it; the sweeps are interleaved. pybreaker is left out:
it does not see an async function fail.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import trio

from benchmarks import beside
from benchmarks.beside import Layout, Result
from benchmarks.report import shown
from supervisor.policies import bulkhead, pipeline, rate, retrying, timing
from supervisor.policies.breaker import CircuitBreaker
from supervisor.policies.fallback import fallback

OFTEN = 1e9
"""A rate that never makes anybody wait."""

Call = Callable[[], Awaitable[Any]]


async def body() -> None:
    """What is called."""


# -- the ways ---------------------------------------------------------------------------------------------------------------


def our_retry() -> Call:
    return pipeline.compose(body, retry=retrying.retry())


def our_breaker() -> Call:
    return pipeline.compose(body, breaker=CircuitBreaker())


def our_rate() -> Call:
    return pipeline.compose(body, rate=rate.RateLimiter(OFTEN, burst=10**6))


def our_bulkhead() -> Call:
    return pipeline.compose(body, bulkhead=bulkhead.Bulkhead(10))


def our_timeout() -> Call:
    return pipeline.compose(body, timeout=timing.timeout(60))


def our_fallback() -> Call:
    return pipeline.compose(body, fallback=fallback(None))


def our_pipeline() -> Call:
    return pipeline.compose(
        body,
        fallback=fallback(None),
        deadline=timing.deadline(600),
        retry=retrying.retry(),
        breaker=CircuitBreaker(),
        rate=rate.RateLimiter(OFTEN, burst=10**6),
        bulkhead=bulkhead.Bulkhead(10),
        timeout=timing.timeout(60),
    )


def tenacity_retry() -> Call:
    tenacity = import_module("tenacity")
    wrapped: Call = tenacity.retry(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random_exponential())(body)
    return wrapped


def stamina_retry() -> Call:
    wrapped: Call = import_module("stamina").retry(on=Exception, attempts=5)(body)
    return wrapped


def circuitbreaker_breaker() -> Call:
    wrapped: Call = import_module("circuitbreaker").circuit(body)
    return wrapped


def purgatory_breaker() -> Call:
    factory = import_module("purgatory").AsyncCircuitBreakerFactory()
    wrapped: Call = factory("service")(body)
    return wrapped


def aiolimiter_rate() -> Call:
    limiter = import_module("aiolimiter").AsyncLimiter(OFTEN, 1)

    async def limited() -> None:
        async with limiter:
            await body()

    return limited


def trio_bulkhead() -> Call:
    limiter = trio.CapacityLimiter(10)

    async def limited() -> None:
        async with limiter:
            await body()

    return limited


def asyncio_bulkhead() -> Call:
    semaphore = asyncio.Semaphore(10)

    async def limited() -> None:
        async with semaphore:
            await body()

    return limited


def trio_timeout() -> Call:
    async def limited() -> None:
        with trio.fail_after(60):
            await body()

    return limited


def asyncio_timeout() -> Call:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await body()

    return limited


@dataclass(frozen=True)
class Way:
    """One who does it: the function under its policy, made on the loop on which it is called then."""

    make: Callable[[], Call]
    asyncio: bool = False
    library: str = ""


POLICIES: dict[str, dict[str, Way]] = {
    "retry": {
        "ours": Way(our_retry),
        "tenacity": Way(tenacity_retry, library="tenacity"),
        "stamina": Way(stamina_retry, library="stamina"),
    },
    "breaker": {
        "ours": Way(our_breaker),
        "circuitbreaker": Way(circuitbreaker_breaker, library="circuitbreaker"),
        "purgatory": Way(purgatory_breaker, asyncio=True, library="purgatory"),
    },
    "rate": {"ours": Way(our_rate), "aiolimiter": Way(aiolimiter_rate, asyncio=True, library="aiolimiter")},
    "bulkhead": {
        "ours": Way(our_bulkhead),
        "trio.CapacityLimiter": Way(trio_bulkhead),
        "asyncio.Semaphore": Way(asyncio_bulkhead, asyncio=True),
    },
    "timeout": {
        "ours": Way(our_timeout),
        "trio.fail_after": Way(trio_timeout),
        "asyncio.timeout": Way(asyncio_timeout, asyncio=True),
    },
    "fallback": {"ours": Way(our_fallback)},
    "all seven": {"ours": Way(our_pipeline)},
}
"""By policy: who has it."""


# -- measuring --------------------------------------------------------------------------------------------------------------


def run_one(policy: str, name: str, calls: int) -> float:
    """Seconds a call over the bare await, in this process."""
    way = POLICIES[policy][name]

    async def main() -> float:
        layered = way.make()
        await layered()
        return (await _seconds(layered, calls) - await _seconds(body, calls)) / calls

    return asyncio.run(main()) if way.asyncio else trio.run(main)


async def _seconds(call: Call, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        await call()
    return time.perf_counter() - began


def cases(calls: int) -> list[Result]:
    """All that can be measured here."""
    return [
        Result(policy, name, calls)
        for policy, ways in POLICIES.items()
        for name, way in ways.items()
        if beside.is_there(name, way.library)
    ]


def report(results: list[Result], layout: Layout) -> str:
    """For people."""
    rows = []
    for each in (each for each in results if each.seconds):
        loop = "asyncio" if POLICIES[each.what][each.way].asyncio else "trio"
        ratio = None if each.way == "ours" else beside.ratio(each, "ours", results)
        rows.append([each.what, each.way, loop, shown(each.typical, 1e6), beside.figure(ratio)])
    return layout(["a call under", "by", "on", "us", "it / ours"], rows)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("-n", "--calls", type=click.IntRange(1), default=100_000, help="How many calls a measurement.")
@click.option("-r", "--runs", type=click.IntRange(1), default=5, help="How many interleaved sweeps.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the JSON.")
@click.option("--one", nargs=3, type=(str, str, int), metavar="POLICY WAY CALLS", hidden=True)
def main(calls: int, runs: int, markdown: bool, file: Path | None, one: tuple[str, str, int] | None) -> None:
    """Measure what a policy costs a call."""
    if one:
        click.echo(json.dumps(run_one(*one)))
        return
    results = beside.sweep("benchmarks.policies", cases(calls), runs)
    beside.tell("policies", results, report, markdown, file)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.policies")
