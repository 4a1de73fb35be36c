"""Reading YAML into frozen dataclasses, strictly: every mistake is found, placed and explained, all at once.

The reader knows nothing of experiments. The rules of a section are written at its dataclass: types, and in the field's
metadata (see ``option``) the allowed values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def option(
    default: Any = dataclasses.MISSING,
    *,
    check: tuple[Callable[[Any], bool], str] | None = None,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with rules for the reader.

    Args:
        check: (predicate, what is expected in words), asked of a value of the right type.
        convert: applied to the raw value first: a shorter form of the same thing.
    """
    metadata = {"check": check, "convert": convert}
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def derived(default: Any, compare: bool = True) -> Any:
    """A dataclass field that no file sets: the program fills it in."""
    return dataclasses.field(default=default, compare=compare, metadata={"derived": True})


def keys_of(kind: Any) -> dict[str, dataclasses.Field]:
    """The fields of a section that a file may set, by name."""
    return {field.name: field for field in dataclasses.fields(kind) if not field.metadata.get("derived")}


MISSING = object()  # the value of a key that is not there


class _Bad:
    """The value of a key that could not be read: what is asked of it, and what would print it, is a TypeError."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("a value that could not be read")

    __eq__ = __hash__ = __bool__ = __repr__ = _refuse


BAD = _Bad()


class Reader:
    """Collects errors while sections are read.

    Args:
        source: what to call the input in messages, usually the file.

    ``lines`` holds the line of each dotted key, where known; ``written`` holds how the user wrote a key that goes by
    another name today, and ``former`` the former names within a section; ``overridden`` holds the keys and sections
    that the command line brings.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[str, int] = {}
        self.written: dict[str, str] = {}
        self.former: dict[str, list[str]] = {}
        self.overridden: set[str] = set()
        self.errors: dict[str, str] = {}  # by dotted key

    def error(self, key: str, message: str, line: int | None = None) -> None:
        """Note what is wrong with a key, unless something is known to be wrong with it already."""
        line = line or self.lines.get(key)
        where = self.source if line is None else f"{self.source}:{line}"
        where = "--set" if any(f"{key}.".startswith(f"{each}.") for each in self.overridden) else where
        self.errors.setdefault(key, f"{where}: {self.written.get(key, key) or 'top level'}: {message}")

    def finish(self) -> None:
        """Raise ``ConfigError`` with all errors found, if any."""
        if self.errors:
            count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
            lines = (f"  {error}" for error in self.errors.values())
            raise ConfigError("\n".join([f"{count} in the configuration:", *lines]))

    def section(self, kind: type, raw: Any, path: str = "") -> Any:
        """Read a mapping into the dataclass ``kind``; a value that could not be read is ``BAD`` in it."""
        if raw is None:
            raw = {}
        if not isinstance(raw, dict):
            self.error(path, f"expected a section (key: value lines), got {show(raw)}")
            return BAD
        fields, hints = keys_of(kind), typing.get_type_hints(kind)
        values: dict[str, Any] = {}
        for key, value in raw.items():
            here = f"{path}.{key}" if path else str(key)
            if key in fields:
                values[key] = self._value(fields[key], hints[key], value, here)
            else:
                self.unknown(here, str(key), [*fields, *self.former.get(path, ())])
        for field in fields.values():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                here = f"{path}.{field.name}" if path else field.name
                self.error(here, f"missing; expected {_words(hints[field.name])}")
                values[field.name] = BAD
        return kind(**values)

    def unknown(self, here: str, key: str, known: Iterable[str], more: str = "") -> None:
        """Note a key that does not exist, with the nearest one that does, and with ``more``."""
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(sorted(known)) or 'no key'}"
        self.error(here, f"unknown key; {hint}{more}")

    def _value(self, field: dataclasses.Field, hint: Any, raw: Any, path: str) -> Any:
        check, convert = field.metadata.get("check"), field.metadata.get("convert")
        if convert is not None:
            raw = convert(raw)
        try:
            value = self._typed(hint, raw, path)
        except TypeError:
            items = raw if isinstance(raw, list) else [raw]
            quotes = any(isinstance(item, bool | int | float) for item in items) and "a text" in _words(hint)
            more = "; words such as no, yes and off, and numbers, want quotes to be texts" if quotes else ""
            self.error(path, f"expected {check[1] if check else _words(hint)}, got {show(raw)}{more}")
            return BAD
        if value is not None and check is not None and not check[0](value):
            self.error(path, f"expected {check[1]}, got {show(raw)}")
            return BAD
        return value

    def _typed(self, hint: Any, raw: Any, path: str) -> Any:
        """``raw`` as a value of the type ``hint``; TypeError where it is none."""
        origin = typing.get_origin(hint)
        if origin in (types.UnionType, typing.Union):
            options = typing.get_args(hint)
            if raw is None and type(None) in options:
                return None
            for option_hint in options:
                try:
                    return self._typed(option_hint, raw, path)
                except TypeError:
                    continue
        elif dataclasses.is_dataclass(hint):
            return self.section(hint, raw, path)
        elif origin is typing.Literal:
            if any(raw == allowed and type(raw) is type(allowed) for allowed in typing.get_args(hint)):
                return raw
        elif origin is tuple and isinstance(raw, list | tuple):
            hints = typing.get_args(hint)
            if len(hints) == 2 and hints[1] is Ellipsis:
                hints = (hints[0],) * len(raw)
            if len(hints) == len(raw):
                return tuple(self._typed(item_hint, item, path) for item_hint, item in zip(hints, raw))
        elif hint is float and isinstance(raw, int | float | str) and not isinstance(raw, bool):
            with contextlib.suppress(ValueError, OverflowError):
                value = float(raw)  # YAML 1.1 reads 1e-4 as a string
                if math.isfinite(value):
                    return value
        elif hint in (bool, int, str) and type(raw) is hint:
            return raw
        raise TypeError


