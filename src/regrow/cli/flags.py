"""The command-line options of a command, derived from the declaration of its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click
from click.core import ParameterSource

from regrow.cli.options import PATH, Decorator
from regrow.core.errors import InputError
from regrow.settings import prune
from regrow.settings.declaration import Declared, declared, options_of
from regrow.settings.words import build_settings, parse_pairs, read_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CONFIG = "TOML file of settings, named like the options; options on the command line take precedence."
_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}

Settings = TypeVar("Settings", bound="DataclassInstance")


class _Value(click.ParamType):
    """The type of an option's value: parses and checks it by the setting's declaration."""

    name = "value"

    def __init__(self, field: Declared) -> None:
        self.field = field

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Convert the text of a value, or raise UsageError, which names the allowed ones."""
        if self.field.mapping or not isinstance(value, str):  # pairs are parsed together
            return value
        try:
            return str(PATH.convert(value, param, ctx)) if self.field.setting.path else self.field.parse(value)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from None


class Position(click.Argument):
    """A positional argument with a help text; ``attributes`` are those of ``click.Argument``."""

    def __init__(self, words: list[str], *, help: str, **attributes: Any) -> None:
        super().__init__(words, **attributes)
        self.text = help


class Flag(click.Option):
    """An option that is listed under a heading of ``--help``; ``attributes`` are those of ``click.Option``."""

    def __init__(self, words: list[str], *, heading: str = "", **attributes: Any) -> None:
        super().__init__(words, **attributes)
        self.heading = heading or "Options"


@dataclass(frozen=True)
class Given(Generic[Settings]):
    """The settings stated on a command line, with the settings file that gives others.

    Args:
        kind: The dataclass of the command's settings.
        values: Field name → value.
        options: The options as they were typed: ``--epochs``.
        file: The settings file of ``--config``, or ``None``.
        elsewhere: Options of the command that are not settings, such as ``--out``; a file must not give them.
        varied: Field name → its values, for options that were given with several.
    """

    kind: type[Settings]
    values: Mapping[str, object]
    options: tuple[str, ...]
    file: Path | None
    elsewhere: tuple[str, ...]
    varied: Mapping[str, tuple[object, ...]]

    def build_all(self) -> list[Settings]:
        """Build the settings of each run, where options with several values name several runs."""
        for name, values in self.varied.items():
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise InputError(f"{declared(self.kind)[name].option} {twice} is there twice; leave one out")
        rows = product(*([(name, value) for value in values] for name, values in self.varied.items()))
        return [replace(self, values={**self.values, **dict(row)}, varied={}).build() for row in rows]

    def build(self) -> Settings:
        """Build the settings of the command from the command line and the settings file, and check them."""
        file = read_settings(self.file, self.kind, self.elsewhere) if self.file else {}
        return build_settings(self.kind, self.values, file)


def option_of(kind: type["DataclassInstance"], name: str) -> Decorator:
    """Return the decorator that adds the option of one setting to a command without settings of its own."""
    field = declared(kind)[name]
    return click.option(field.option, name, cls=Flag, **_attributes(field))


def parameters_of(kind: type["DataclassInstance"]) -> list[click.Parameter]:
    """Return the click parameters by which a command gets its settings, including ``--config``."""
    return [*map(_parameter, options_of(kind)), Flag(["--config"], type=PATH, metavar="FILE", help=_CONFIG)]


def take_given(kind: type[Settings], context: click.Context) -> Given[Settings]:
    """Remove the settings from the values of a command's parameters, and return them."""
    values: dict[str, Any] = {}
    varied: dict[str, tuple[object, ...]] = {}
    words, names = [], {"config"}
    for field in options_of(kind):
        names.add(field.name)
        value = context.params.pop(field.name)
        if context.get_parameter_source(field.name) != ParameterSource.COMMANDLINE:
            continue
        words.append(field.option)
        if field.mapping:
            value = parse_pairs(value, field.option)
        elif field.setting.varied:
            varied |= {field.name: value} if len(value) > 1 else {}
            value = value[-1]
        elif field.type is bool:
            value = not field.default
        values[field.name] = value
    file = context.params.pop("config")
    words += ["--config"] if file else []
    elsewhere = [word for other in context.command.params if other.name not in names for word in other.opts]
    return Given(kind, values, tuple(words), file, ("--config", *elsewhere), varied)


def _parameter(field: Declared) -> click.Parameter:
    if not field.setting.argument:
        return Flag([field.option, field.name], **_attributes(field))
    metavar = field.setting.metavar or f"{field.name.upper()}{'...' if field.repeated else ''}"
    attributes = {"type": _Value(field), "metavar": metavar, "nargs": -1 if field.repeated else 1}
    return Position([field.name], help=field.setting.help, required=False, **attributes)


def _attributes(field: Declared) -> dict[str, Any]:
    """Return the attributes of a setting's option."""
    setting = field.setting
    text, default = setting.help, ", ".join(field.default) if field.repeated else field.default
    if field.required:
        text += "  [required]"
    elif not (field.mapping or field.type is bool or setting.one_of or default in (None, "")):
        text += f"  [default: {default}]"
    if field.type is bool:
        return {"is_flag": True, "help": text, "heading": setting.group}
    multiple = field.repeated or field.mapping or setting.varied
    choices = f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS[field.type]
    return {
        "multiple": multiple,
        "default": None if field.required or multiple else field.default,
        "type": _Value(field),
        "metavar": setting.metavar or choices,
        "help": text,
        "heading": setting.group,
    }


def write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write options to ``--help`` under their headings, and positional arguments with their help."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        if isinstance(parameter, Position):
            sections.setdefault("Arguments", []).append((parameter.make_metavar(context), parameter.text))
        elif row := parameter.get_help_record(context):
            sections.setdefault(getattr(parameter, "heading", "Options"), []).append(row)
    rest = sections.pop("Options", [])  # comes last: it holds --out and --help
    for heading, rows in [*sections.items(), ("Options", rest)]:
        with formatter.section(heading):
            formatter.write_dl(rows)


MODEL_HELP = f"MODEL: {declared(prune.Settings)['model'].setting.help}"
dtype, device, precision, input_shape = (
    option_of(prune.Settings, name) for name in ("dtype", "device", "precision", "input")
)
