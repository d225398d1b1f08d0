"""The shapes a value can have in the file: how each is read, what is expected of it, and how an editor knows it.

`shape_of` derives them from the annotations of the specs, which stay the only place where a key is named, typed and
described. To allow a new type in a spec, add its shape here.
"""

from __future__ import annotations

import enum
import functools
import os
import re
import shlex
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import msgspec

from supervisor.config import later
from supervisor.config.reading import BAD, EXPANSION, ONE_EXPANSION, Reading, either, quoted
from supervisor.config.toml_places import Path
from supervisor.errors import did_you_mean
from supervisor.spec import NAME, Bytes, Expanded, FileMode, Paths, Seconds, Spec

Schema = dict[str, Any]
SpecType = TypeVar("SpecType", bound=Spec)

_NO_BOUNDS = msgspec.Meta()
_EXPANDABLE = r"^\$\{.+\}$"


class Shape:
    """One form of a value. `words` completes "expected …"."""

    words: str

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The typed value, or BAD after noting what is wrong with it."""
        raise NotImplementedError

    def schema(self) -> Schema:
        """The JSON Schema of it."""
        raise NotImplementedError


class Text(Shape):
    """A string; `${NAME}` is expanded."""

    words = "a string"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The string, or `Expanded`."""
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            return reading.unexpected(path, f"expected {self.words}", value)
        expanded = reading.expand(value, path)
        if expanded is not BAD and "\0" in expanded:
            return reading.fault(path, "a string cannot contain the character NUL")
        return expanded

    def schema(self) -> Schema:
        """A string."""
        return {"type": "string"}


class Flag(Shape):
    """True or false."""

    words = "true or false"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The boolean."""
        read = reading.unwrap(value, path)
        return read if read is BAD or isinstance(read, bool) else reading.unexpected(path, f"expected {self.words}", value)

    def schema(self) -> Schema:
        """A boolean; not also a string, for the sake of the completion."""
        return {"type": "boolean"}


class Number(Shape):
    """An integer or a float within bounds."""

    def __init__(self, kind: type[int] | type[float], bounds: msgspec.Meta) -> None:
        self._kind = kind
        self._bounds = bounds
        self.words = "an integer" if kind is int else "a number"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The number. An integer will do for a float, not the other way round."""
        read = reading.unwrap(value, path)
        if read is BAD:
            return BAD
        if isinstance(read, bool) or not isinstance(read, int if self._kind is int else (int, float)):
            return reading.unexpected(path, f"expected {self.words}", value)
        if not abs(read) < 1 << 63:
            return reading.unexpected(path, f"expected {self.words} that is finite and of a sensible size", value)
        return _bounded(self._kind(read), self._bounds, value, path, reading)

    def schema(self) -> Schema:
        """A number with its bounds."""
        number = "integer" if self._kind is int else "number"
        return {"type": [number, "string"], "pattern": _EXPANDABLE, **_bounds_schema(self._bounds)}


class Parsed(Shape):
    """A value that reads itself, such as a duration or a size: text of its own form, or a number."""

    def __init__(self, kind: Any, bounds: msgspec.Meta) -> None:
        self._kind = kind
        self._bounds = bounds
        self.words = kind.WORDS

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """What its `parse` makes of it."""
        read = reading.unwrap(value, path)
        if read is BAD:
            return BAD
        try:
            parsed = self._kind.parse(read)
        except ValueError as error:
            return reading.unexpected(path, str(error), value)
        return _bounded(parsed, self._bounds, value, path, reading)

    def schema(self) -> Schema:
        """A string of that form, or a number."""
        pattern = rf"^({self._kind.FORM}|\$\{{.+\}})$"
        return {"type": list(self._kind.TYPES), "pattern": pattern, "minimum": 0, **_bounds_schema(self._bounds)}


