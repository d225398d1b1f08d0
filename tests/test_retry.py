"""Another attempt after a failed one: when, after which failures, and what comes out at last. In virtual time, exactly."""

from __future__ import annotations

import gc
import http.client
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from supervisor import BreakerOpen, CircuitBreaker, Rejected, Retry, TimedOut, retry, timeout
from supervisor.policies.pipeline import compose
from supervisor.policies.spec import RetrySpec
from supervisor.spec import Seconds


class Body:
    """A function that fails as it is told, then gives "done"; and when it was called, on Trio's clock."""

    def __init__(self, *failures: BaseException) -> None:
        self.failures = list(failures)
        self.calls: list[float] = []

    async def __call__(self) -> str:
        self.calls.append(trio.current_time())
        if self.failures:
            raise self.failures.pop(0)
        return "done"


def least(low: float, high: float) -> float:
    return low


def most(low: float, high: float) -> float:
    return high


# When


async def test_each_wait_is_longer_by_the_factor_up_to_the_longest(autojump_clock):
    body = Body(*(OSError(str(at)) for at in range(6)))
    assert await retry(attempts=7, initial=0.5, factor=2, max=3, jitter=0).call(body) == "done"
    assert body.calls == [0, 0.5, 1.5, 3.5, 6.5, 9.5, 12.5]


@pytest.mark.parametrize(
    ("jitter", "spread", "expected"),
    [(1, least, [0, 0, 0]), (1, most, [0, 1, 3]), (0.5, least, [0, 0.5, 1.5]), (0.5, most, [0, 1, 3]), (0, least, [0, 1, 3])],
    ids=["full, least", "full, most", "equal, least", "equal, most", "none"],
)
async def test_jitter_is_the_part_that_chance_may_take_away(autojump_clock, jitter, spread, expected):
    body = Body(OSError(), OSError())
    await retry(initial=1, jitter=jitter, spread=spread).call(body)
    assert body.calls == expected


@given(
    attempts=st.integers(1, 12), initial=st.floats(0, 100), factor=st.floats(1, 1e6), longest=st.floats(0, 1000),
    jitter=st.floats(0, 1), chance=st.floats(0, 1),
)  # fmt: skip
def test_every_wait_is_within_its_bounds(attempts, initial, factor, longest, jitter, chance):
    waits: list[float] = []

    async def slept(seconds: float) -> None:
        waits.append(seconds)

    layer = retry(
        attempts=attempts, initial=initial, factor=factor, max=longest, jitter=jitter, sleep=slept,
        spread=lambda low, high: low + chance * (high - low),
    )  # fmt: skip

    async def main() -> None:
        with pytest.raises(OSError):
            await layer.call(Body(*(OSError() for _ in range(attempts))))

    trio.run(main)
    assert len(waits) == attempts - 1
    for at, wait in enumerate(waits):
        whole = min(initial * factor**at, longest)
        assert whole * (1 - jitter) * (1 - 1e-9) <= wait <= whole


async def test_a_thousand_doublings_are_no_overflow():
    waits: list[float] = []

    async def slept(seconds: float) -> None:
        waits.append(seconds)

    with pytest.raises(OSError):
        await retry(attempts=2000, initial=1, factor=2.0, max=60, jitter=0, sleep=slept).call(
            Body(*(OSError() for _ in range(2000)))
        )
    assert waits[:7] == [1, 2, 4, 8, 16, 32, 60] and set(waits[7:]) == {60} and len(waits) == 1999


async def test_the_calls_of_one_layer_do_not_count_for_each_other(autojump_clock):
    bodies = [Body(OSError(), OSError()) for _ in range(3)]
    layer = retry(attempts=3, initial=1, jitter=0)
    async with trio.open_nursery() as nursery:
        for body in bodies:
            nursery.start_soon(layer.call, body)
    assert [body.calls for body in bodies] == [[0, 1, 3]] * 3


# What comes out


async def test_the_last_failure_comes_out_as_it_is_with_a_note_of_the_others(autojump_clock):
    last = ValueError("the third")
    body = Body(
        ConnectionError("the first"), ConnectionError("the first"), ConnectionError("lines\nand more"), last, OSError("never")
    )
    with pytest.raises(ValueError) as caught:
        await retry(attempts=4, jitter=0).call(body)
    assert caught.value is last and last.__cause__ is None and last.__context__ is None
    assert last.__notes__ == ["attempt 4; before it: ConnectionError: the first (2 times); ConnectionError: lines"]
    assert len(body.calls) == 4


async def test_one_attempt_is_none_more_and_has_nothing_to_note(autojump_clock):
    with pytest.raises(OSError) as caught:
        await retry(attempts=1).call(Body(OSError()))
    assert not hasattr(caught.value, "__notes__")


