"""Conversion between command-line words and settings; settings become the command line that repeats a run."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.core.errors import InputError
from regrow.settings.declaration import Declared, declared, options_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def command_line(settings: "DataclassInstance", *more: str) -> str:
    """Return the command line that runs with the given settings; only those that differ from defaults are stated.

    Args:
        settings: A command's settings.
        more: Further words, such as ``--out`` and a folder.
    """
    kind = type(settings)
    stated = [field for field in options_of(kind) if field.required or field.setting.one_of]
    plain = kind(**{field.name: getattr(settings, field.name) for field in stated})
    words = ["regrow", command_of(kind)]
    for field in options_of(kind):
        value = getattr(settings, field.name)
        shown = field in stated or field.setting.shown or value != getattr(plain, field.name)
        if shown and value not in (None, ""):
            words += _words(field, value)
    return shlex.join([*words, *more])


def command_of(kind: type) -> str:
    """Return the name of the command whose settings a dataclass declares: the name of its module."""
    return kind.__module__.rpartition(".")[2]


def _words(field: Declared, value: Any) -> Iterator[str]:
    if field.mapping:
        for name, part in value.items():
            yield from (field.option, f"{name}={part if isinstance(part, str) else json.dumps(part)}")
    elif field.type is bool:
        yield field.option
    else:
        for part in value if field.repeated else (value,):
            yield from (str(part),) if field.setting.argument else (field.option, str(part))


def parse_pairs(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Parse ``NAME=VALUE`` texts; values are JSON where that can be parsed, otherwise text.

    Args:
        pairs: The texts.
        option: The option that takes them, for messages.

    >>> parse_pairs(["form=sequence", "minimum=2", "compensate=false"])
    {'form': 'sequence', 'minimum': 2, 'compensate': False}
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{option} takes NAME=VALUE, got {pair!r}; for example {option} minimum=2")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def build_settings(kind: type[Settings], given: Mapping[str, Any], file: Mapping[str, Any]) -> Settings:
    """Build settings from the command line and a settings file; the command line has precedence.

    Args:
        kind: The dataclass of the command's settings.
        given: Field name → value from the command line.
        file: Field name → value from the file.

    Raises:
        InputError: If a required setting is missing, or several of a group are given of which only one is allowed.
    """
    options = options_of(kind)
    rivals = [field for field in options if field.setting.one_of]
    if any(field.name in given for field in rivals):
        file = {name: value for name, value in file.items() if not declared(kind)[name].setting.one_of}
    values = {**file, **given}
    for field in options:
        if field.mapping:
            values[field.name] = {**file.get(field.name, {}), **given.get(field.name, {})}
        if field.required and not values.get(field.name):
            example = field.example if field.setting.argument else f"… {field.example}"
            raise InputError(f"{field.option} is missing; for example `regrow {command_of(kind)} {example}`")
    if rivals and sum(field.name in values for field in rivals) != 1:
        *others, last = (field.example for field in rivals)
        raise InputError(f"say {rivals[0].setting.one_of}, by one of {', '.join(others)} or {last}")
    return kind(**values)