class Word(Shape):
    """One of a few words; `kind` makes it an enum's member."""

    def __init__(self, choices: tuple[str, ...], kind: Callable[[str], Any] = str) -> None:
        self.choices = choices
        self._kind = kind
        self.words = either(choices)

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The word, or the member."""
        read = reading.expand(value, path) if isinstance(value, str) else value
        if read is BAD:
            return BAD
        if isinstance(read, str) and read in self.choices:
            return self._kind(str(read))
        hint = did_you_mean(value, self.choices) if isinstance(value, str) else ""
        return reading.fault(path, f"expected {self.words}, got {quoted(value)}{hint}")

    def schema(self) -> Schema:
        """The words, for completion."""
        return {"type": "string", "enum": list(self.choices)}


class WordOr(Word):
    """One of a few words, or a value of another shape."""

    def __init__(self, choices: tuple[str, ...], other: Shape) -> None:
        super().__init__(choices)
        self._other = other
        self.words = f"{', '.join(quoted(choice) for choice in choices)} or {other.words}"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The word, or what the other shape makes of it."""
        read = reading.unwrap(value, path)
        if isinstance(read, str) and read in self.choices:
            return str(read)
        if isinstance(read, str) and (hint := did_you_mean(read, self.choices)):
            return reading.fault(path, f"expected {self.words}, got {quoted(value)}{hint}")
        return self._other.read(read, path, reading)

    def schema(self) -> Schema:
        """The other's, which must be text, or one of the words."""
        schema = self._other.schema()
        return {**schema, "pattern": f"^({'|'.join(self.choices)}|{schema['pattern'].strip('^$')})$"}


class ListOf(Shape):
    """An array of one shape; read as a tuple."""

    def __init__(self, item: Shape) -> None:
        self._item = item
        self.words = "a list of strings" if isinstance(item, Text) else "a list of integers"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The tuple."""
        read = reading.unwrap(value, path)
        if read is BAD:
            return BAD
        if not isinstance(read, (list, tuple)):
            return reading.unexpected(path, f"expected {self.words}", value)
        items = [self._item.read(item, (*path, index), reading) for index, item in enumerate(read)]
        return BAD if any(item is BAD for item in items) else tuple(items)

    def schema(self) -> Schema:
        """An array."""
        return {"type": "array", "items": self._item.schema()}


class OneOrMore(ListOf):
    """A string, or an array of them; read as a tuple."""

    def __init__(self) -> None:
        super().__init__(Text())
        self.words = "a string or a list of strings"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The tuple."""
        read = reading.unwrap(value, path)
        if not isinstance(read, str):
            return super().read(read, path, reading)
        one = self._item.read(read, path, reading)
        return BAD if one is BAD else (one,)

    def schema(self) -> Schema:
        """A string or an array, without a union: editors explain those badly."""
        return {"type": ["string", "array"], "items": {"type": "string"}}


class CommandLine(ListOf):
    """A list of words, or a string that is split as a shell would and then expanded word by word; read as a tuple."""

    def __init__(self) -> None:
        super().__init__(Text())
        self.words = "a string or a list of strings"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The words."""
        words = super().read(self._split(value, path, reading) if isinstance(value, str) else value, path, reading)
        if words is BAD or (words and words[0]):
            return words
        return reading.fault(path, "the command is empty: expected a program and its arguments")

    def schema(self) -> Schema:
        """A string or an array, without a union: editors explain those badly."""
        return {"type": ["string", "array"], "items": {"type": "string"}, "minItems": 1, "minLength": 1}

    def _split(self, text: str, path: Path, reading: Reading) -> Any:
        if ONE_EXPANSION.fullmatch(text):
            whole = reading.unwrap(text, path)
            if not isinstance(whole, str):
                return whole
            words = _words(whole)
            words = words and [Expanded(word, "" if number else text) for number, word in enumerate(words)]
        else:
            words = _words(text)
            if mark := _SHELL.search(_QUOTED.sub("_", EXPANSION.sub("_", text))):
                sign = mark[0].strip()
                reading.warn(path, f'"{sign}" means nothing without a shell; if you want one, write ["sh", "-c", "..."]')
        return reading.unexpected(path, "unbalanced quotes: expected words as in a shell", text) if words is None else words


_QUOTED = re.compile(r"""\\.|'[^']*'|"[^"$]*\"""")
_SHELL = re.compile(r"\||&&|>|(?:^|\s)~|\$")