async def test_an_exception_whose_text_fails_is_retried_like_any_other(autojump_clock):
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with pytest.raises(OSError) as caught:
        await retry(attempts=2).call(Body(Mute(), OSError()))
    assert caught.value.__notes__ == ["attempt 2; before it: Mute: its text cannot be had: RuntimeError"]


async def test_arguments_and_results_pass_and_the_decorated_function_is_still_itself(autojump_clock):
    failures = [OSError()]

    @retry(initial=0)
    async def divide(one: int, *, by: int) -> float:
        """Divide."""
        if failures:
            raise failures.pop()
        return one / by

    assert await divide(3, by=2) == 1.5
    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")


# Which failures


@pytest.mark.parametrize(
    ("options", "failure", "again"),
    [
        ({}, OSError(), True),
        ({"on": OSError}, ConnectionResetError(), True),
        ({"on": OSError}, ValueError(), False),
        ({"on": (ValueError, OSError)}, OSError(), True),
        ({"on": lambda error: "busy" in str(error)}, ValueError("busy"), True),
        ({"on": lambda error: "busy" in str(error)}, ValueError("lazy"), False),
        ({"on": [lambda error: False, "ConnectionError"]}, ConnectionResetError(), True),
        ({"on": "ConnectionError"}, OSError(), False),
        ({"give_up_on": ValueError}, ValueError(), False),
        ({"give_up_on": ValueError}, OSError(), True),
        ({"on": OSError, "give_up_on": ConnectionError}, ConnectionError(), False),
        ({"on": OSError}, Retry(), True),
        ({"on": OSError}, Rejected("full"), True),
        ({"on": OSError, "give_up_on": Rejected}, BreakerOpen("open"), False),
        ({"on": OSError}, TimedOut(1), False),
        ({"on": OSError}, ExceptionGroup("", [OSError(), ExceptionGroup("", [OSError()])]), True),
        ({"on": OSError}, ExceptionGroup("", [OSError(), ExceptionGroup("", [ValueError()])]), False),
        ({"give_up_on": ValueError}, ExceptionGroup("", [OSError(), ValueError()]), False),
        ({}, KeyboardInterrupt(), False),
        ({}, SystemExit(), False),
        ({}, BaseExceptionGroup("", [OSError(), KeyboardInterrupt()]), False),
    ],
)
async def test_which_failures_are_worth_another_attempt(autojump_clock, options, failure, again):
    body = Body(failure)
    if again:
        assert await retry(**options).call(body) == "done"
    else:
        try:
            await retry(**options).call(body)
        except BaseException as error:
            assert error is failure
        assert len(body.calls) == 1


async def test_cancellation_is_never_retried(autojump_clock):
    body = Body()

    async def long() -> None:
        await body()
        await trio.sleep_forever()

    with trio.move_on_after(3) as scope:
        await retry().call(long)
    assert scope.cancelled_caught and len(body.calls) == 1


async def test_a_wait_is_left_at_once_when_it_is_cancelled(autojump_clock):
    body = Body(OSError(), OSError())
    with trio.move_on_after(3) as scope:
        await retry(initial=100, jitter=0).call(body)
    assert scope.cancelled_caught and trio.current_time() == 3 and body.calls == [0]


# Hints


class Busy(Exception):
    def __init__(self, header: str | None) -> None:
        self.header = header


@pytest.mark.parametrize(
    ("failure", "wait"),
    [
        (Retry(after=7), 7),
        (Retry(), 1),
        (Retry(after=0), 0),
        (Retry(after=100), 100),
        (Rejected("", retry_after=2.5), 2.5),
        (Rejected(""), 1),
        (Retry(after=-1), 1),
        (Retry(after=float("nan")), 1),
        (Retry(after=float("inf")), 1),
        (ExceptionGroup("", [Retry(after=2), Retry(after=5), OSError()]), 5),
    ],
)
async def test_a_failure_that_says_when_to_come_back_is_answered_then(autojump_clock, failure, wait):
    body = Body(failure)
    await retry(initial=1, max=60, jitter=0).call(body)
    assert body.calls == [0, wait]


async def test_a_hint_is_read_from_any_clients_exception(autojump_clock):
    body = Body(Busy("4"), Busy(None), OSError())

    def header(error: BaseException) -> float | None:
        return float(error.header) if isinstance(error, Busy) and error.header else None

    await retry(initial=1, jitter=0, hint=header).call(body)
    assert body.calls == [0, 4, 6, 10]


