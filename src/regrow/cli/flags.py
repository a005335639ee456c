"""The options of a command, derived from the declaration of its settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from regrow.cli.options import PATH
from regrow.errors import InputError
from regrow.settings.declaration import Declared, options_of
from regrow.settings.words import build_settings, parse_pairs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}


class _Value(click.ParamType):
    """The values that a setting may have, as they are typed."""

    name = "value"

    def __init__(self, field: Declared) -> None:
        self.field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A value from its text.

        Raises:
            click.UsageError: If it is none; says what it may be.
        """
        if not isinstance(value, str):
            return value
        try:
            return str(PATH.convert(value, param, ctx)) if self.field.setting.path else self.field.parse(value)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from None


class Position(click.Argument):
    """An argument that ``--help`` explains.

    Args:
        words: As for ``click.Argument``.
        help: What it is.
        more: As for ``click.Argument``.
    """

    def __init__(self, words: list[str], *, help: str, **more: Any) -> None:
        super().__init__(words, **more)
        self.text = help


class Flag(click.Option):
    """An option that stands under a heading of ``--help``.

    Args:
        words: As for ``click.Option``.
        heading: The heading; empty: ``Options``.
        more: As for ``click.Option``.
    """

    def __init__(self, words: list[str], *, heading: str = "", **more: Any) -> None:
        super().__init__(words, **more)
        self.heading = heading


@dataclass(frozen=True)
class Given:
    """The settings that a command line states.

    Args:
        kind: The record of the command's settings.
        values: Field → value.
        options: How they were written: ``--epochs``.
    """

    kind: type["DataclassInstance"]
    values: Mapping[str, Any]
    options: tuple[str, ...]

    def build(self) -> Any:
        """The settings of the command.

        Raises:
            InputError: If one is missing or cannot be.
        """
        return build_settings(self.kind, self.values, {})


def parameters_of(kind: type["DataclassInstance"]) -> list[click.Parameter]:
    """The parameters that give a command its settings.

    Args:
        kind: The record of the settings.
    """
    return [parameter for field in options_of(kind) for parameter in _parameters(field)]


def take_given(kind: type["DataclassInstance"], context: click.Context) -> Given:
    """Take the settings out of the values of a command's parameters.

    Args:
        kind: The record of the settings.
        context: Of the command, whose values change.
    """
    values: dict[str, Any] = {}
    options = []
    for field in options_of(kind):
        for parameter in _parameters(field):
            name = parameter.name or ""
            value = context.params.pop(name)
            if context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
                continue
            options.append(parameter.opts[0] if isinstance(parameter, Flag) else field.option)
            if name != field.name:
                values[field.name] = {**values.get(field.name, {}), name.removeprefix(f"{field.name}__"): value}
            elif field.mapping:
                values[name] = parse_pairs(value)
            else:
                values[name] = not field.default if field.type is bool else value
    return Given(kind, values, tuple(options))


def _parameters(field: Declared) -> list[click.Parameter]:
    setting = field.setting
    if setting.argument:
        many = {"nargs": -1} if field.repeated else {}
        words, shown = [field.name], _metavar(field)
        return [Position(words, help=setting.help, required=False, type=_Value(field), metavar=shown, **many)]
    parts = [
        Flag([part.option, f"{field.name}__{name}"], help=part.help, metavar=part.metavar, heading=part.group)
        for name, part in setting.parts
    ]
    return [_option(field), *parts]


def _option(field: Declared) -> click.Parameter:
    setting, words = field.setting, [field.option, field.name]
    if field.type is bool:
        return Flag(words, is_flag=True, help=setting.help, heading=setting.group)
    return Flag(
        words, multiple=field.repeated or field.mapping, type=_Value(field), help=_help(field), metavar=_metavar(field),
        heading=setting.group,
    )  # fmt: skip


def _help(field: Declared) -> str:
    text, default = field.setting.help, ", ".join(field.default) if field.repeated else field.default
    if field.required:
        return f"{text}  [required]"
    return text if field.mapping or default in (None, "") else f"{text}  [default: {default}]"


def _metavar(field: Declared) -> str:
    setting = field.setting
    if setting.argument:
        return setting.metavar or f"{field.name.upper()}{'...' if field.repeated else ''}"
    return setting.metavar or (f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS[field.type])


def write_options(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """Write the options of a command under their headings, and what the arguments of its settings are.

    Args:
        command: Whose.
        context: Of it.
        formatter: Takes the text.
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