def _words(text: str) -> list[str] | None:
    """Split as a shell would, every `${...}` kept whole; None where quotes are not balanced."""
    kept: list[str] = []

    def keep(found: re.Match[str]) -> str:
        kept.append(found[0])
        return f"\0{len(kept) - 1}\0"

    try:
        words = shlex.split(EXPANSION.sub(keep, text))
    except ValueError:
        return None
    return [re.sub("\0([0-9]+)\0", lambda found: kept[int(found[1])], word) for word in words] if kept else words


class TableOf(Shape):
    """A table with keys of the user's own: `env`, `args`."""

    def __init__(self, item: Shape) -> None:
        self._item = item
        self.words = "a table of strings" if isinstance(item, Text) else "a table"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The dict."""
        read = table(value, path, reading, self.words)
        if read is BAD:
            return BAD
        items = {key: self._item.read(item, (*path, key), reading) for key, item in read.items()}
        return BAD if any(item is BAD for item in items.values()) else items

    def schema(self) -> Schema:
        """An object with free keys."""
        return {"type": "object", "additionalProperties": self._item.schema()}


class Anything(Shape):
    """A value that only the user's function understands; strings in it are expanded."""

    words = "any value"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The value, with the strings in it expanded."""
        if isinstance(value, (list, tuple)):
            items = [self.read(item, (*path, index), reading) for index, item in enumerate(value)]
            return BAD if any(item is BAD for item in items) else items
        if isinstance(value, Mapping):
            return TableOf(self).read(value, path, reading)
        return reading.unwrap(value, path)

    def schema(self) -> Schema:
        """Anything."""
        return {}


CHILD = ("child",)
"""What a key `needs` that concerns a process of the job's own, and the same in words."""

A_CHILD = '`command` or kind = "process"'


class Field(NamedTuple):
    """What a spec says of one key. `extra` is the Meta's: whom the key is `for`, and what a `reload` of it does.

    `attribute` is its name in the spec, where a word of the file is none in Python.
    """

    name: str
    attribute: str
    shape: Shape
    description: str
    default: Any
    extra: Mapping[str, str]

    @property
    def required(self) -> bool:
        """Whether the table is wrong without it."""
        return self.default is msgspec.NODEFAULT

    @property
    def needs(self) -> tuple[str, ...]:
        """The keys of which a job must have one for this one to do anything, or `CHILD`; empty where any job will do."""
        return tuple(self.extra["for"].split(" or ")) if "for" in self.extra else ()

    @property
    def whom(self) -> str:
        """Which jobs it is for, to be said after "only for"; empty where any job will do."""
        if self.needs:
            return f"a job with {A_CHILD if self.needs == CHILD else ' or '.join(f'`{key}`' for key in self.needs)}"
        return "runs that end: `once`, `every`, `cron`, `queue`" if "ends" in self.extra else ""