# What PyYAML raises for content that its safe loader cannot make: an impossible date, a wrong tag, an endless alias.
_UNLOADABLE = (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError)


def read_yaml(path: Path) -> tuple[Any, Reader]:
    """The content of a YAML file, by the safe loader, and a reader that knows its lines.

    A repeated key, of which YAML would silently keep the last value, is an error of the reader.

    Raises:
        ConfigError: a file that is missing or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise ConfigError(f"{path}: cannot read the configuration file: {reason}") from None
    reader = Reader(str(path))
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _note_lines(node, "", reader)
        content = yaml.safe_load(text)
    except _UNLOADABLE as error:
        raise ConfigError(f"{path}: not a YAML file that can be loaded safely: {error}") from None
    return content, reader


def _note_lines(node: yaml.Node, prefix: str, reader: Reader) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        dotted = f"{prefix}.{key.value}" if prefix else str(key.value)
        line = key.start_mark.line + 1
        if dotted in reader.lines:
            reader.error(dotted, f"this key is given twice, first in line {reader.lines[dotted]}", line)
            continue
        reader.lines[dotted] = line
        _note_lines(value, dotted, reader)


def get(raw: dict[str, Any], key: str) -> Any:
    """The value of a dotted key, ``MISSING`` without it."""
    for name in key.split("."):
        if not isinstance(raw, dict) or name not in raw:
            return MISSING
        raw = raw[name]
    return raw


def put(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the sections that it needs. ValueError where a section is something else."""
    *parents, last = key.split(".")
    for name in parents:
        if raw.get(name) is None:
            raw[name] = {}
        raw = raw[name]
        if not isinstance(raw, dict):
            raise ValueError(f"{name} is not a section")
    raw[last] = value


def parse_override(word: str) -> tuple[str, Any]:
    """``dotted.key=value`` → the key and its value, typed as YAML types it.

    Raises:
        ConfigError: another form, or a value that is not YAML.
    """
    dotted, equals, text = word.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {word}: expected dotted.key=value, for example trainer.epochs=10")
    try:
        return dotted, yaml.safe_load(text)
    except _UNLOADABLE as error:
        raise ConfigError(f"--set {word}: the value is not YAML: {error}") from None


def to_plain(value: Any) -> Any:
    """A section as nested dicts and lists that YAML can write and ``Reader.section`` reads back."""
    if dataclasses.is_dataclass(value):
        return {name: to_plain(getattr(value, name)) for name in keys_of(value)}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def replaced(section: Any, values: dict[str, Any]) -> Any:
    """A copy of a section with other values, by dotted key."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        value = replaced(getattr(section, name), {rest: value}) if rest else value
        section = dataclasses.replace(section, **{name: value})
    return section


def dotted(section: dict, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def show(value: Any) -> str:
    """A raw value for a message, cut to 80 characters."""
    text = "null" if value is None else repr(value)
    return f"{text[:77]}..." if len(text) > 80 else text


def _words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if option is type(None) else _words(option) for option in arguments)
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a list, each {_words(arguments[0])}"
        return f"a list of {len(arguments)}, each {_words(arguments[0])}"
    if dataclasses.is_dataclass(hint):
        return "a section (key: value lines)"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[hint]
