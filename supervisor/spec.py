"""The frozen base of everything a TOML file can say.

A spec is a `msgspec.Struct`: its fields are the only place where a key is named, typed, given its default and described.
The loader, `check`, `explain`, the JSON Schema and the reload's diff (equality) all derive from it. Each room owns the
specs of its own subject (a probe's in `probes.py`, a job's in `kinds/job.py`); here is what they share.
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

UNLIMITED = -1
"""A resource limit that is none, as the kernel writes it."""


def split_name(name: str) -> tuple[str, int | None]:
    """`api:1`, the name of a worker, as its job and its number; any other name has no number."""
    job, colon, number = name.partition(":")
    return (job, int(number)) if colon else (name, None)


class Spec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all specs: immutable, compared by value, without unknown fields."""


class Seconds(float):
    """A duration: `"250ms"`, `"10s"`, `"1h30m"`, or a number of seconds. Never negative, never NaN."""

    WORDS = "a duration"
    TYPES = ("string", "number")
    FORM = r"([0-9]+(\.[0-9]+)?(ms|s|m|h|d))+"
    _PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)
    _UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    _LONGEST = 1000 * 366 * 86400.0

    @classmethod
    def parse(cls, value: Any) -> Seconds:
        """Read a TOML value. Raises ValueError with a sentence for the operator."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if 0 <= value <= cls._LONGEST:
                return cls(value)
            raise ValueError("a duration cannot be negative, or longer than a thousand years")
        if isinstance(value, str) and value:
            parts = cls._PART.findall(value)
            if "".join(number + unit for number, unit in parts) == value:
                return cls.parse(sum(float(number) * cls._UNIT[unit] for number, unit in parts))
        raise ValueError('expected a duration such as "250ms", "10s" or "1h30m", or a number of seconds')


class Bytes(int):
    """A size: `"64KB"`, `"10MB"`, or a number of bytes. 1 KB is 1024 bytes."""

    WORDS = "a size"
    TYPES = ("string", "integer")
    FORM = r"[0-9]+(\.[0-9]+)?\s*([KMG]i?)?B"
    _FORM = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|KiB|MiB|GiB)", re.ASCII)
    _UNIT = {"B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

    @classmethod
    def parse(cls, value: Any) -> Bytes:
        """Read a TOML value. Raises ValueError with a sentence for the operator."""
        if isinstance(value, int) and not isinstance(value, bool):
            if 0 <= value < 1 << 63:
                return cls(value)
            raise ValueError("a size cannot be negative, or 8 EiB and more")
        if isinstance(value, str) and (form := cls._FORM.fullmatch(value)):
            return cls.parse(int(min(float(form[1]) * cls._UNIT[form[2][0]], 1 << 63)))
        raise ValueError('expected a size such as "64KB" or "10MB", or a number of bytes')


class Rate(float):
    """So many things a second: `"100/s"`, `"30/m"`, `"1000/h"`, `"1/d"`, or a number a second."""

    WORDS = "a rate"
    TYPES = ("string", "number")
    FORM = r"[0-9]+(\.[0-9]+)?/(s|m|h|d)"
    _FORM = re.compile(r"(\d+(?:\.\d+)?)/(s|m|h|d)", re.ASCII)

    @classmethod
    def parse(cls, value: Any) -> Rate:
        """Read a TOML value. Raises ValueError with a sentence for the operator."""
        if isinstance(value, str) and (form := cls._FORM.fullmatch(value)):
            value = float(form[1]) / Seconds.parse(f"1{form[2]}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e9:
            return cls(value)
        raise ValueError('expected a rate above 0 such as "100/s", "30/m" or "10/h", or a number of times a second')

    def __str__(self) -> str:
        """As a file would say it, in the first unit in which it is 1 or more: `30/m`, and not 0.5 a second."""
        unit = next((unit for unit in "smh" if self * Seconds.parse(f"1{unit}") > 1 - 1e-9), "d")
        return f"{self * Seconds.parse(f'1{unit}'):.6g}/{unit}"


class FileMode(int):
    """Permission bits, written in octal: `"0022"`, or the TOML integer 0o022."""

    WORDS = "an octal number"
    TYPES = ("string", "integer")
    FORM = "(0o)?[0-7]{1,4}"

    @classmethod
    def parse(cls, value: Any) -> FileMode:
        """Read a TOML value. Raises ValueError with a sentence for the operator.

        22 was hardly meant as 0o26: an integer that reads like a mask in its decimal digits is refused.
        """
        if isinstance(value, str) and re.fullmatch(cls.FORM, value, re.ASCII):
            value = int(value.removeprefix("0o"), 8)
        elif not isinstance(value, int) or isinstance(value, bool) or re.fullmatch("[027]{2,}", str(value)):
            raise ValueError('expected an octal number such as "0022" or 0o022 (an integer without 0o is decimal)')
        if 0 <= value <= 0o777:
            return cls(value)
        raise ValueError('expected an octal number such as "0022" or 0o022, at most 0o777')


class Account(str):
    """A user or a group: by name, or by number."""

    WORDS = "a name or a number"
    TYPES = ("string", "integer")
    FORM = ".+"

    @classmethod
    def parse(cls, value: Any) -> Any:
        """Read a TOML value. Raises ValueError with a sentence for the operator."""
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < (1 << 32) - 1:
            return cls(value)
        if isinstance(value, str) and value:
            return value  # as it is: it may be an `Expanded`
        raise ValueError("expected a name or a number")


class Paths(tuple[str, ...]):
    """One path, or a list of them."""


class Limit(tuple[int, int]):
    """A resource limit: soft and hard; `UNLIMITED` where there is none."""

    WORDS = "a limit"
    TYPES = ("string", "integer", "array")
    FORM = f"unlimited|[0-9]+|{Bytes.FORM}"

    @classmethod
    def parse(cls, value: Any) -> Limit:
        """Read a TOML value. Raises ValueError with a sentence for the operator."""
        both = list(value) if isinstance(value, (list, tuple)) else [value, value]
        try:
            soft, hard = (UNLIMITED if each == "unlimited" else int(Bytes.parse(each)) for each in both)
        except ValueError:
            raise ValueError('expected a number, a size such as "1GB", "unlimited", or [soft, hard]') from None
        if hard != UNLIMITED and (soft > hard or soft == UNLIMITED):
            raise ValueError("the soft limit is above the hard one: expected [soft, hard]")
        return cls((soft, hard))


class RestartType(enum.Enum):
    """OTP's restart types."""

    PERMANENT = "permanent"
    TRANSIENT = "transient"
    TEMPORARY = "temporary"


