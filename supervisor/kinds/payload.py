"""Items of a queue as a function takes them: JSON in, converted to what its first parameter is annotated as, and JSON out.

A worker process loads this file too: it imports nothing of the tree.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

import msgspec

from supervisor.errors import UnfitItem
from supervisor.kinds.function import CallableNotFound, context_parameter, item_parameter, load, signature

RAW: Any = list[msgspec.Raw]
"""A batch, each item by itself."""


class ItemFunction:
    """The function of a queue job, looked at once: what it takes, and how it is called.

    Raises CallableNotFound for one that cannot take an item.
    """

    def __init__(self, function: Callable[..., Any], args: Mapping[str, Any] | None = None, batch: bool = False) -> None:
        """`args` are its other arguments, by name. `batch`: it takes a list of items at once."""
        self._function = function
        self._args = dict(args or {})
        self._batch = batch
        self._name = getattr(function, "__qualname__", repr(function))
        self._parameter, self._type, self._context, self._context_first = _parameters(function)
        try:
            self._decode = msgspec.json.Decoder(self._type).decode
        except TypeError as error:
            shown = inspect.formatannotation(self._type)
            raise CallableNotFound(
                f"{self._name}: no JSON can be converted to its parameter `{self._parameter}: {shown}`: {error}"
            ) from None

    @property
    def typed(self) -> bool:
        """Whether there is JSON that it does not take."""
        return self._type not in (Any, object) and not (self._batch and self._type in (list, list[Any], list[object]))

    @property
    def hears(self) -> bool:
        """Whether it takes a Context."""
        return self._context is not None

    def read(self, payload: bytes) -> Any:
        """What is in a payload, as the function takes it. Raises UnfitItem where it does not fit, which nothing mends.

        Nothing is converted that JSON could have said otherwise: "1" is no int. What JSON has no word for may be a string (a
        datetime, a Decimal, bytes in base64), and a float may be written as an integer.
        """
        try:
            return self._decode(payload)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise self._unfit(payload, error) from None

    def _unfit(self, payload: bytes, error: Exception) -> UnfitItem:
        if not isinstance(error, msgspec.ValidationError):
            return UnfitItem(f"the item is no JSON: {_lower(error)}")
        bad = self._unfit_of_batch(payload) if self._batch else {}
        cause, positions = (next(iter(bad.values())), tuple(bad)) if bad else (error, ())
        return UnfitItem(f"the item is not what `{self._parameter}` of {self._name} takes: {_lower(cause)}", positions)

    def _unfit_of_batch(self, payload: bytes) -> dict[int, Exception]:
        """Which items of a batch do not fit, and why; none where it cannot be said."""
        each = next(iter(get_args(self._type)), Any)
        bad: dict[int, Exception] = {}
        for position, item in enumerate(msgspec.json.decode(payload, type=RAW)):
            try:
                msgspec.json.decode(item, type=each)
            except msgspec.MsgspecError as error:
                bad[position] = error
        return bad

    def __call__(self, value: Any, context: Any = None) -> Any:
        """Call it with what was read, and with a Context where it takes one."""
        if self._context is None:
            return self._function(value, **self._args)
        if self._context_first:
            return self._function(context, value, **self._args)
        return self._function(value, **self._args, **{self._context: context})


def _parameters(function: Callable[..., Any]) -> tuple[str, Any, str | None, bool]:
    """The parameter that gets the item, and its type; the one for the Context, and whether that comes before."""
    try:
        of = signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return "its first parameter", Any, None, False
    context = context_parameter(function)
    if (item := item_parameter(of, context)) is None:
        name = getattr(function, "__qualname__", repr(function))
        raise CallableNotFound(f"{name} takes no item: the function of a queue job gets it as its first parameter")
    unknown = item.annotation is item.empty or isinstance(item.annotation, str)  # or text that only a type checker evaluates
    first = context is not None and [*of.parameters].index(context) < [*of.parameters].index(item.name)
    return item.name, Any if unknown else item.annotation, context, first


def _lower(error: Exception) -> str:
    """What an exception says, as the middle of a sentence."""
    text = str(error)
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def result(value: Any) -> bytes | None:
    """What a function returned, as JSON; None for None. Raises TypeError for what is no JSON. NaN and infinity are null."""
    if value is None:
        return None
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise TypeError(f"the function returned what is no JSON: {_lower(error)}") from None


def loaded(call: str | Callable[..., Any], batch: bool = False) -> ItemFunction | None:
    """The function of a queue job, if this process has loaded it already; None where not, or where it takes no item."""
    if isinstance(call, str) and call.partition(":")[0] not in sys.modules:
        return None
    try:
        return ItemFunction(load(call), batch=batch)
    except CallableNotFound:
        return None