async def test_retry_comes_back_when_the_breaker_lets_a_trial_through(autojump_clock):
    breaker = CircuitBreaker(failures=1, open_for=30, successes=1)
    body = Body(OSError())
    assert await compose(body, retry=retry(attempts=3, initial=0.1, jitter=0), breaker=breaker)() == "done"
    assert body.calls == [0, 30.1 - 0.1], "tried at 0; rejected at 0.1; let through when it had been open for 30 s"


# Hooks


async def test_it_tells_of_each_attempt_before_it_waits_for_it(autojump_clock):
    told = []
    first, second = OSError(), ValueError()
    layer = retry(
        attempts=3, initial=2, jitter=0, on_retry=lambda *facts: told.append((trio.current_time(), *facts)),
    )  # fmt: skip
    await layer.call(Body(first, second))
    assert told == [(0, 2, 3, 2, first), (2, 3, 3, 4, second)]


async def test_a_sleep_that_was_ended_early_ends_it_with_the_last_failure(autojump_clock):
    async def stopped(seconds: float) -> bool:
        await trio.sleep(seconds / 2)
        return False

    body = Body(OSError("first"), OSError("second"))
    with pytest.raises(OSError, match="first"):
        await retry(initial=4, jitter=0, sleep=stopped).call(body)
    assert body.calls == [0] and trio.current_time() == 2


async def test_a_spec_says_the_same(autojump_clock):
    spec = RetrySpec(
        attempts=3, initial=Seconds(2), factor=3, max=Seconds(5), jitter=0.5, on=("OSError",), give_up_on=("ConnectionError",)
    )
    body = Body(OSError(), OSError(), OSError())
    with pytest.raises(OSError):
        await retry.from_spec(spec, spread=most).call(body)
    assert body.calls == [0, 2, 7]
    body = Body(ConnectionError())
    with pytest.raises(ConnectionError):
        await retry.from_spec(spec).call(body)
    assert len(body.calls) == 1


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"factor": 0.5}, {"jitter": 1.1}, {"initial": -1}, {"max": float("nan")}])
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="retry: "):
        retry(**wrong)


# With a timeout, and for real


async def test_each_attempt_has_its_own_timeout(autojump_clock):
    calls = []

    async def slow_at_first() -> str:
        calls.append(trio.current_time())
        await trio.sleep(100 if len(calls) < 3 else 3)
        return "done"

    attempt = compose(slow_at_first, timeout=timeout(5), retry=retry(attempts=3, initial=1, jitter=0, on=TimedOut))
    assert await attempt() == "done"
    assert calls == [0, 6, 13] and trio.current_time() == 16


@contextmanager
def server_that_is_busy(times: int):
    """A real HTTP server that answers 503 so many times, then 200; gives its port and the times at which it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            busy = len(asked) <= times
            self.send_response(503 if busy else 200)
            if busy:
                self.send_header("Retry-After", "0.25")
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"busy" if busy else b"done")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


class Answered(Exception):
    def __init__(self, status: int, retry_after: str | None) -> None:
        self.status = status
        self.header = retry_after


def get(port: int) -> bytes:
    """A blocking client that knows nothing of retries."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise Answered(response.status, response.getheader("Retry-After"))
        return text
    finally:
        connection.close()


def told_by_the_server(error: BaseException) -> float | None:
    return float(error.header) if isinstance(error, Answered) and error.header else None


async def test_an_http_call_is_retried_when_the_server_says():
    waits = []
    layer = retry(
        attempts=4, initial=50, on=(Answered, ConnectionError), hint=told_by_the_server,
        on_retry=lambda attempt, attempts, wait, error: waits.append((attempt, wait, error.status)),
    )  # fmt: skip
    with server_that_is_busy(times=3) as (port, asked):
        assert await layer.call(trio.to_thread.run_sync, get, port) == b"done"
    assert waits == [(2, 0.25, 503), (3, 0.25, 503), (4, 0.25, 503)] and len(asked) == 4


async def test_an_http_call_that_stays_busy_fails_with_what_the_server_said():
    with server_that_is_busy(times=9) as (port, asked):
        with pytest.raises(Answered) as caught:
            await retry(attempts=2, hint=told_by_the_server).call(trio.to_thread.run_sync, get, port)
    assert caught.value.status == 503 and len(asked) == 2


async def test_failures_that_are_over_leave_nothing_for_the_garbage_collector():
    class Failure(Exception):
        pass

    gc.collect()
    gc.disable()
    try:
        await retry(initial=0).call(Body(Failure(), Failure()))
        with pytest.raises(ValueError):
            await retry(initial=0).call(Body(Failure(), ValueError(), ValueError(), ValueError(), ValueError()))
        assert not [each for each in gc.get_objects() if isinstance(each, Failure)]
    finally:
        gc.enable()
