"""The nodes of the tree: a supervisor, and the children it keeps. Only `tree` knows them.

    node         what a job and a supervisor have in common; a life, an order, a reason to wait or to stop
    job          a job: its schedule, and its runs
    schedule     when its runs are due, and what becomes of those that are due while one is in hand
    ticking      the schedules of queue jobs: an item for each tick
    alarm        the tree's one alarm on the wall clock
    fence        the boundary round foreign code
    attempts     the policies round a run: its attempts, and what is between them
    pool         what a worker of a queue job does with its items
    checks       whether those who handle a queue take an item, before it is put
    limits       what limits the runs of jobs, and outlives them
    oneoff       a job that no configuration names: run once, and forgotten
    attendance   what looks after a run from beside it: readiness, and what follows
    asking       from a probe in the file to a question that can be asked of a run
    health       whether a run is well
    hearing      what a child says of itself over its NOTIFY_SOCKET
    recycling    what runs hold in memory
    room         how many runs may be in threads and in processes at the same time
    supervisor   a supervisor: the books of its children, and the loop that keeps them as they should be
    inbox        what that loop waits for: messages and timers
    reasons      what a child should be doing, and why
    restarts     how failures are answered: strategy, group operation, intensity
    ladder       how a run is stopped: ask, wait for its grace, kill
    workers      the workers of a job with several: a supervisor of its own
    autoscale    how many they are, where that goes by the work there is
    commands     what an operator may ask of a child

A supervisor is one task with one inbox. What happens to its children (a run is ready, a run is over, a timer is due, an
operator asks) is posted there; the loop updates its books, *touches* the children concerned and *settles* each of them: it
compares what the child should be doing with what it does, and starts or asks it to stop. Settling is level-triggered, so a
command is nothing but a changed goal, and every command is answered in every state. Nothing is awaited in the loop: runs,
readiness waits are tasks of their own that report back through the inbox, and the rungs of a stop ladder are timers.
"""

from __future__ import annotations

from supervisor.nodes.alarm import Alarm
from supervisor.nodes.checks import Checks
from supervisor.nodes.commands import COMMANDS, obey
from supervisor.nodes.job import JobNode
from supervisor.nodes.limits import Limits
from supervisor.nodes.node import Node, Order
from supervisor.nodes.oneoff import OneOff
from supervisor.nodes.recycling import Scales
from supervisor.nodes.room import Rooms
from supervisor.nodes.schedule import Schedule, rhythm
from supervisor.nodes.supervisor import SupervisorNode
from supervisor.nodes.ticking import Ticker, Ticking
from supervisor.nodes.workers import WorkersNode, scale

__all__ = [
    "COMMANDS",
    "Alarm",
    "Checks",
    "JobNode",
    "Limits",
    "Node",
    "OneOff",
    "Order",
    "Rooms",
    "Scales",
    "Schedule",
    "SupervisorNode",
    "Ticker",
    "Ticking",
    "WorkersNode",
    "obey",
    "rhythm",
    "scale",
]
