"""What a job's function is: where it comes from, how it runs, and whether it takes these arguments.

Imports nothing but the standard library: `preflight` runs this file as a short-lived process, so that a module which hangs,
prints, exits or crashes on import harms nobody. The kinds ask it too how a function runs and who gets the Context, so that
`check` and the daemon agree. What is only needed to tell of a fault is imported then: each worker process loads this file.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Fault = tuple[tuple[str | int, ...], str]
"""The keys below the job that a fault belongs to, and what it is."""

_PLAIN = {"str": str, "int": int, "float": (int, float), "bool": bool}
_STREAM = re.compile(r"(\w+\.)*Stream(\[.*\])?", re.DOTALL)
_CONTEXT = re.compile(r"(Optional\[)?(\w+\.)*(?:Thread|Asyncio)?Context(\s*\|\s*None)?\]?")


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with annotations that are text evaluated where they can be."""
    try:
        return inspect.signature(function, eval_str=True)
    except Exception:  # an annotation that only a type checker can evaluate
        return inspect.signature(function)


def kind_of(function: Callable[..., Any]) -> Literal["task", "thread"]:
    """How a function runs unless the file says so: `async def` as a task, and what returns a `Stream`; `def` in a thread."""
    while isinstance(function, functools.partial):
        function = function.func
    asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return "task" if asynchronous or inspect.isasyncgenfunction(function) or returns_stream(function) else "thread"


def yields(function: Callable[..., Any]) -> bool:
    """Whether it gives its values one after another: a generator, or a function that is annotated to return a `Stream`."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function) or returns_stream(function)


def returns_stream(function: Callable[..., Any]) -> bool:
    """Whether it is annotated to return a `supervisor.streams.Stream`."""
    annotation = getattr(function, "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        return _STREAM.fullmatch(annotation.strip()) is not None
    kind = typing.get_origin(annotation) or annotation
    return getattr(kind, "__module__", "").startswith("supervisor.streams") and getattr(kind, "__name__", "") == "Stream"


def context_parameter(function: Callable[..., Any]) -> str | None:
    """The parameter annotated `Context`, or by the name of a kind's own, which the supervisor passes itself; None without."""
    try:
        parameters = signature(function).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return next((name for name, each in parameters.items() if _is_context(each.annotation)), None)


def item_parameter(of: inspect.Signature, context: str | None) -> inspect.Parameter | None:
    """The parameter that gets the item of a queue: the first that is given by position, the Context's apart."""
    given = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return next((each for name, each in of.parameters.items() if each.kind in given and name != context), None)


