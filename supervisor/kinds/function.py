"""Python functions as jobs: from `module:function` to something to call."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

from supervisor.errors import RunFailed
from supervisor.kinds.inspection import context_parameter, item_parameter, kind_of, signature, taken, unfit

_loaded: dict[str, int] = {}
"""Module -> when its file was last changed (ns), as it was loaded."""


class CallableNotFound(RunFailed):
    """The module of a `call` does not import, or has no such function, or what it has is not fit to be a job."""


def load(call: str | Callable[..., Any], kind: str | None = None, *, into: bool = False) -> Callable[..., Any]:
    """The function that `call` names or is. Raises CallableNotFound if there is none, or none that fits `kind`.

    An exception of the module's own code is its cause. `into`: what it yields goes somewhere; else it may not.
    """
    function = _named(call) if isinstance(call, str) else call
    for _, fault in unfit(function, kind, into):
        raise CallableNotFound(f"{call if isinstance(call, str) else getattr(call, '__qualname__', call)}: {fault}")
    return function


def emptied(made: Any, put: Callable[[Any], object]) -> Any:
    """What a plain function returns. Of a generator, each item is put as it comes. It is closed at the end."""
    if not inspect.isgenerator(made):
        return made
    with contextlib.closing(made):
        while True:
            try:
                item = next(made)
            except StopIteration as end:
                return end.value
            put(item)


def _named(call: str) -> Callable[..., Any]:
    module_name, _, path = call.partition(":")
    if module_name not in sys.modules:
        importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        itself = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
        told = None if itself else error  # a traceback of what its code raised; of a module that is not there, none
        raise CallableNotFound(f"cannot import {module_name}: {type(error).__name__}: {error}") from told
    if module_name not in _loaded and (changed := _changed(target)) is not None:
        _loaded[module_name] = changed
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            raise CallableNotFound(f"module {module_name} has no {path!r}") from None
    if not callable(target):
        raise CallableNotFound(f"{call} is not callable")
    return typing.cast("Callable[..., Any]", target)


def outdated(call: str | Callable[..., Any]) -> str | None:
    """The file of the module of a `call`, where it has changed since it was loaded here; None where the code is what it was."""
    name = call.partition(":")[0] if isinstance(call, str) else call.__module__
    loaded, module = _loaded.get(name), sys.modules.get(name)
    return module.__file__ if module is not None and loaded not in (None, _changed(module)) else None


def _changed(module: Any) -> int | None:
    """When the file of a module was last changed; None where it has none any more."""
    try:
        return os.stat(module.__file__).st_mtime_ns  # noqa: PTH116 (a worker process would load pathlib for this)
    except (AttributeError, TypeError, OSError):
        return None


__all__ = [
    "CallableNotFound",
    "context_parameter",
    "emptied",
    "item_parameter",
    "kind_of",
    "load",
    "outdated",
    "signature",
    "taken",
]
