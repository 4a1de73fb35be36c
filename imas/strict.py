"""Reading YAML into frozen dataclasses, strictly: every mistake is found, placed and explained, all at once.

The reader knows nothing of experiments. What a section may contain is written at its dataclass: types, and in the
field's metadata (see ``option``) allowed values, former names and what they mean today.

More than 300 lines, since a third are the words in which mistakes are explained, and those belong beside the checks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

_NO_MEMORY = (
    "the GPU is out of memory. trainer.amp: bf16, trainer.checkpoint_encoder: true, or a smaller "
    "dataset.train.batch_size with a larger trainer.accumulate need less"
)
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


class UserError(Exception):
    """Something that the person at the keyboard can mend: one message, no traceback, an exit status."""

    status = 2


def run_script(main: Callable[[], None]) -> None:
    """Call a script's ``main``; a ``UserError``, a disk that takes no more or a GPU without memory becomes a message
    on stderr and an exit status.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"error: {error.filename or 'the output folder'}: cannot be written ({error.strerror})", file=sys.stderr)
        sys.exit(UserError.status)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which this file does without
            raise
        print(f"error: {_NO_MEMORY} ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(UserError.status)


class Together:
    """Several checks whose mistakes come as one ``UserError``: ``together(check, argument)`` gives what ``check`` does,
    or None where it failed.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __call__(self, check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except UserError as error:
            self.errors.append(str(error))
            return None

    def finish(self) -> None:
        """Raise what was found, if anything."""
        if self.errors:
            raise UserError("\n".join(self.errors))


class ConfigError(UserError, ValueError):
    """Everything that is wrong with a configuration, one line each."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    check: tuple[Callable[[Any], bool], str] | None = None,
    convert: Callable[[Any], Any] | None = None,
    spelling: Callable[[Any], Any] | None = None,
    old: str | None = None,
    old_value: Callable[[Any], Any] | None = None,
) -> Any:
    """A dataclass field with rules for the reader.

    Args:
        check: (predicate, what is expected in words), asked of a value of the right type.
        convert: applied to the raw value first: a shorter form of the same thing.
        spelling: likewise, for former spellings of a value; what it changes is reported as translated.
        old: a former name of this key.
        old_value: turns the former key's value into this key's.
    """
    metadata = {"check": check, "convert": convert, "spelling": spelling, "old": old, "old_value": old_value}
    if isinstance(default, type) and dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


BAD = object()  # stands in a section for a value that could not be read: nothing can be asked of it