def _is_context(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return _CONTEXT.fullmatch(annotation.strip()) is not None
    if arguments := typing.get_args(annotation):
        return any(map(_is_context, arguments))
    ours = getattr(annotation, "__module__", "").split(".")[0] == "supervisor"
    return ours and getattr(annotation, "__name__", "") in ("Context", "ThreadContext", "AsyncioContext")


def taken(function: Callable[..., Any], offered: Mapping[str, T]) -> dict[str, T]:
    """What of `offered` the function has parameters for, by name."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return {}
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return dict(offered)
    named = {each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in named}


def inspect_call(
    call: str,
    args: Mapping[str, str],
    kind: str | None,
    offered: bool = False,
    gets: Literal["", "item", "batch"] = "",
    into: bool = False,
) -> dict[str, Any]:
    """Import a callable and compare it with a job. `args` are the names of its arguments with the types of their values.

    `offered`: it is called with those that it has parameters for, not with all. `gets`: what the job's queue gives it besides.
    `into`: what it yields goes somewhere.
    """
    found = _find(call)
    if isinstance(found, str):
        return {"faults": [(("call",), found)]}
    args = taken(found, args) if offered else args
    faults = [*unfit(found, kind, into)]
    parameter = context_parameter(found)
    with contextlib.suppress(TypeError, ValueError):  # a builtin without a signature
        faults += _misfits(signature(found), parameter, args, gets)
    return {"faults": faults, "kind": kind_of(found), "context": parameter}


def _find(call: str) -> Any:
    """The object that `call` names, or a sentence why not."""
    name, _, path = call.partition(":")
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return f'no module "{error.name}"{_hint(_nearest(error.name, _neighbours(error.name)))}'
        return _does_not_import(name, error)
    except BaseException as error:
        return _does_not_import(name, error)
    for part in path.split("."):
        if not hasattr(found, part):
            return f'"{name}" has no "{path}"{_hint(_nearest(part, dir(found)))}'
        found = getattr(found, part)
    return found if callable(found) else f'"{path}" of "{name}" is no function, but of type {type(found).__name__}'


def _neighbours(name: str) -> list[str]:
    """The modules beside one that is missing."""
    import pkgutil

    package = name.rpartition(".")[0]
    paths = getattr(sys.modules.get(package), "__path__", None) if package else sys.path[:1]
    return [module.name for module in pkgutil.iter_modules(paths, f"{package}." if package else "")]


def _does_not_import(name: str, error: BaseException) -> str:
    import traceback

    if isinstance(error, SystemExit):
        return f'"{name}" calls sys.exit({error.code if isinstance(error.code, int) else ""}) when it is imported'
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and "importlib" not in frames[-1].filename else ""
    lines = traceback.format_exception_only(error)
    if isinstance(error, SyntaxError):
        return f'"{name}" does not import: {error.msg} ({error.filename}:{error.lineno})'
    return f'"{name}" does not import: {lines[-1].strip()}{place}'


def unfit(function: Any, kind: str | None, into: bool = False) -> Iterable[Fault]:
    """Why a callable cannot be a job of this kind (None: of any). `into`: what it yields goes somewhere."""
    if yields(function) and not into:
        yield ("call",), "what it yields would go nowhere: name the queue that gets it in `into`"
    elif inspect.isclass(function):
        yield ("call",), "a class: expected a function"
    elif kind not in (None, "task") and returns_stream(function):
        yield ("kind",), f'kind "{kind}" cannot open a Stream, which needs Trio: leave `kind` out'
    elif kind in ("thread", "process") and kind_of(function) == "task":
        yield ("kind",), f'kind "{kind}" runs a plain function, this one is `async def`'
    elif kind in ("task", "asyncio") and kind_of(function) == "thread":
        yield ("kind",), f'kind "{kind}" runs an `async def`, this is a plain function: use kind = "thread"'


def _misfits(of: inspect.Signature, context: str | None, args: Mapping[str, str], gets: str) -> Iterable[Fault]:
    parameters = dict(of.parameters)
    if gets:
        item = item_parameter(of, context)
        yield from _no_item(item, args, gets)
        if item is not None:
            del parameters[item.name]
            args = {name: given for name, given in args.items() if name != item.name}
    yield from _bad_arguments(parameters, context, args)


def _no_item(item: inspect.Parameter | None, args: Mapping[str, str], gets: str) -> Iterable[Fault]:
    """Why the parameter for the item cannot get it."""
    if item is None:
        yield ("call",), "it takes no item: the function of a job with `queue` gets that as its first parameter"
        return
    if item.name in args and item.kind is not item.VAR_POSITIONAL:
        yield ("args", item.name), "the item of the queue, which is the function's first parameter: leave it out"
    if gets == "batch" and (wanted := _plain(item.annotation)):
        yield ("batch",), f'a list of items, and the function\'s "{item.name}" expects {wanted}'


def _bad_arguments(
    parameters: Mapping[str, inspect.Parameter], context: str | None, args: Mapping[str, str]
) -> Iterable[Fault]:
    named = {name for name, each in parameters.items() if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)}
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    missing = {name for name in named if parameters[name].default is inspect.Parameter.empty} - {context, *args}
    for name, given in args.items():
        if name == context:
            yield ("args", name), "the Context, which the supervisor passes itself: leave it out"
        elif name not in named and not anything:
            near = _nearest(name, named - {context})
            missing.discard(near)
            yield ("args", name), f"the function has no parameter of that name{_hint(near)}"
        elif name in named and (wanted := _wrong_type(parameters[name].annotation, given)):
            yield ("args", name), f"the function expects {wanted}, got {given}"
    for name in sorted(missing):
        yield ("args",), f'"{name}" is missing: the function has no default for it'
    for name, each in parameters.items():
        if each.kind is each.POSITIONAL_ONLY and each.default is each.empty:
            yield ("call",), f'its parameter "{name}" is positional only: arguments are passed by name'


def _wrong_type(annotation: Any, given: str) -> str:
    """The plain type that a value does not have; what is not plain, Python will see."""
    wanted = _plain(annotation)
    return "" if given not in _PLAIN or given == wanted or (wanted, given) == ("float", "int") else wanted


def _plain(annotation: Any) -> str:
    """The name of a plain type; empty for all others."""
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    return str(name) if name in _PLAIN else ""


def _nearest(word: str, known: Iterable[str | None]) -> str:
    """The known word that is most like `word`, or nothing."""
    import difflib

    near = difflib.get_close_matches(word, [name for name in known if name and not name.startswith("__")], n=1)
    return near[0] if near else ""


def _hint(near: str) -> str:
    return f'; did you mean "{near}"?' if near else ""


def main() -> None:
    """Inspect the jobs that standard input lists; two JSON lines for each go to the descriptor given as the argument."""
    import json

    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as results:
        request = json.load(sys.stdin)
        sys.path[:] = request["path"]
        for job in request["jobs"]:
            print(json.dumps({"begin": job["name"]}), file=results, flush=True)
            offered, gets, into = job["offered"], job["gets"], job["into"]
            found = inspect_call(job["call"], job["args"], job["kind"], offered, gets, into)
            print(json.dumps({"end": job["name"], **found}), file=results, flush=True)
        os._exit(0)  # not waiting for threads that a module may have started


if __name__ == "__main__":
    main()