class Strategy(enum.Enum):
    """OTP's strategies: who is restarted when one child fails."""

    ONE_FOR_ONE = "one_for_one"
    ONE_FOR_ALL = "one_for_all"
    REST_FOR_ONE = "rest_for_one"


class AutoShutdown(enum.Enum):
    """When a supervisor ends by itself because significant children have ended."""

    NEVER = "never"
    ANY_SIGNIFICANT = "any_significant"
    ALL_SIGNIFICANT = "all_significant"


class Backoff(Spec, frozen=True, kw_only=True):
    """How long to wait before a restart: `initial * factor ** n`, at most `max`, each spread by `jitter`."""

    initial: Annotated[Seconds, Meta(description="wait before the first restart")] = Seconds(0.5)
    factor: Annotated[float, Meta(ge=1, description="what each further wait is multiplied by")] = 2.0
    max: Annotated[Seconds, Meta(description="the longest wait")] = Seconds(30)
    jitter: Annotated[
        float, Meta(ge=0, le=1, description="spread: 0.2 makes each wait up to 20 % shorter or longer, so that crowds part")
    ] = 0.2
    reset_after: Annotated[
        Seconds, Meta(description="after this much time ready, the next failure starts again at `initial`")
    ] = Seconds(60)


class GiveUp(Spec, frozen=True, kw_only=True):
    """When to stop trying: this many failures within this time."""

    failures: Annotated[int, Meta(ge=1, description="how many failures are too many")]
    within: Annotated[Seconds, Meta(gt=0, description="the time in which they are counted")]


