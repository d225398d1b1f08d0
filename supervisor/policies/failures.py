"""Which failures are meant: by exception type, by name as a file gives it, or by what a function says of them."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from supervisor import errors
from supervisor.errors import RunFailed

Failure = type[BaseException] | str | Callable[[BaseException], bool]
Failures = Failure | Sequence[Failure]


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions in a group, however deep; of one that is no group, itself."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error


def matcher(failures: Failures) -> Callable[[BaseException], bool]:
    """Whether an exception (no group) is one of those."""
    listed: Iterable[Any] = failures if isinstance(failures, (tuple, list)) else (failures,)
    kinds: list[type[BaseException]] = []
    tests: list[Callable[[BaseException], bool]] = []
    for each in listed:
        if isinstance(each, type):
            kinds.append(each)
        else:
            tests.append(partial(goes_by, each) if isinstance(each, str) else each)
    meant = tuple(kinds)
    return lambda error: isinstance(error, meant) or any(test(error) for test in tests)


def goes_by(name: str, error: BaseException) -> bool:
    """Whether a name in a file means this exception.

    `"module:Class"` is its class or one above it, by where that was defined or by any name it has in a module that is
    loaded: nothing is imported, since whoever raised it has loaded it. A bare name is built in, or one of
    `supervisor.errors`; an exit code or a signal is what a command ended with.
    """
    if name in names_of(error):
        return True
    kind = _loaded(name)
    return isinstance(kind, type) and isinstance(error, kind)


def names_of(error: BaseException) -> set[str]:
    """What an exception goes by: its classes, where they were defined, and what it says itself (`failure_names`)."""
    classes = {f"{kind.__module__}:{kind.__qualname__}" for kind in type(error).__mro__}
    return classes.union(getattr(error, "failure_names", ()))


def _loaded(name: str) -> Any:
    """What has this name now; None where nothing has."""
    module, colon, path = name.rpartition(":")
    if colon:
        found: Any = sys.modules.get(module)
    else:
        found = builtins if hasattr(builtins, name) else errors
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def in_one_line(error: BaseException) -> str:
    """An exception as a reason: what ours says, the class and the first line of others."""
    error = unwrapped(error)
    if isinstance(error, RunFailed):
        return str(error)
    first_line = _text(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def unwrapped(error: BaseException) -> BaseException:
    """An exception out of the groups of nurseries in which it is alone."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _text(error: BaseException) -> str:
    """What an exception says; the `__str__` of foreign code may fail, or give what is no UTF-8."""
    try:
        return str(error).encode("utf-8", "backslashreplace").decode()
    except Exception as worse:
        return f"its text cannot be had: {type(worse).__name__}"
