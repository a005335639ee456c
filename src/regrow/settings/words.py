"""Settings as words of the command line."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.core.errors import InputError
from regrow.settings.declaration import Declared, declared, options_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def command_line(settings: "DataclassInstance", *further: str) -> str:
    """Return the command line that runs with settings, and further words; only what differs from defaults is stated."""
    kind = type(settings)
    stated = [field for field in options_of(kind) if field.required or field.setting.one_of]
    plain = kind(**{field.name: getattr(settings, field.name) for field in stated})
    words = ["regrow", command_of(kind)]
    for field in options_of(kind):
        value = getattr(settings, field.name)
        shown = field in stated or field.setting.shown or value != getattr(plain, field.name)
        if shown and value not in (None, ""):
            words += _words(field, value)
    return shlex.join([*words, *further])


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
    """Parse ``NAME=VALUE`` texts of an option; values are JSON where that can be parsed, otherwise text.

    >>> parse_pairs(["allocation=ranked", "seed=2", "compensate=false"])
    {'allocation': 'ranked', 'seed': 2, 'compensate': False}
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"{option} takes NAME=VALUE, got {pair!r}; for example {option} seed=2")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def build_settings(kind: type[Settings], words: Mapping[str, Any], recorded: Mapping[str, Any]) -> Settings:
    """Build settings from field values of the command line and of an earlier run; the command line has precedence."""
    options = options_of(kind)
    rivals = [field for field in options if field.setting.one_of]
    stated = sum(field.name in words for field in rivals)
    if stated > 1 or (rivals and not stated and not recorded):
        *others, last = (field.example for field in rivals)
        raise InputError(f"say {rivals[0].setting.one_of}, by one of {', '.join(others)} or {last}")
    if stated:
        recorded = {name: value for name, value in recorded.items() if not declared(kind)[name].setting.one_of}
    values = {**recorded, **words}
    for field in options:
        if field.mapping:
            values[field.name] = {**recorded.get(field.name, {}), **words.get(field.name, {})}
        if field.required and not values.get(field.name):
            example = field.example if field.setting.argument else f"… {field.example}"
            raise InputError(f"{field.option} is missing; for example `regrow {command_of(kind)} {example}`")
    return kind(**values)