class Recycle(Spec, frozen=True, kw_only=True):
    """When a run is replaced although nothing is wrong with it. At least one key."""

    age: Annotated[
        Seconds | None,
        Meta(gt=0, description="it has run for this long, up to a tenth more or less, so that a crowd does not go at once"),
    ] = None
    runs: Annotated[int | None, Meta(ge=1, description="it has handled so many items of its queue")] = None
    memory: Annotated[
        Bytes | None,
        Meta(gt=0, description="it and its descendants hold more than this in memory. Looked at every 5 s: no hard limit"),
    ] = None


class ChildSpec(Spec, frozen=True, kw_only=True):
    """What a job and a supervisor have in common: both are the child of a supervisor."""

    restart: Annotated[
        RestartType | None,
        Meta(
            description="permanent: any end that was not asked for is a failure, and is restarted; "
            "transient: restarted only after a failure; temporary: never restarted. "
            "Services and supervisors are permanent, `once` jobs transient, unless you say otherwise"
        ),
    ] = None
    backoff: Annotated[Backoff, Meta(description="how long to wait before a restart")] = Backoff()
    after: Annotated[
        tuple[str, ...],
        Meta(
            description="jobs or supervisors that must be ready before this one starts (a `once` job: succeeded). "
            "It orders, it does not pull: while the target is down, this one waits. Stop order is the reverse"
        ),
    ] = ()
    essential: Annotated[
        bool, Meta(description="when this ends for good, the daemon drains and exits: 0 if it completed, else 1")
    ] = False
    significant: Annotated[
        bool, Meta(description="its end counts for the supervisor's `auto_shutdown` (transient: success; temporary: any end)")
    ] = False


class SupervisorSpec(ChildSpec, frozen=True, kw_only=True):
    """A `[supervisors.NAME]` table: a group of jobs and supervisors that lives and falls by one strategy."""

    strategy: Annotated[
        Strategy,
        Meta(
            description="who is restarted when a child fails: one_for_one, that child; one_for_all, all of them; "
            "rest_for_one, that child and those listed after it"
        ),
    ] = Strategy.ONE_FOR_ONE
    intensity: Annotated[
        int | None,
        Meta(
            ge=0,
            description="more than this many restarts within `period` and the supervisor stops its children and fails itself; "
            "0 allows none. Without it: 5 for one_for_all and rest_for_one, no limit for one_for_one",
        ),
    ] = None
    period: Annotated[Seconds, Meta(gt=0, description="the sliding window in which restarts are counted")] = Seconds(60)
    children: Annotated[tuple[str, ...], Meta(description="names of jobs and supervisors, in start order")] = ()
    auto_shutdown: Annotated[
        AutoShutdown, Meta(description="end, with success, when any or all of the significant children have ended")
    ] = AutoShutdown.NEVER

    @property
    def limit(self) -> int | None:
        """The intensity in force; None is no limit."""
        if self.intensity is None and self.strategy is not Strategy.ONE_FOR_ONE:
            return 5
        return self.intensity


class Expanded(str):
    """A string in which `${NAME}` was expanded. `shown` is the text of the file: what people may see."""

    shown: str

    def __new__(cls, value: str, shown: str) -> Expanded:
        self = super().__new__(cls, value)
        self.shown = shown
        return self

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """For another process it is a string like any."""
        return str, (str(self),)


def shown(value: str) -> str:
    """`value` as status, logs and events may show it: the text of the file, never an expansion."""
    return value.shown if isinstance(value, Expanded) else value
