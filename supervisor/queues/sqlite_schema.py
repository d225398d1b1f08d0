"""The tables of queues in SQLite.

An item is a row while it is known. A key that `unique` protects is a row of its own, for as long as it is taken, which may be
longer than its item is known. How many items wait is kept beside them, so that nobody counts them at each put.
"""

from __future__ import annotations

SCHEMA = (
    """
    CREATE TABLE items (
        seq INTEGER PRIMARY KEY,
        queue TEXT NOT NULL,
        id TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'waiting',
        priority INTEGER NOT NULL,
        attempts INTEGER NOT NULL DEFAULT 0,
        token INTEGER NOT NULL DEFAULT 0,
        put_at REAL NOT NULL,
        ready_at REAL NOT NULL,
        expires_at REAL,
        started_at REAL,
        ended_at REAL,
        forget_at REAL,
        owner TEXT,
        key TEXT,
        in_group TEXT,
        keep INTEGER NOT NULL DEFAULT 0,
        cancelling INTEGER NOT NULL DEFAULT 0,
        parked INTEGER NOT NULL DEFAULT 0,
        done REAL,
        total REAL,
        error TEXT,
        traceback TEXT,
        result TEXT,
        payload BLOB
    );
    CREATE UNIQUE INDEX items_id ON items (queue, id);
    CREATE INDEX items_waiting ON items (queue, parked, priority, ready_at, seq) WHERE state = 'waiting';
    CREATE INDEX items_parked ON items (queue, in_group, priority, ready_at, seq) WHERE parked = 1;
    CREATE INDEX items_expiring ON items (queue, expires_at) WHERE state = 'waiting' AND expires_at IS NOT NULL;
    CREATE INDEX items_running ON items (queue, in_group) WHERE state = 'running';
    CREATE INDEX items_ended ON items (queue, state, ended_at, seq, forget_at) WHERE ended_at IS NOT NULL;
    CREATE INDEX items_over ON items (queue, forget_at) WHERE forget_at IS NOT NULL;

    CREATE TABLE large (seq INTEGER PRIMARY KEY, payload BLOB NOT NULL);
    CREATE TRIGGER large_gone AFTER DELETE ON items WHEN old.payload IS NULL BEGIN
        DELETE FROM large WHERE seq = old.seq;
    END;

    CREATE TABLE keys (
        queue TEXT NOT NULL, key TEXT NOT NULL, id TEXT NOT NULL, until REAL, PRIMARY KEY (queue, key)
    ) WITHOUT ROWID;
    CREATE INDEX keys_until ON keys (queue, until) WHERE until IS NOT NULL;

    CREATE TABLE queues (
        queue TEXT PRIMARY KEY,
        waiting INTEGER NOT NULL DEFAULT 0,
        paused INTEGER NOT NULL DEFAULT 0,
        full_at REAL NOT NULL DEFAULT 0,
        settings TEXT
    ) WITHOUT ROWID
    """,
)
"""The versions of the file. `forget_at`: until when an item that has ended is known; null: until somebody purges it.
`parked`: it waits, and a claim that met it found that enough of its group run: no other one meets it until one of them ends.
`keys.until`: null: until the item is claimed, or has ended. `full_at`: when the bucket of the `rate` is full again."""
