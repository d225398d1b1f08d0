"""The verbs of the control socket: one block each, plain data.

Here, and nowhere else, a verb and its parameters are named, typed, given defaults and described. The server's requests, the
commands of the CLI with their help and completion, and the OpenRPC description are derived from this table. To add a verb:
a block here, its result in `messages.RESULTS`, a handler in `handlers.HANDLERS`; a test holds the three together.

Nothing is imported: `supervisor status` is a whole process, and msgspec or click alone would cost it more than the rest.
"""

from __future__ import annotations


class Param:
    """One parameter of a verb. Without a `default` it must be given.

    `type` is what JSON carries (`float` is seconds, `list[object]` any JSON values). For the command line: `positional` ones
    stand alone, others are `--name`, with `short` as a second spelling; a flag that defaults to true also gets `--no-name`. A
    `rest` takes every word from the first on, whatever it looks like.
    """

    __slots__ = ("default", "help", "metavar", "name", "positional", "required", "rest", "short", "type")

    def __init__(
        self,
        name: str,
        type: object,
        help: str,
        default: object = ...,
        *,
        positional: str = "",
        short: str = "",
        metavar: str = "",
        rest: bool = False,
    ) -> None:
        self.name = name
        self.type = type
        self.help = help
        self.required = default is ...
        self.default = default
        self.positional = bool(positional)
        self.metavar = positional or metavar
        self.short = short
        self.rest = rest

    @property
    def many(self) -> bool:
        """Whether it is a list."""
        return self.type in (list[str], list[object])

    @property
    def flag(self) -> bool:
        """Whether it is a switch."""
        return self.type is bool

    @property
    def option(self) -> str:
        """Its long spelling on the command line."""
        return "--" + self.name.replace("_", "-")


class Verb:
    """One thing that can be asked of a running daemon.

    `changes` verbs are recorded with who asked. `streams` verbs answer with notifications that carry the request's id, and
    with a result only where they come to an end; `converses`: meanwhile the caller has more to say, with `input`. `hidden`
    ones have a command, but not in the list of commands; without `command` there is none. On the command line, `queue.ls` is
    `queue ls`.
    """

    __slots__ = ("changes", "command", "converses", "help", "hidden", "name", "params", "streams")

    def __init__(
        self,
        name: str,
        help: str,
        *params: Param,
        changes: bool = False,
        streams: bool = False,
        converses: bool = False,
        hidden: bool = False,
        command: bool = True,
    ) -> None:
        self.name = name
        self.help = help
        self.params = params
        self.changes = changes
        self.streams = streams
        self.converses = converses
        self.hidden = hidden
        self.command = command

    @property
    def spoken(self) -> str:
        """As it is typed."""
        return self.name.replace(".", " ") if self.name.startswith(QUEUE) else self.name


QUEUE = "queue."
"""What the names of the verbs begin with that are about queues."""

_SOME = Param("names", list[str], "jobs or supervisors; * and ? are globs; none: all", (), positional="NAME")
_NAMES = Param("names", list[str], "jobs or supervisors; * and ? are globs", positional="NAME")
_WAIT = Param("wait", bool, "answer when it is done; otherwise when it is accepted", True)
_TIMEOUT = Param(
    "timeout", float | None, "stop waiting after this long, with exit code 75; what was asked for goes on", None, metavar="TIME"
)

_QUEUE = Param("queue", str, "the queue", positional="QUEUE")
_ITEM = Param("id", str, "the id of the item", positional="ITEM")
_IN = Param("queue", str, "the queue it is in, where several have an item of that id", "", metavar="QUEUE")
_LINES = Param("lines", int, "how many items", 20, short="-n", metavar="N")

