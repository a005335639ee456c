"""Settings as words of the command line."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.core.errors import InputError
from regrow.settings.declaration import DeclaredSetting, list_options

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")


def format_command_line(settings: "DataclassInstance", *further: str) -> str:
    """Return the shell command, quoted, that runs with settings; ``further`` words are appended.

    Settings that have their default are left out, but for required ones, those of which one must be given, and those
    that are ``always_shown``.
    """
    settings_class = type(settings)
    options = list_options(settings_class)
    stated = [field for field in options if field.is_required or field.setting.exclusive_group]
    defaults = settings_class(**{field.name: getattr(settings, field.name) for field in stated})
    words = ["regrow", command_name(settings_class)]
    for field in options:
        value = getattr(settings, field.name)
        is_shown = field in stated or field.setting.always_shown or value != getattr(defaults, field.name)
        if is_shown and value not in (None, ""):
            words += _words(field, value)
    return shlex.join([*words, *further])


def command_name(settings_class: type) -> str:
    """Return the command, such as ``"prune"``, whose settings a dataclass declares: the name of its module."""
    return settings_class.__module__.rpartition(".")[2]


def _words(field: DeclaredSetting, value: Any) -> Iterator[str]:
    """Yield the unquoted words that give a setting its value: ``--source news``, repeated for each value of several."""
    if field.is_mapping:
        for name, part in value.items():
            yield from (field.option, f"{name}={part if isinstance(part, str) else json.dumps(part)}")
    elif field.type is bool:
        yield field.option if value or field.default is not None else f"--{field.negated}"
    else:
        for part in value if field.is_repeated else (value,):
            yield from (str(part),) if field.setting.argument else (field.option, str(part))


def parse_pairs(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Return name → value of ``NAME=VALUE`` texts: JSON where that can be parsed, otherwise text.

    Of equal names the last counts. Raise InputError, which names ``option``, for a text without ``=``.

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


def build_settings(settings_class: type[Settings], stated: Mapping[str, Any], recorded: Mapping[str, Any]) -> Settings:
    """Build settings from field name → value as a command line states them and as an earlier run has them.

    ``stated`` has precedence; mappings are merged; ``recorded`` is empty without an earlier run. Raises InputError for
    a missing setting, for several of a group of which one must be given, and (without an earlier run) for none of it.
    """
    options = list_options(settings_class)
    rivals = [field for field in options if field.setting.exclusive_group]
    count = sum(field.name in stated for field in rivals)
    if count > 1 or (rivals and not count and not recorded):
        *others, last = (field.example for field in rivals)
        raise InputError(f"say {rivals[0].setting.exclusive_group}, by one of {', '.join(others)} or {last}")
    if count:
        names = {field.name for field in rivals}
        recorded = {name: value for name, value in recorded.items() if name not in names}
    values = {**recorded, **stated}
    for field in options:
        if field.is_mapping:
            values[field.name] = {**recorded.get(field.name, {}), **stated.get(field.name, {})}
        if field.is_required and not values.get(field.name):
            example = field.example if field.setting.argument else f"… {field.example}"
            name = command_name(settings_class)
            raise InputError(f"{field.option} is missing; for example `regrow {name} {example}`")
    return settings_class(**values)
