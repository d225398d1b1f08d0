"""Python functions as jobs: from `module:function` to something to call."""

from __future__ import annotations

import importlib
import typing
from collections.abc import Callable
from typing import Any

from supervisor.errors import RunFailed
from supervisor.inspection import context_parameter, kind_of


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


__all__ = ["CallableNotFound", "context_parameter", "kind_of", "load"]
