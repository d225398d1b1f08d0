"""Python functions as jobs: from `module:function` to something to call."""

from __future__ import annotations

import importlib
import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from supervisor.errors import RunFailed
from supervisor.kinds.context import Context


class CallableNotFound(RunFailed):
    """The module of a `call` does not import, or has no such function."""


def load(call: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function that `call` names. Raises CallableNotFound; an exception of the module's own code is its cause."""
    if not isinstance(call, str):
        return call
    module_name, _, path = call.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise CallableNotFound(f"cannot import {module_name}: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            raise CallableNotFound(f"module {module_name} has no {path!r}") from None
    if not callable(target):
        raise CallableNotFound(f"{call} is not callable")
    return typing.cast("Callable[..., Any]", target)


def kind_of(function: Callable[..., Any]) -> Literal["task", "thread"]:
    """How a function runs unless the file says so: `async def` as a task, `def` in a thread."""
    target = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    while hasattr(target, "func"):  # functools.partial
        target = target.func
    return "task" if inspect.iscoroutinefunction(target) else "thread"


def context_parameter(function: Callable[..., Any]) -> str | None:
    """The name of the parameter annotated `Context`, if there is one."""
    try:
        hints = typing.get_type_hints(function)
    except Exception:
        # An annotation that cannot be evaluated is none of our business; compare what is written.
        hints = dict(getattr(function, "__annotations__", {}))
    for name, hint in hints.items():
        if name != "return" and (hint is Context or (isinstance(hint, str) and hint.rpartition(".")[2] == "Context")):
            return name
    return None
