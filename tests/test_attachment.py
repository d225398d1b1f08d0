"""The way in to a child: real pipes and terminals, with this test at their other end."""

import fcntl
import os
import struct
import termios
import tty
from contextlib import contextmanager

import pytest
import trio
import trio.testing

from supervisor.kinds.attachment import Attachment


@contextmanager
def pipe():
    """An attachment to a pipe, and the end that a child would read."""
    reading, writing = os.pipe()
    attachment = Attachment(writing, tty=False)
    with os.fdopen(reading, "rb", buffering=0) as child:
        try:
            yield attachment, child
        finally:
            attachment.release()


@contextmanager
def terminal():
    """An attachment to a terminal, and the end that a child would have."""
    master, slave = os.openpty()
    attachment = Attachment(master, tty=True)
    with os.fdopen(slave, "rb", buffering=0) as child:
        try:
            yield attachment, child
        finally:
            attachment.release()


async def test_what_is_written_is_read_and_then_the_end():
    with pipe() as (attachment, child):
        await attachment.write(b"hello")
        await attachment.close()
        assert child.read() == b"hello"
        with pytest.raises(trio.ClosedResourceError):
            await attachment.write(b"more")


async def test_a_write_waits_for_room_and_keeps_its_turn():
    size = 300_000
    read = bytearray()
    with pipe() as (attachment, child):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(attachment.write, b"a" * size)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(attachment.write, b"b" * size)
            while len(read) < 2 * size:
                read += await trio.to_thread.run_sync(child.read, 1 << 16)
    assert read == b"a" * size + b"b" * size


async def test_nobody_reads_any_more():
    with pipe() as (attachment, child):
        child.close()
        with pytest.raises(trio.BrokenResourceError):
            await attachment.write(b"hello")


async def test_who_waits_to_write_hears_of_the_end_of_the_run():
    with pipe() as (attachment, _):
        async with trio.open_nursery() as nursery:

            async def write():
                with pytest.raises(trio.ClosedResourceError):
                    await attachment.write(bytes(300_000))

            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            attachment.release()
        attachment.release()


async def test_a_cancelled_write_leaves_the_turn_to_the_next():
    with pipe() as (attachment, child):
        with trio.move_on_after(0.01):
            await attachment.write(bytes(300_000))
        child.read(1 << 20)
        await attachment.write(b"next")
        assert child.read(100) == b"next"


async def test_a_terminal_is_typed_at_and_resized():
    with terminal() as (attachment, child):
        await attachment.write(b"hello\n")
        assert child.read(100) == b"hello\n"
        attachment.resize(50, 132)
        size = fcntl.ioctl(child, termios.TIOCGWINSZ, bytes(8))
        assert struct.unpack("HHHH", size)[:2] == (50, 132)


async def test_the_end_of_input_is_typed_and_the_terminal_stays():
    with terminal() as (attachment, child):
        await attachment.write(b"last")
        await attachment.close()
        assert child.read(100) == b"last"
        await attachment.close()
        assert child.read(100) == b""
        await attachment.write(b"more\n")
        assert child.read(100) == b"more\n"


async def test_a_terminal_whose_other_end_is_gone_is_broken():
    with terminal() as (attachment, child):
        tty.setraw(child)
        child.close()
        with pytest.raises(trio.BrokenResourceError):
            await attachment.write(b"hello")


async def test_a_pipe_has_no_size():
    with pipe() as (attachment, _):
        attachment.resize(50, 132)