class Reader:
    """Collects errors and translations while sections are read.

    Args:
        source: what to call the input in messages, usually the file.

    ``lines`` holds the line of each dotted key, where known.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: dict[str, int] = {}
        self.overrides: set[str] = set()  # dotted keys that win over the file
        self.errors: dict[str, str] = {}  # by dotted key
        self.translated: list[str] = []

    def override(self, key: str) -> None:
        """From now on this key's value is none of the source's."""
        self.overrides.add(key)
        self.lines.pop(key, None)

    def error(self, key: str, message: str, line: int | None = None) -> None:
        """Note what is wrong with a key, unless something is known to be wrong with it already."""
        line = line or self.lines.get(key)
        where = self.source if line is None else f"{self.source}:{line}"
        self.errors.setdefault(key, f"{where}: {key or 'top level'}: {message}")

    def finish(self) -> None:
        """Raise ``ConfigError`` with all errors found, if any."""
        if self.errors:
            count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
            lines = (f"  {error}" for error in self.errors.values())
            raise ConfigError("\n".join([f"{count} in the configuration:", *lines]))

    def section(self, kind: type, raw: Any, path: str = "") -> Any:
        """Read a mapping into the dataclass ``kind``; what could not be read is ``BAD`` in it."""
        if raw is None:
            raw = {}
        if not isinstance(raw, dict):
            self.error(path, f"expected a section (key: value lines), got {_show(raw)}")
            return BAD
        fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
        hints = typing.get_type_hints(kind)
        values: dict[str, Any] = {}
        for key, value in raw.items():
            here = f"{path}.{key}" if path else str(key)
            field = fields.get(key)
            if field is None:
                field, value = self._other_key(kind, fields, raw, key, here)
            if field is not None:
                values[field.name] = self._value(field, hints[field.name], value, here)
        for field in fields.values():
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in values:
                here = f"{path}.{field.name}" if path else field.name
                self.error(here, f"missing; expected {_words(hints[field.name])}")
                values[field.name] = BAD
        return kind(**values)

    def _other_key(
        self, kind: type, fields: dict[str, dataclasses.Field], raw: dict, key: Any, here: str
    ) -> tuple[dataclasses.Field | None, Any]:
        """A key that names no field: the field whose former name it is, with today's value; else None."""
        value = raw[key]
        former = {field.metadata["old"]: field for field in fields.values() if field.metadata.get("old")}
        meaningless = getattr(kind, "MEANINGLESS", {})
        if key in former:
            return self._former(former[key], raw, value, here)
        if key in meaningless:
            if meaningless[key] is not None and value not in meaningless[key]:
                allowed = " or ".join(map(_show, meaningless[key]))
                self.error(here, f"only {allowed} is supported, got {_show(value)}")
            else:
                self.translated.append(f"{here}: means nothing any more")
        else:
            near = difflib.get_close_matches(str(key), [*fields, *former], n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sorted(fields))}"
            self.error(here, f"unknown key{hint}")
        return None, None

    def _former(
        self, field: dataclasses.Field, raw: dict, value: Any, here: str
    ) -> tuple[dataclasses.Field | None, Any]:
        """A field that was found by its former name, and its value as it is spelt today."""
        parent = here.rpartition(".")[0]
        if (f"{parent}.{field.name}" if parent else field.name) in self.overrides:
            return None, None
        if field.name in raw and here not in self.overrides:
            self.error(here, f"this is the former name of {field.name}, which is set as well: keep one")
            return None, None
        if field.metadata["old_value"] is not None:
            try:
                value = field.metadata["old_value"](value)
            except (KeyError, TypeError, ValueError):
                self.error(here, f"{_show(value)} is not a value that this former key could have")
                return None, None
        self.translated.append(f"{here} → {field.name}: {_show(value)}")
        return field, value

    def _value(self, field: dataclasses.Field, hint: Any, raw: Any, path: str) -> Any:
        check, convert, spelling = (field.metadata.get(rule) for rule in ("check", "convert", "spelling"))
        if convert is not None:
            raw = convert(raw)
        if spelling is not None and spelling(raw) != raw:
            self.translated.append(f"{path}: {raw} → {spelling(raw)}")
            raw = spelling(raw)
        try:
            value = self._typed(hint, raw, path)
        except TypeError:
            self.error(path, f"expected {check[1] if check else _words(hint)}, got {_show(raw)}")
            return BAD
        if value is not None and check is not None and not check[0](value):
            self.error(path, f"expected {check[1]}, got {_show(raw)}")
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

    A key that stands twice (YAML would silently keep the last) is an error of the reader.

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
            reader.error(dotted, f"this key stands twice, first in line {reader.lines[dotted]}", line)
            continue
        reader.lines[dotted] = line
        _note_lines(value, dotted, reader)


def apply_overrides(raw: dict, overrides: Iterable[str]) -> dict:
    """``dotted.key=value`` words set into a copy of a raw configuration, values typed as YAML types them."""
    result = _copied(raw)
    for word in overrides:
        dotted, equals, text = word.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override {word!r}: expected dotted.key=value, for example trainer.epochs=10")
        try:
            value = yaml.safe_load(text)
        except _UNLOADABLE as error:
            raise ConfigError(f"override {word!r}: the value is not YAML: {error}") from None
        *parents, last = dotted.split(".")
        section = result
        for parent in parents:
            if section.get(parent) is None:
                section[parent] = {}
            section = section[parent]
            if not isinstance(section, dict):
                raise ConfigError(f"override {word!r}: {parent} is not a section")
        section[last] = value
    return result


def to_plain(value: Any) -> Any:
    """A section as nested dicts and lists that YAML can write and ``Reader.section`` reads back."""
    if dataclasses.is_dataclass(value):
        fields = (field for field in dataclasses.fields(value) if field.init)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _copied(raw: Any) -> Any:
    return {key: _copied(value) for key, value in raw.items()} if isinstance(raw, dict) else raw


def _show(value: Any) -> str:
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
