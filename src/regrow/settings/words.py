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
    stated = [one for one in options_of(kind) if one.required or one.setting.one_of]
    plain = kind(**{one.name: getattr(settings, one.name) for one in stated})
    words = ["regrow", command_of(kind)]
    for one in options_of(kind):
        value = getattr(settings, one.name)
        if value in (None, ""):
            continue
        if one in stated or one.setting.shown or value != getattr(plain, one.name):
            words += _words(one, value)
    return shlex.join([*words, *more])


def command_of(kind: type) -> str:
    """Return the name of the command whose settings a dataclass declares: the name of its module.

    Args:
        kind: The dataclass of the settings.
    """
    return kind.__module__.rpartition(".")[2]


def _words(field: Declared, value: Any) -> Iterator[str]:
    if field.mapping:
        yield from set_words(value, field.option)
    elif field.type is bool:
        yield field.option
    else:
        for one in value if field.repeated else (value,):
            yield from (str(one),) if field.setting.argument else (field.option, str(one))


def set_words(settings: Mapping[str, object], option: str = "--set") -> list[str]:
    """Return the settings of a method as command-line words, ``--set NAME=VALUE``.

    Args:
        settings: Setting name → value.
        option: The option that takes them.

    >>> set_words({"use_task_id": True, "levels": ("operations", "weights"), "gate": "hard"})
    ['--set', 'use_task_id=true', '--set', 'levels=["operations", "weights"]', '--set', 'gate=hard']
    """
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return [word for name, value in texts.items() for word in (option, f"{name}={value}")]


def parse_pairs(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Parse ``NAME=VALUE`` texts; values are JSON where that can be parsed, otherwise text.

    Args:
        pairs: The texts.
        option: The option that takes them, for messages.

    >>> parse_pairs(["form=sequence", "minimum=2", "compensate=false"])
    {'form': 'sequence', 'minimum': 2, 'compensate': False}

    Raises:
        InputError: If a text has no equals sign.
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
    rivals = [one for one in options if one.setting.one_of]
    if any(one.name in given for one in rivals):
        file = {name: value for name, value in file.items() if not declared(kind)[name].setting.one_of}
    values = {**file, **given}
    for one in options:
        if one.mapping:
            values[one.name] = {**file.get(one.name, {}), **given.get(one.name, {})}
        if one.required and not values.get(one.name):
            example = one.example if one.setting.argument else f"… {one.example}"
            raise InputError(f"{one.option} is missing; for example `regrow {command_of(kind)} {example}`")
    if rivals and sum(one.name in values for one in rivals) != 1:
        *others, last = (one.example for one in rivals)
        raise InputError(f"say {rivals[0].setting.one_of}, by one of {', '.join(others)} or {last}")
    return kind(**values)