class Table(Shape, Generic[SpecType]):
    """A table that a spec describes."""

    words = "a table"

    def __init__(self, spec: type[SpecType]) -> None:
        self.spec = spec
        own = [*spec.__annotations__, *spec.__struct_fields__]  # what a spec adds to its base comes first
        fields = sorted(msgspec.structs.fields(spec), key=lambda info: own.index(info.name))
        self.fields = {info.encode_name: _field(info) for info in fields}
        self.later = later.KEYS.get(spec.__name__, {})

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The spec, or BAD where one of its keys is."""
        fields = self.read_fields(value, path, reading)
        if fields is BAD:
            return BAD
        missing = [name for name, field in self.fields.items() if field.required and field.attribute not in fields]
        for name in missing:
            if not reading.broken((*path, name)):
                reading.fault(path, f'"{name}" is missing: {self.fields[name].description}')
        return BAD if missing or reading.broken(path) else self.spec(**fields)

    def read_fields(self, value: Any, path: Path, reading: Reading) -> Any:
        """The keys that are in order, typed, by their attributes; BAD where there is no table."""
        raw = table(value, path, reading, self.words)
        if raw is BAD:
            return BAD
        read = {key: self._read_field(key, item, (*path, key), reading) for key, item in raw.items()}
        return {self.fields[key].attribute: item for key, item in read.items() if item is not BAD}

    def schema(self) -> Schema:
        """An object with exactly these keys."""
        schema: Schema = {"type": "object", "additionalProperties": False, "properties": {}}
        for name, field in self.fields.items():
            schema["properties"][name] = {**field.shape.schema(), **_described(field)}
        if required := [name for name, field in self.fields.items() if field.required]:
            schema["required"] = required
        return schema

    def _read_field(self, key: str, value: Any, path: Path, reading: Reading) -> Any:
        if (field := self.fields.get(key)) is not None:
            return field.shape.read(value, path, reading)
        if key in self.later:
            return reading.fault(path, "not supported yet")
        return reading.fault(path, f"unknown key{did_you_mean(key, self.fields)}")


class TableOr(Table[SpecType]):
    """A table that a spec describes, or a bare value in its place.

    Where the spec has a `SHORT`, the value stands for that key; any other is kept as it is.
    """

    def __init__(self, spec: type[SpecType], bare: Shape | None = None) -> None:
        super().__init__(spec)
        self._short = getattr(spec, "SHORT", None)
        self._bare = bare if self._short is None else self.fields[self._short].shape
        self.words = "a table" if self._bare is None else f"{self._bare.words} or a table"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The spec, or the bare value."""
        read = reading.unwrap(value, path)
        if read is BAD or isinstance(read, Mapping):
            return super().read(read, path, reading)
        if self._bare is None:
            return reading.unexpected(path, f"expected {self.words}", value)
        bare = self._bare.read(read, path, reading)
        return bare if bare is BAD or self._short is None else self.spec(**{self._short: bare})

    def schema(self) -> Schema:
        """An object or the bare value, without a union: editors explain those badly."""
        schema = super().schema()
        if self._bare is None:
            return schema
        bare = self._bare.schema()
        return {**schema, **bare, "type": sorted({"object", *bare["type"]})}


class SharedTable(TableOr[SpecType]):
    """The same, or the name of a table in `[limits]`, read as a string."""

    def __init__(self, spec: type[SpecType]) -> None:
        super().__init__(spec)
        short = "" if self._bare is None else f", {self._bare.words}"
        self.words = f"the name of a limit{short} or a table"

    def read(self, value: Any, path: Path, reading: Reading) -> Any:
        """The spec, or the name."""
        read = reading.unwrap(value, path)
        return read if isinstance(read, str) and NAME.fullmatch(read) else super().read(read, path, reading)

    def schema(self) -> Schema:
        """An object, a string or the bare value."""
        schema = super().schema()
        forms = [NAME.pattern, schema["pattern"].strip("^$") if "pattern" in schema else r"\$\{.+\}"]
        kinds = {"string", *([schema["type"]] if isinstance(schema["type"], str) else schema["type"])}
        return {**schema, "type": sorted(kinds), "pattern": f"^({'|'.join(forms)})$"}


def table(value: Any, path: Path, reading: Reading, expected: str = "a table") -> Any:
    """`value` as a mapping with strings for keys, or BAD."""
    read = reading.unwrap(value, path)
    if read is BAD:
        return BAD
    if not isinstance(read, Mapping):
        return reading.unexpected(path, f"expected {expected}", value)
    if any(not isinstance(key, str) for key in read):
        return reading.fault(path, f"expected {expected} whose keys are strings")
    return read


@functools.cache
def table_of(spec: type[SpecType]) -> Table[SpecType]:
    """The table that `spec` describes."""
    return Table(spec)


