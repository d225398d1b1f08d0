"""Queues in a PostgreSQL, which many daemons on many hosts share, and applications put into within their own transactions.

    open              a queue; the tables are made by whoever comes first
    schema            what makes the tables, for an administrator
    PostgresQueue     the Engine: each operation is the call of a function in the database

What is done is in `postgres.sql`, as functions of the database: an operation is one round trip, its locks end with it, and what
an application puts by SQL (`supervisor.put`) obeys the same rules. So its statements are not SQLite's, whose database is in
the process; rows for people are shared (`sql.py`). The connection is `postgres_session.py`'s.

Leases and all moments go by the server's clock. What others do is heard by LISTEN; whatever may have been missed while there was
no connection is looked at when there is one again.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import psycopg
import trio

from supervisor.queues import Place
from supervisor.queues.postgres_session import Rows, Session, Statement
from supervisor.queues.protocol import (
    Claimed,
    Counts,
    Draft,
    Ending,
    Engine,
    Item,
    Notice,
    QueueFull,
    QueueUnavailable,
    Receipt,
    Record,
    Settings,
    State,
)
from supervisor.queues.sql import COLUMNS, NO_ATTEMPT_LEFT, WORKER_LOST, record

VERSION = 1

MANY = 1000
"""Items that a command for people changes in one transaction."""

_MIGRATION = 0x73757065727669  # a number of our own among the advisory locks of the database


@asynccontextmanager
async def open(name: str, settings: Settings, place: Place) -> AsyncIterator[Engine]:
    """A queue of this name in the database whose URL `settings` has as `backend`. Nothing is connected yet."""
    queue = PostgresQueue(name, settings, place.listen)
    try:
        yield queue
    finally:
        await queue.close()


def schema() -> str:
    """The SQL that makes what queues need in a database, where the users of daemons may not: for an administrator."""
    return Path(__file__).with_name("postgres.sql").read_text()
