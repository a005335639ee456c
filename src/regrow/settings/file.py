"""Settings files in TOML or YAML: read and write a command's settings; only the command line may name code."""

import difflib
import json
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.core.errors import InputError
from regrow.core.limits import read_text, reason
from regrow.core.names import names_code
from regrow.settings.declaration import Declared, options_of
from regrow.settings.words import command_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

MAX_BYTES = 2**20
"""The largest size of a settings file, in bytes."""
MAX_DEPTH = 64
"""How deep the values of a YAML file may be nested: its parser takes time that grows with the square of it."""
TOML, YAML = (".toml",), (".yaml", ".yml")


def read_settings(path: Path, kind: "type[DataclassInstance]", elsewhere: Collection[str] = ()) -> dict[str, Any]:
    """Read a settings file, and return the values that it gives by field name.

    Args:
        path: The file; its suffix decides between TOML and YAML.
        kind: The dataclass of the command's settings.
        elsewhere: Options of the command that are allowed on the command line only, such as ``--out``.

    Raises:
        InputError: If the file cannot be read or is too large, or a setting is unknown, names code, or is not allowed.
    """
    fields = {field.key: field for field in options_of(kind)}
    settings: dict[str, Any] = {}
    for name, value in _parse_file(path).items():
        if (field := fields.get(str(name).replace("-", "_"))) is None:
            raise InputError(f"{path}: {_explain_unknown(str(name), fields, elsewhere, command_of(kind))}")
        settings[field.name] = _checked(path, field, value)
    return settings


def _key(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _explain_unknown(name: str, known: Collection[str], elsewhere: Collection[str], command: str) -> str:
    if _key(name) in map(_key, elsewhere):
        return f"{name} is given on the command line only; leave it out of the file"
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else f"see `regrow {command} --help`"
    return f"{name!r:.60} is no setting of `regrow {command}`; {remedy}"


def _checked(path: Path, field: Declared, value: Any) -> Any:
    """Check a value of a file, and convert it to the field's type."""
    try:
        if field.type is float and isinstance(value, str):
            return field.parse(value)  # YAML takes 1e-3 for a text
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
    if field.type is bool and field.default:  # its option turns it off
        return not value
    return value


def _parse_file(path: Path) -> Mapping[str, Any]:
    """Return the names and values that a TOML or YAML file holds."""
    suffix = path.suffix.lower()
    if suffix not in (*TOML, *YAML):
        raise InputError(f"{path}: a settings file is TOML (.toml) or YAML (.yaml, .yml); rename it, or give another")
    text = read_text(path, MAX_BYTES)
    try:
        values = tomllib.loads(text) if suffix in TOML else _parse_yaml(text)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not {suffix[1:].upper()} ({reason(error)}); correct it") from None
    if not isinstance(values, dict):
        sign = " =" if suffix in TOML else ":"
        raise InputError(f"{path} holds no names with values; write lines like seed{sign} 1")
    return values


def _parse_yaml(text: str) -> Any:
    import yaml

    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError("aliases (*name) are not read; write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise InputError(f"values are nested more than {MAX_DEPTH} deep; write them flat")
        _check_names(yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _check_names(node: Any) -> None:
    """Raise InputError if a mapping of a YAML document has a name twice."""
    pairs = node.value if node is not None and node.id == "mapping" else ()
    names = [str(name.value) for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{twice!r:.60} is given twice; leave one out")
    for _, value in pairs:
        _check_names(value)


def format_settings(settings: "DataclassInstance", suffix: str) -> str:
    """Return settings as the text of a settings file, without those that :func:`left_out` returns.

    Args:
        settings: A command's settings.
        suffix: The format: ``.toml``, ``.yaml`` or ``.yml``.

    Raises:
        InputError: If the suffix is another, or TOML cannot hold a value.
    """
    kind = type(settings)
    values = {}
    for field in options_of(kind):
        value = getattr(settings, field.name)
        if field.type is bool:
            value = value != field.default or None
        if value not in (None, "", (), {}) and not _is_left_out(field, value):
            values[field.key] = value
    values = json.loads(json.dumps(values))
    head = f"# Settings for `regrow {command_of(kind)} --config FILE`; options on the command line override them.\n"
    if suffix in YAML:
        import yaml

        return head + str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=10**6))
    if suffix not in TOML:
        raise InputError(f"a settings file ends in .toml, .yaml or .yml, got {suffix!r}; rename it")
    import tomli_w

    try:
        return head + tomli_w.dumps(values)
    except TypeError:
        raise InputError("a setting of the method is null, which TOML cannot hold; write a .yaml file") from None


def left_out(settings: "DataclassInstance") -> list[str]:
    """Return the command-line words that a settings file cannot hold: names of code, and the folder of a run."""
    words = []
    for field in options_of(type(settings)):
        if _is_left_out(field, value := getattr(settings, field.name)):
            words += [value] if field.setting.argument else [field.option, value]
    return words


def _is_left_out(field: Declared, value: Any) -> bool:
    return (field.setting.code and names_code(value)) or (field.setting.argument and field.setting.path)
