"""What a child says of itself over its NOTIFY_SOCKET, and what becomes of it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from supervisor import events
from supervisor.nodes import health, ladder
from supervisor.nodes.job import JobNode
from supervisor.nodes.node import Life
from supervisor.probes.judgement import Answer, News, Verdict
from supervisor.probes.notify import LONGEST, Message, NotifySocket
from supervisor.probes.questions import one_line

if TYPE_CHECKING:
    from supervisor.nodes.supervisor import SupervisorNode

PAUSE = 1.0
"""Seconds between two texts of a child that are passed on: of those that come faster, the last."""

REFUSALS = 20
"""So many different refusals are told in one run."""

_USEC = re.compile(r"[0-9]{1,18}")


class Hearing:
    """The ear for one run. `environ` is what the child must know of it."""

    def __init__(self, supervisor: SupervisorNode, child: JobNode, life: Life) -> None:
        run = life.run
        self._socket = NotifySocket(f"supervisor/{supervisor.tree.resources.children.instance}/{run.id}")
        self._supervisor, self._child, self._life = supervisor, child, life
        self._refused: set[str] = set()
        self._reloading = False
        self._text: str | None = None
        spec = child.spec.health
        watchdog = {"WATCHDOG_USEC": str(math.ceil(spec.every * 1e6))} if spec is not None and spec.notify else {}
        self.environ = {"NOTIFY_SOCKET": self._socket.address, **watchdog}

    async def listen(self) -> None:
        """Hear what is said for as long as the run lives."""
        passed_on = -math.inf
        with self._socket:
            while True:
                try:
                    with trio.move_on_at(math.inf if self._text is None else passed_on + PAUSE):
                        self._take(await self._socket.receive())
                except OSError as error:
                    self._refuse(f"whatever it says from here on: {os.strerror(error.errno or 0).lower()}")
                    return
                if self._text is not None and trio.current_time() >= passed_on + PAUSE:
                    passed_on = trio.current_time()
                    self._supervisor.post(self._tell, events.Said, self._text)
                    self._text = None

    def _take(self, message: Message) -> None:
        if not self._of_the_run(message):
            self._refuse(f"a message of pid {message.pid} (uid {message.uid}), which is not of this run")
        elif not message.whole:
            self._refuse(f"a message longer than {LONGEST} bytes")
        else:
            self._heed(message.assignments)

    def _of_the_run(self, message: Message) -> bool:
        """Whether a process of the run has sent it. Of a sender that is gone only the user is known: the run's, or root."""
        run = self._life.run
        if message.pid and Path(f"/proc/{message.pid}").exists():
            return self._supervisor.tree.resources.children.comes_from(message.pid, run.id)
        return message.uid in (0, _user_of(run.pid))

    def _heed(self, said: dict[str, str]) -> None:
        life, spec = self._life, self._child.spec
        if said.get("RELOADING") == "1":
            self._reloading = True
        if said.get("READY") == "1":
            if spec.ready is not None and spec.ready.notify:
                life.run.ready("it said so")
            self._text = "reloaded" if self._reloading else self._text
            self._reloading = False
        if said.get("WATCHDOG") == "1":
            life.run.heartbeat()
        elif said.get("WATCHDOG") == "trigger" and spec.health is not None and spec.health.notify:
            self._supervisor.post(self._triggered)
        if _USEC.fullmatch(extension := said.get("EXTEND_TIMEOUT_USEC", "")):
            self._supervisor.post(ladder.extend, self._supervisor, self._child, life, int(extension) / 1e6)
        self._text = ": ".join(_texts(said)) or self._text
        if "MAINPID" in said and said["MAINPID"] != str(life.run.pid):
            self._refuse("MAINPID: the main process stays the one that was started, so that nothing of it can get away")
        if "FDSTORE" in said:
            self._refuse("FDSTORE: descriptors are not kept here")

    def _refuse(self, what: str) -> None:
        """Say what is not heeded; the same only once in a run, and no more than a few."""
        if what not in self._refused and len(self._refused) < REFUSALS:
            self._refused.add(what)
            self._supervisor.post(self._tell, events.NotifyRefused, f"refused {what}")

    def _tell(self, kind: type[events.Said] | type[events.NotifyRefused], cause: str) -> None:
        if self._child.life is self._life:
            self._child.emit(kind, run=self._life.run.id, cause=cause)

    def _triggered(self) -> None:
        answer = Answer(Verdict.UNHEALTHY, "it says so (WATCHDOG=trigger)")
        health.heed(self._supervisor, self._child, self._life, News.UNHEALTHY, answer, 1)


def _texts(said: dict[str, str]) -> Iterator[str]:
    """What there is for people in a message."""
    if said.get("RELOADING") == "1":
        yield "reloading"
    if said.get("STOPPING") == "1":
        yield "it says that it is stopping"
    if status := one_line(said.get("STATUS", "")):
        yield status
    if re.fullmatch(r"[0-9]{1,4}", number := said.get("ERRNO", "")) and number != "0":
        yield f"errno {number}, {os.strerror(int(number)).lower()}"


def _user_of(pid: int | None) -> int:
    """The user that a process of ours runs as; root while there is none."""
    try:
        return Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return 0