def shape_of(annotation: Any, bounds: msgspec.Meta = _NO_BOUNDS) -> Shape:
    """The shape that an annotation of a spec's field stands for."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shape_of(arguments[0], arguments[1])
    if origin is Literal:
        return Word(arguments)
    if origin is tuple:
        return ListOf(shape_of(arguments[0]))
    if origin is dict:
        return TableOf(shape_of(arguments[1]))
    if origin in (Union, types.UnionType):
        present = [argument for argument in arguments if argument is not types.NoneType]
        if len(present) == 1:
            return shape_of(present[0], bounds)
        return _either(present[0], present[1], bounds)
    return _plain(annotation, bounds)


def _either(one: Any, other: Any, bounds: msgspec.Meta) -> Shape:
    """The shape of a union of two."""
    if get_origin(one) is Literal:
        return WordOr(get_args(one), shape_of(other, bounds))
    if isinstance(other, type) and issubclass(other, Spec):
        return SharedTable(other) if one is str else TableOr(other, shape_of(one, bounds))
    return CommandLine()


def _plain(kind: Any, bounds: msgspec.Meta) -> Shape:
    if kind is str:
        return Text()
    if kind is bool:
        return Flag()
    if kind in (int, float):
        return Number(kind, bounds)
    if hasattr(kind, "parse"):
        return Parsed(kind, bounds)
    if kind is Paths:
        return OneOrMore()
    if kind is Any:
        return Anything()
    if issubclass(kind, enum.Enum):
        return Word(tuple(member.value for member in kind), kind)
    return TableOr(kind) if hasattr(kind, "SHORT") else table_of(kind)


def _field(info: msgspec.structs.FieldInfo) -> Field:
    meta = info.type.__metadata__[0]
    default = info.default if info.default_factory is msgspec.NODEFAULT else info.default_factory()
    return Field(info.encode_name, info.name, shape_of(info.type), meta.description or "", default, meta.extra or {})


def _bounded(number: Any, bounds: msgspec.Meta, value: Any, path: Path, reading: Reading) -> Any:
    """`number` where it keeps within its bounds, else BAD."""
    for bound, words, kept in (
        (bounds.gt, "more than", bounds.gt is None or number > bounds.gt),
        (bounds.ge, "at least", bounds.ge is None or number >= bounds.ge),
        (bounds.le, "at most", bounds.le is None or number <= bounds.le),
    ):
        if not kept:
            return reading.unexpected(path, f"expected {words} {bound:g}", value)
    return number


def _bounds_schema(bounds: msgspec.Meta) -> Schema:
    found = {"exclusiveMinimum": bounds.gt, "minimum": bounds.ge, "maximum": bounds.le}
    return {word: bound for word, bound in found.items() if bound is not None}


def _described(field: Field) -> Schema:
    schema: Schema = {"description": field.description}
    if isinstance(field.default, (Seconds, FileMode)):
        schema["default"] = written(field.default).strip('"')
    elif isinstance(field.default, enum.Enum):
        schema["default"] = field.default.value
    elif isinstance(field.default, (bool, int, float, str)):
        schema["default"] = field.default
    return schema


def written(value: Any) -> str:
    """A value as TOML writes it; "none" where TOML has no word for it."""
    if value is None or value is msgspec.NODEFAULT:
        return "none"
    if isinstance(value, Seconds):
        return f'"{duration(value)}"'
    if isinstance(value, Bytes):
        return f'"{_size(value)}"'
    if isinstance(value, FileMode):
        return f'"{value:04o}"'
    if isinstance(value, enum.Enum):
        return quoted(value.value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, Spec):
        return written(msgspec.structs.asdict(value))
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {written(item)}' for key, item in value.items())} }}" if value else "{}"
    return quoted(value)


def duration(seconds: float) -> str:
    """A duration as people write it."""
    for unit, length in (("h", 3600), ("m", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g}{unit}"
    return f"{seconds:g}s" if seconds >= 1 or seconds == 0 else f"{seconds * 1000:g}ms"


def _size(size: int) -> str:
    for unit, number in (("MB", 1 << 20), ("KB", 1 << 10)):
        if size >= number and size % number == 0:
            return f"{size // number}{unit}"
    return f"{size}B"
