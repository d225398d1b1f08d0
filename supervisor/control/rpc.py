"""JSON-RPC 2.0: the text of a request becomes the call of a handler, and what that gives or raises becomes the answer.

A handler is fenced here: its exception becomes error -32603 and an entry in the log, and takes nobody else down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import msgspec
import structlog
import trio

from supervisor.control import messages
from supervisor.control.call import Call, Refused
from supervisor.control.handlers import HANDLERS
from supervisor.control.messages import Envelope, Fault
from supervisor.control.verbs import LATER, VERBS, Verb
from supervisor.errors import ControlError, SpecError, did_you_mean

if TYPE_CHECKING:
    from supervisor.control.connection import Connection

T = TypeVar("T")
Json = TypeVar("Json", bytes, msgspec.Raw, msgspec.Raw | msgspec.UnsetType)

LARGE = 1 << 20
"""Bytes of a request from which on it is read beside the loop. Only a `submit` may be longer; others begin in their order."""

_log = structlog.get_logger("control")


async def reply(connection: Connection, line: bytes) -> bytes:
    """What to send for one line: a response, a batch of them, or nothing where none is asked for."""
    try:
        batch = await _aside(line, _batch)
    except (ValueError, RecursionError) as problem:
        return failure(b"null", Fault(messages.PARSE_ERROR, _sentence(problem)))
    if batch is None:
        return await _reply_one(connection, msgspec.Raw(line))
    if not batch:
        return failure(b"null", Fault(messages.INVALID_REQUEST, "an empty batch asks for nothing"))
    return await _reply_all(connection, batch)


async def _reply_all(connection: Connection, batch: list[msgspec.Raw]) -> bytes:
    replies = [b""] * len(batch)

    async def reply_one(index: int, request: msgspec.Raw) -> None:
        replies[index] = await _reply_one(connection, request, in_batch=True)

    async with trio.open_nursery() as nursery:
        for index, request in enumerate(batch):
            nursery.start_soon(reply_one, index, request)
    answered = [reply.rstrip(b"\n") for reply in replies if reply]
    return b"[" + b",".join(answered) + b"]\n" if answered else b""


async def _reply_one(connection: Connection, raw: msgspec.Raw, in_batch: bool = False) -> bytes:
    try:
        request = await _aside(raw, _envelope)
        identity = _identity(request)
        if request.jsonrpc != "2.0":
            raise msgspec.ValidationError('`jsonrpc` must be "2.0"')
    except msgspec.ValidationError as problem:
        return failure(_any_id(raw), Fault(messages.INVALID_REQUEST, _sentence(problem)))
    except (ValueError, RecursionError) as problem:
        return failure(b"null", Fault(messages.PARSE_ERROR, _sentence(problem)))
    try:
        result = await _perform(connection, request, identity, in_batch)
    except Refused as refused:
        return failure(identity, refused.fault) if identity else b""
    return b"".join((b'{"jsonrpc":"2.0","id":', identity, b',"result":', result, b"}\n")) if identity else b""


async def _perform(connection: Connection, request: Envelope, identity: bytes, in_batch: bool) -> bytes:
    """Call the verb's handler: the fence round it. Raises Refused, and nothing else."""
    verb = _find_verb(request.method)
    if verb.streams and (in_batch or not identity):
        raise Refused(messages.INVALID_REQUEST, f"{verb.name} answers with a stream: ask for it alone, with an id")
    try:
        params = await _aside(request.params, partial(messages.read_params, verb))
    except (ValueError, RecursionError) as problem:
        raise Refused(messages.INVALID_PARAMS, f"{verb.name}: {_sentence(problem)}") from None
    try:
        return messages.encode(await HANDLERS[verb.name](Call(connection, verb.name, identity), **params))
    except (Refused, trio.BrokenResourceError, trio.ClosedResourceError):
        raise
    except ControlError as problem:
        raise Refused(problem.code, str(problem), msgspec.to_builtins(problem.data)) from None
    except SpecError as problem:
        places = [messages.Place(**asdict(fault)) for fault in problem.problems]
        raise Refused(messages.FILE_IS_WRONG, str(problem), msgspec.to_builtins(places)) from None
    except Exception as problem:
        _log.error("a control request failed", verb=verb.name, by=str(connection.peer), exc_info=problem)
        raise Refused(messages.INTERNAL_ERROR, f"{verb.name}: a fault of the daemon, see its log: {problem!r}") from None


async def _aside(given: Json, read: Callable[[Json], T]) -> T:
    """Read JSON; in a thread where there is much of it, so that everybody else has a turn between one step and the next."""
    if isinstance(given, msgspec.UnsetType) or memoryview(given).nbytes <= LARGE:
        return read(given)
    return await trio.to_thread.run_sync(read, given)


def _batch(line: bytes) -> list[msgspec.Raw] | None:
    """The requests of a batch; None where it is no batch."""
    line.decode()  # msgspec does not look into what it hands on raw
    return msgspec.json.decode(line, type=list[msgspec.Raw]) if line[:1] == b"[" else None


def _envelope(raw: msgspec.Raw) -> Envelope:
    return msgspec.json.decode(raw, type=Envelope)


def _find_verb(method: str) -> Verb:
    if verb := VERBS.get(method):
        return verb
    if method in LATER:
        raise Refused(ControlError.REFUSED, f"{method}: not supported yet")
    near = did_you_mean(method, VERBS, "'")
    raise Refused(messages.METHOD_NOT_FOUND, f"no method {method[:64]!r}{near}")


def _identity(request: Envelope) -> bytes:
    """The request's id as JSON, empty for a notification. Raises ValidationError for what cannot be an id."""
    if isinstance(request.id, msgspec.UnsetType):
        return b""
    identity = bytes(request.id)
    if identity[:1] in b"{[tf":
        raise msgspec.ValidationError("`id` must be a string, a number or null")
    return identity


class _WithId(msgspec.Struct):
    id: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


def _any_id(raw: msgspec.Raw) -> bytes:
    """The id of a request that is no valid request, as far as it has one."""
    try:
        identity = bytes(msgspec.json.decode(raw, type=_WithId).id or b"null")
    except (ValueError, RecursionError, TypeError):
        return b"null"
    return identity if identity[:1] not in b"{[tf" else b"null"


def failure(identity: bytes, fault: Fault) -> bytes:
    """The response that says that; `identity` is the id of the request as JSON."""
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}\n' % (identity, messages.encode(fault))


def _sentence(problem: Exception) -> str:
    """An exception of the decoder in our manner."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, UnicodeDecodeError):
        return f"not UTF-8 (byte {problem.start})"
    text = str(problem)
    return text if text[:2].isupper() else text[:1].lower() + text[1:]