ALL = (
    Verb(
        "status",
        "show what every job is doing, and why",
        _SOME,
        Param(
            "usage", bool, "also the memory and CPU time of each job's processes, with all that came of them", False, short="-u"
        ),
    ),
    Verb("tree", "draw supervisors and jobs as they hang together"),
    Verb(
        "start",
        "start jobs or whole supervisors, and wait until they are ready",
        _NAMES,
        Param("with_after", bool, "also start what they come after", False),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "stop",
        "stop jobs or whole supervisors, and wait until nothing of them is alive",
        _NAMES,
        Param("now", bool, "kill at once, without the grace", False),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "restart",
        "stop and start again, also from stopped; several workers of a job one after another, each when the last is ready",
        _NAMES,
        Param("at_once", bool, "all workers of a job at the same time", False),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "scale",
        "set how many workers of a service run; only the difference is touched",
        Param("name", str, "the job", positional="NAME"),
        Param("workers", int, "how many", positional="N"),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "reload",
        "read the file again and apply what changed in it; with names: reload those jobs",
        Param("names", list[str], "jobs that are to reload themselves; none: the file", (), positional="NAME"),
        Param("plan", bool, "only show what would change", False),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "signal",
        "send a signal to the main process of a job",
        Param("name", str, "the job", positional="NAME"),
        Param("signal", str, "HUP, SIGHUP or a number", positional="SIG"),
        Param("group", bool, "to its whole process group", False),
        changes=True,
    ),
    Verb("run-now", "run a `once` or `every` job now, and wait for the end of the run", _NAMES, _WAIT, _TIMEOUT, changes=True),
    Verb("pause", "make no new runs of a `once` or `every` job; have a `queue` job take no more items", _NAMES, changes=True),
    Verb("resume", "end a pause", _NAMES, changes=True),
    Verb(
        "cancel",
        "end the run in hand of a `once` or `every` job, also where it waits, or an item of a queue: no failure, no retry",
        Param("names", list[str], "jobs, runs such as nightly#7, or the ids of items", positional="NAME|RUN|ITEM"),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb(
        "submit",
        "put items into a queue; done when they are stored as safely as the queue keeps things",
        _QUEUE,
        Param(
            "items",
            list[object],
            "each a JSON value, or @FILE for a file with one in each line; - or nothing is standard input, the same",
            (),
            positional="JSON|@FILE|-",
        ),
        Param(
            "id",
            list[str],
            "the id of each item: what is known already is not stored again. On the command line, one id for many is what "
            "theirs begin with: ID-1, ID-2 and so on",
            (),
            metavar="ID",
        ),
        Param("priority", str, "one of the queue's priorities; the middle one unless you say", "", metavar="NAME"),
        Param("delay", float | None, "not before so much time has passed", None, metavar="TIME"),
        Param(
            "at", str, "not before this moment: 2026-12-24T18:00:00+01:00, or without a zone the daemon's", "", metavar="WHEN"
        ),
        Param("expire", float | None, "not any more when it has waited for so long", None, metavar="TIME"),
        Param("keep", bool, "keep its end for `keep_results`, so that it can be asked for, also if nothing is returned", False),
        Param("result", bool, "wait until they have ended, and give what came of them", False),
        Param(
            "timeout",
            float | None,
            "stop waiting for room in the queue, or for the results, after this long, with exit code 75",
            None,
            metavar="TIME",
        ),
    ),
    Verb(
        "queue.ls",
        "show what queues there are, and how many items they have",
        Param("names", list[str], "queues; * and ? are globs; none: all", (), positional="QUEUE"),
    ),
    Verb(
        "queue.peek",
        "show the next items of a queue, or the last ones of another state",
        _QUEUE,
        Param("state", str, "waiting, running, done, dead, cancelled or expired", "waiting", metavar="STATE"),
        _LINES,
    ),
    Verb("queue.dead", "show the dead items of a queue: their attempts are used up, or no other is worth it", _QUEUE, _LINES),
    Verb("queue.show", "show all that is known of an item", _ITEM, _IN),
    Verb(
        "queue.wait",
        "wait until items have ended, and show what came of them",
        Param("ids", list[str], "the ids of items", positional="ITEM"),
        _IN,
        _TIMEOUT,
    ),
    Verb(
        "queue.requeue",
        "give dead items their attempts anew",
        _QUEUE,
        Param("ids", list[str], "the ids of items", (), positional="ITEM"),
        Param("all", bool, "all that are dead", False),
        changes=True,
    ),
    Verb(
        "queue.purge",
        "remove all items of a state from a queue",
        _QUEUE,
        Param("state", str, "waiting, done, dead, cancelled or expired", positional="STATE"),
        changes=True,
    ),
    Verb("queue.pause", "have nobody take items from a queue, on whatever host", _QUEUE, changes=True),
    Verb("queue.resume", "end the pause of a queue", _QUEUE, changes=True),
    Verb(
        "limits",
        "show how breakers, rates and bulkheads stand, and who waits",
        Param(
            "names",
            list[str],
            "limits, or jobs that have some to themselves; * and ? are globs; none: all",
            (),
            positional="NAME",
        ),
    ),
    Verb("metrics", "print what jobs and limits are doing, as Prometheus reads it"),
    Verb(
        "logs",
        "show the captured output of jobs",
        _SOME,
        Param("follow", bool, "go on with what they print from now on", False, short="-f"),
        Param("lines", int, "how many of the last lines of each job to begin with", 100, short="-n", metavar="N"),
        streams=True,
    ),
    Verb(
        "events",
        "show what happened: every start, end, command and decision",
        Param("follow", bool, "go on with what happens from now on", False, short="-f"),
        Param("since", int | None, "begin after the event with this number", None, metavar="SEQ"),
        Param("snapshot", bool, "begin with the rows of `status` that the events then change", False),
        streams=True,
    ),
    Verb(
        "history",
        "show how the last runs of a job ended, those of earlier daemons included",
        Param("name", str, "the job; also one that is no more", positional="NAME"),
        Param("lines", int, "how many runs", 20, short="-n", metavar="N"),
    ),
    Verb(
        "exec",
        "run a command once as a job of the daemon, show what it prints, and end with its exit code",
        Param("command", list[str], "the command, word by word, without a shell", positional="COMMAND", rest=True),
        Param("name", str, "its name in `status`; exec-1, exec-2 and so on unless you say", "", metavar="NAME"),
        Param("cwd", str, "its working directory; the one of the daemon's file unless you say", "", metavar="DIR"),
        Param("user", str, "the user it runs as; the daemon's own unless you say", "", metavar="USER"),
        Param("env", list[str], "a variable of its environment; may be given again", (), short="-e", metavar="NAME=VALUE"),
        Param("interactive", bool, "hand standard input over to it; what is no terminal always is", False, short="-i"),
        Param("tty", bool, "give it a terminal, of the size of this one", False, short="-t"),
        Param("timeout", float | None, "ask it to end after this long, and end with exit code 75", None, metavar="TIME"),
        Param("detach", bool, "print its name and leave it running; otherwise it ends when nobody waits for it", False),
        changes=True,
        streams=True,
        converses=True,
    ),
    Verb(
        "attach",
        "show what a running job prints, and type to it; Ctrl-] or Ctrl-P Ctrl-Q leaves it",
        Param("name", str, 'a job with `stdin = "pipe"` or `tty = true`', positional="NAME"),
        Param("lines", int, "how many of its last lines to begin with", 10, short="-n", metavar="N"),
        changes=True,
        streams=True,
        converses=True,
    ),
    Verb(
        "input",
        "hand input to the job of an `exec` or `attach` of this connection; answered when it is written",
        Param("to", int | str, "the id of that request"),
        Param("data", bytes, "bytes for its standard input, as base64", b""),
        Param("eof", bool, "then end the input; on a terminal, type Ctrl-D", False),
        Param("rows", int, "the height of its terminal from now on", 0),
        Param("columns", int, "the width of its terminal from now on", 0),
        command=False,
    ),
    Verb(
        "shutdown",
        "stop everything in order, and the daemon with it",
        Param("now", bool, "kill at once, without the graces", False),
        _WAIT,
        _TIMEOUT,
        changes=True,
    ),
    Verb("version", "show who answers: its name, version, pid and phase"),
    Verb("rpc.discover", "describe this protocol, as OpenRPC", hidden=True),
)

VERBS = {verb.name: verb for verb in ALL}

LATER = ("why", "top")
"""Verbs of the contract that are not built yet: refused by name."""

FOREIGN = {
    "tail": "logs -f",
    "update": "reload",
    "reread": "reload --plan",
    "avail": "status",
    "up": "run",
    "ps": "status",
}
"""The words of other supervisors, and ours for them."""
