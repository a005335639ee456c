"""Settings as text: words of the command line, and settings files in TOML; only the command line may name code."""

import difflib
import json
import shlex
import tomllib
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from regrow.core.errors import InputError
from regrow.core.limits import read_text, reason
from regrow.core.names import names_code
from regrow.settings.declaration import Declared, declared, options_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")
MAX_BYTES = 2**20
"""The largest size of a settings file, in bytes."""


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


def build_settings(kind: type[Settings], words: Mapping[str, Any], file: Mapping[str, Any]) -> Settings:
    """Build settings from field values of the command line and of a settings file; the command line has precedence."""
    options = options_of(kind)
    rivals = [field for field in options if field.setting.one_of]
    if any(field.name in words for field in rivals):
        file = {name: value for name, value in file.items() if not declared(kind)[name].setting.one_of}
    values = {**file, **words}
    for field in options:
        if field.mapping:
            values[field.name] = {**file.get(field.name, {}), **words.get(field.name, {})}
        if field.required and not values.get(field.name):
            example = field.example if field.setting.argument else f"… {field.example}"
            raise InputError(f"{field.option} is missing; for example `regrow {command_of(kind)} {example}`")
    if rivals and sum(field.name in values for field in rivals) != 1:
        *others, last = (field.example for field in rivals)
        raise InputError(f"say {rivals[0].setting.one_of}, by one of {', '.join(others)} or {last}")
    return kind(**values)


def read_settings(path: Path, kind: "type[DataclassInstance]", elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """Read a TOML file of settings, and return the values that it gives by field name.

    ``elsewhere`` are options of the command that are allowed on the command line only, such as ``--out``.
    """
    fields = {field.key: field for field in options_of(kind)}
    settings: dict[str, Any] = {}
    if path.suffix.lower() != ".toml":
        raise InputError(f"{path}: a settings file is TOML (.toml); rename it, or give another")
    try:
        values = tomllib.loads(read_text(path, MAX_BYTES))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML ({reason(error)}); correct it") from None
    for name, value in values.items():
        if (field := fields.get(name.replace("-", "_"))) is None:
            raise InputError(f"{path}: {_explain_unknown(name, fields, elsewhere, command_of(kind))}")
        settings[field.name] = _checked(path, field, value)
    return settings


def _explain_unknown(name: str, known: Collection[str], elsewhere: Collection[str], command: str) -> str:
    if name.replace("-", "_") in (option.removeprefix("--").replace("-", "_") for option in elsewhere):
        return f"{name} is given on the command line only; leave it out of the file"
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"see `regrow {command} --help`"
    return f"{name!r:.60} is no setting of `regrow {command}`; {remedy}"


def _checked(path: Path, field: Declared, value: Any) -> Any:
    """Check a value of a file, and convert it to the field's type."""
    try:
        if field.type is float and isinstance(value, str):
            return field.parse(value)
        if field.repeated and isinstance(value, list | str):
            value = (value,) if isinstance(value, str) else tuple(value)
        field.check(value)
        if field.mapping:
            json.dumps(value, allow_nan=False)  # which run.json must hold
    except InputError as error:
        raise InputError(f"{path}: {str(error).replace(field.option, field.key, 1)}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: {field.key} holds what JSON cannot ({reason(error)}); correct it") from None
    if field.setting.code and names_code(value):
        word = value if field.setting.argument else f"{field.option} {value}"
        raise InputError(
            f"{path}: {field.key} is {value!r:.80}, which names code, and only the command line names code; leave it "
            f"out of the file, and add {word} to the command if you trust it"
        )
    return not value if field.type is bool and field.default else value  # the option of a default turns it off


def format_settings(settings: "DataclassInstance") -> str:
    """Return settings as the text of a settings file, without those that :func:`left_out` returns."""
    import tomli_w

    kind = type(settings)
    values = {}
    for field in options_of(kind):
        value = getattr(settings, field.name)
        if field.type is bool:
            value = value != field.default or None
        if value not in (None, "", (), {}) and not _is_left_out(field, value):
            values[field.key] = value
    head = f"# Settings for `regrow {command_of(kind)} --config FILE`; options on the command line override them.\n"
    try:
        return head + tomli_w.dumps(json.loads(json.dumps(values)))
    except TypeError:
        raise InputError("a setting of the method is null, which TOML cannot hold; leave it out, or set it") from None


def left_out(settings: "DataclassInstance") -> list[str]:
    """Return the command-line words that a settings file cannot hold: names of code, and the folder of a run."""
    words = []
    for field in options_of(type(settings)):
        if _is_left_out(field, value := getattr(settings, field.name)):
            words += [value] if field.setting.argument else [field.option, value]
    return words


def _is_left_out(field: Declared, value: Any) -> bool:
    return (field.setting.code and names_code(value)) or (field.setting.argument and field.setting.path)
