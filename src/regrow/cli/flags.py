"""The command-line options of a command, derived from the declaration of its settings."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypedDict, TypeVar, Unpack

import click
from click.core import ParameterSource

from regrow.cli.options import PATH, Decorator
from regrow.core.errors import InputError
from regrow.settings import prune
from regrow.settings.declaration import Declared, declared, options_of
from regrow.settings.file import read_settings
from regrow.settings.words import build_settings, parse_pairs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CONFIG = "TOML or YAML file of settings, named like the options; options on the command line take precedence."
_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}

Settings = TypeVar("Settings", bound="DataclassInstance")


class ParameterArguments(TypedDict, total=False):
    """Arguments of a click parameter that regrow uses; they mean what they mean to click."""

    type: click.ParamType | type[int]
    metavar: str
    nargs: int
    multiple: bool
    is_flag: bool
    required: bool
    default: object


class _Value(click.ParamType):
    """The type of an option's value: parses and checks it by the setting's declaration."""

    name = "value"

    def __init__(self, field: Declared) -> None:
        self.field = field

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Convert the text of a value.

        Raises:
            click.UsageError: If the text is not an allowed value; names the allowed ones.
        """
        if self.field.mapping or not isinstance(value, str):  # pairs are parsed together
            return value
        try:
            return str(PATH.convert(value, param, ctx)) if self.field.setting.path else self.field.parse(value)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from None


class Position(click.Argument):
    """A positional argument with a help text.

    Args:
        words: As for ``click.Argument``.
        help: The help text.
        more: As for ``click.Argument``.
    """

    def __init__(self, words: list[str], *, help: str, **more: Unpack[ParameterArguments]) -> None:
        super().__init__(words, **more)
        self.text = help


class Flag(click.Option):
    """An option that is listed under a heading of ``--help``.

    Args:
        words: As for ``click.Option``.
        heading: The heading; empty: ``Options``.
        help: The help text.
        more: As for ``click.Option``.
    """

    def __init__(self, words: list[str], *, heading: str = "", help: str, **more: Unpack[ParameterArguments]) -> None:
        super().__init__(words, help=help, **more)
        self.heading = heading


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
        """Build the settings of each run, where options with several values name several runs.

        Raises:
            InputError: As :meth:`build`; if an option has a value twice.
        """
        for name, values in self.varied.items():
            if twice := next((one for one in values if values.count(one) > 1), None):
                raise InputError(f"{declared(self.kind)[name].option} {twice} is there twice; leave one out")
        rows = product(*([(name, value) for value in values] for name, values in self.varied.items()))
        return [replace(self, values={**self.values, **dict(row)}, varied={}).build() for row in rows]

    def build(self) -> Settings:
        """Build the settings of the command from the command line and the settings file, and check them.

        Raises:
            InputError: If a setting is missing or not allowed.
        """
        file = read_settings(self.file, self.kind, self.elsewhere) if self.file else {}
        return build_settings(self.kind, self.values, file)


def option_of(kind: type["DataclassInstance"], name: str) -> Decorator:
    """Return the decorator that adds the option of one setting to a command without settings of its own.

    Args:
        kind: The dataclass of another command's settings.
        name: The name of the field.
    """
    field = declared(kind)[name]
    return click.option(field.option, name, cls=Flag, **_attributes(field))


def parameters_of(kind: type["DataclassInstance"]) -> list[click.Parameter]:
    """Return the click parameters by which a command gets its settings, including ``--config``.

    Args:
        kind: The dataclass of the settings.
    """
    config = Flag(["--config"], type=PATH, metavar="FILE", help=_CONFIG)
    return [*(parameter for field in options_of(kind) for parameter in _parameters(field)), config]


def take_given(kind: type[Settings], context: click.Context) -> Given[Settings]:
    """Remove the settings from the values of a command's parameters, and return them.

    Args:
        kind: The dataclass of the settings.
        context: The click context of the command; its values are changed in place.
    """
    values: dict[str, Any] = {}
    varied: dict[str, tuple[object, ...]] = {}
    words = []
    for field in options_of(kind):
        for parameter in _parameters(field):
            name = parameter.name or ""
            value = context.params.pop(name)
            if context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
                continue
            words.append(parameter.opts[0] if isinstance(parameter, Flag) else field.option)
            if name != field.name:
                values[field.name] = {**values.get(field.name, {}), name.removeprefix(f"{field.name}__"): value}
            elif field.mapping:
                values[name] = parse_pairs(value, field.option)
            elif field.setting.varied:
                values[name] = value[-1]
                varied |= {name: value} if len(value) > 1 else {}
            else:
                values[name] = not field.default if field.type is bool else value
    file = context.params.pop("config")
    if file:
        words.append("--config")
    own = {word for one in parameters_of(kind) for word in one.opts}
    rest = (word for one in context.command.params for word in one.opts if word not in own)
    return Given(kind, values, tuple(words), file, ("--config", *rest), varied)


def _parameters(field: Declared) -> list[click.Parameter]:
    setting = field.setting
    if setting.argument:
        many, shown = -1 if field.repeated else 1, _metavar(field)
        return [
            Position([field.name], help=setting.help, required=False, type=_Value(field), metavar=shown, nargs=many)
        ]
    parts = [
        Flag([part.option, f"{field.name}__{name}"], help=part.help, metavar=part.metavar, heading=part.group)
        for name, part in setting.parts
    ]
    return [_option(field), *parts]


def _option(field: Declared) -> Flag:
    return Flag([field.option, field.name], **_attributes(field))


def _attributes(field: Declared) -> dict[str, Any]:
    shared = {"help": _help(field), "heading": field.setting.group}
    if field.type is bool:
        return {"is_flag": True, **shared}
    many = field.repeated or field.mapping or field.setting.varied
    default = None if field.required or many else field.default
    return {"multiple": many, "default": default, "type": _Value(field), "metavar": _metavar(field), **shared}


def _help(field: Declared) -> str:
    text, default = field.setting.help, ", ".join(field.default) if field.repeated else field.default
    if field.required:
        return f"{text}  [required]"
    without = field.mapping or field.type is bool or field.setting.one_of or default in (None, "")
    return text if without else f"{text}  [default: {default}]"


def _metavar(field: Declared) -> str:
    setting = field.setting
    if setting.argument:
        return setting.metavar or f"{field.name.upper()}{'...' if field.repeated else ''}"
    return setting.metavar or (f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS[field.type])


def write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of a command to ``--help`` under their headings, and its positional arguments with their help.

    Args:
        command: The command.
        context: The click context of the command.
        formatter: Receives the text.
    """
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        if isinstance(parameter, Position):
            sections.setdefault("Arguments", []).append((parameter.make_metavar(context), parameter.text))
        elif row := parameter.get_help_record(context):
            heading = parameter.heading if isinstance(parameter, Flag) else ""
            sections.setdefault(heading or "Options", []).append(row)
    rest = sections.pop("Options", [])  # comes last: it holds --out and --help
    for heading, rows in [*sections.items(), ("Options", rest)]:
        with formatter.section(heading):
            formatter.write_dl(rows)


MODEL_HELP = f"MODEL: {declared(prune.Settings)['model'].setting.help}"
dtype, device, precision, input_shape = (
    option_of(prune.Settings, name) for name in ("dtype", "device", "precision", "input")
)
