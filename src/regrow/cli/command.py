"""The class of commands: options derived from the declaration of their settings, early checks, and Ctrl-C."""

import contextlib
import importlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click
from click.core import ParameterSource

from regrow.cli import stop_at_once
from regrow.cli.boundary import NOTHING_YET, Stopped, interrupts, is_interrupted
from regrow.cli.screen import err
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.names import names_code
from regrow.distributed import read_ranks
from regrow.settings import prune
from regrow.settings.declaration import Declared, declared, options_of
from regrow.settings.words import build_settings, parse_pairs, read_settings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CONFIG = "TOML file of settings, named like the options; options on the command line take precedence."
_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}

Settings = TypeVar("Settings", bound="DataclassInstance")
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class FileName(click.Path):
    """The type of a path on the command line: not blank, with ``~`` and ``~user`` expanded."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Convert the text of a path, or raise BadParameter."""
        text = os.fspath(value)
        if not text.strip():
            self.fail("the name is blank; name a file or a folder", param, ctx)
        try:
            return expanded(Path(text))
        except InputError as error:
            self.fail(str(error), param, ctx)


PATH = FileName()


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
    """The positional argument of a setting, with its help text."""

    def __init__(self, field: Declared) -> None:
        metavar = field.setting.metavar or f"{field.name.upper()}{'...' if field.repeated else ''}"
        many = -1 if field.repeated else 1
        super().__init__([field.name], required=False, type=_Value(field), metavar=metavar, nargs=many)
        self.text = field.setting.help


class Flag(click.Option):
    """An option that is listed under a heading of ``--help``."""

    def __init__(self, words: list[str], *, heading: str = "", **attributes: Any) -> None:
        super().__init__(words, **attributes)
        self.heading = heading or "Options"


@dataclass(frozen=True)
class Stated(Generic[Settings]):
    """The settings stated on a command line, with the settings file that gives others."""

    kind: type[Settings]
    values: Mapping[str, object]
    options: tuple[str, ...]  # as they were typed: --epochs
    file: Path | None  # of --config
    elsewhere: tuple[str, ...]  # options that are not settings, such as --out; a file must not give them

    def build(self) -> Settings:
        """Build the settings of the command from the command line and the settings file, and check them."""
        file = read_settings(self.file, self.kind, self.elsewhere) if self.file else {}
        return build_settings(self.kind, self.values, file)


class Verb(click.Command):
    """A command of regrow, with the options of its ``settings``, which it gets as ``stated``.

    ``needs`` is the module that is imported before it runs, so that Ctrl-C does not interrupt its import; ``resumed``
    are the options that name the run folder in which the same command resumes; ``instead`` is the option that takes the
    settings of an earlier run; ``distributed`` says whether several processes may run it together.
    """

    def __init__(
        self,
        *,
        needs: str = "regrow.jobs.prune",
        resumed: tuple[str, ...] = (),
        settings: type["DataclassInstance"] | None = None,
        instead: str = "",
        distributed: bool = False,
        params: list[click.Parameter],
        **attributes: Any,
    ) -> None:
        super().__init__(params=[*_parameters(settings), *params] if settings else params, **attributes)
        self.needs, self.resumed, self.settings = needs, resumed, settings
        self.instead, self.distributed = instead, distributed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, after checking that every word can be encoded as UTF-8."""
        for word in args:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:
                line = f"{word!r} is not valid UTF-8; rename the file, or write the text in UTF-8"
                raise click.UsageError(line, ctx) from None
        rest = super().parse_args(ctx, args)
        if self.settings:
            ctx.params["stated"] = _take_stated(self.settings, ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to ``--help`` under their headings, after the positional arguments."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, Position):
                sections.setdefault("Arguments", []).append((parameter.make_metavar(ctx), parameter.text))
            elif row := parameter.get_help_record(ctx):
                sections.setdefault(getattr(parameter, "heading", "Options"), []).append(row)
        rest = sections.pop("Options", [])  # comes last: it holds --out and --help
        for heading, rows in [*sections.items(), ("Options", rest)]:
            with formatter.section(heading):
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; Ctrl-C becomes one line that says what remains."""
        ranks = read_ranks()
        if ranks.several and not self.distributed:
            line = f"{self.name} runs in one process, and this is {ranks}"
            raise click.UsageError(f"{line}; start it without torchrun, or unset WORLD_SIZE", ctx)
        if ranks.several:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost connection, not torch
        try:
            Path.cwd()
        except FileNotFoundError:  # compiled code may end the process over it
            raise click.UsageError("the working directory was deleted; change to one that is there", ctx) from None
        from regrow.cli.checks import check_words  # what can be wrong is found before anything large is imported

        known = self.settings and not ctx.params.get(self.instead)
        check_words(self.name or "", ctx.params["stated"].build() if known else None, ctx.params)
        importlib.import_module(self.needs)
        if signal.getsignal(signal.SIGINT) is stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with interrupts() as noted:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, Exception) as error:
                if noted or is_interrupted(error) or isinstance(error, click.exceptions.Abort):
                    raise Stopped(self._explain_stop(ctx.params)) from None
                if isinstance(error, EOFError):  # which click takes for Ctrl-D
                    raise RuntimeError(f"a file ended too early ({error})") from error
                raise

    def _explain_stop(self, values: Mapping[str, object]) -> str:
        """Return the message of a stopped command: whether anything was kept, and how to resume."""
        folders = [Path(str(values[name])) for name in self.resumed if values.get(name) and not values.get("dry_run")]
        if not folders:
            return NOTHING_YET
        from regrow.store.run_folder import RunFolder

        with contextlib.suppress(ValueError, OSError):
            if RunFolder.open_unfinished(folders[0]) is not None:
                return f"stopped; {folders[0]} keeps what was finished, and the same command resumes from there"
        return NOTHING_YET


def _parameters(kind: type["DataclassInstance"]) -> list[click.Parameter]:
    """Return the click parameters by which a command gets its settings, including ``--config``."""
    parameters = [
        Position(field) if field.setting.argument else Flag([field.option, field.name], **_attributes(field))
        for field in options_of(kind)
    ]
    return [*parameters, Flag(["--config"], type=PATH, metavar="FILE", help=_CONFIG)]


def _take_stated(kind: type[Settings], context: click.Context) -> Stated[Settings]:
    """Remove the settings from the values of a command's parameters, and return them."""
    values: dict[str, Any] = {}
    words, names = [], {"config"}
    for field in options_of(kind):
        names.add(field.name)
        value = context.params.pop(field.name)
        if context.get_parameter_source(field.name) != ParameterSource.COMMANDLINE:
            continue
        words.append(field.option)
        if field.mapping:
            value = parse_pairs(value, field.option)
        elif field.type is bool:
            value = not field.default
        values[field.name] = value
    file = context.params.pop("config")
    words += ["--config"] if file else []
    elsewhere = [word for other in context.command.params if other.name not in names for word in other.opts]
    return Stated(kind, values, tuple(words), file, ("--config", *elsewhere))


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
    multiple = field.repeated or field.mapping
    choices = f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS[field.type]
    return {
        "multiple": multiple,
        "default": None if field.required or multiple else field.default,
        "type": _Value(field),
        "metavar": setting.metavar or choices,
        "help": text,
        "heading": setting.group,
    }


def _option_of(name: str) -> Decorator:
    """Return the decorator that adds an option of ``prune`` to a command without settings of its own."""
    field = declared(prune.Settings)[name]
    return click.option(field.option, name, cls=Flag, **_attributes(field))


MODEL_HELP = f"MODEL: {declared(prune.Settings)['model'].setting.help}"
dtype, device, precision, input_shape = map(_option_of, ("dtype", "device", "precision", "input"))
code = click.option(
    "--code",
    default="",
    metavar="PKG:FN",
    help="The function that builds the network, for a run folder whose network your own code builds. It is imported "
    "and called; code named in the folder's files is never run.",
)
track = click.option(
    "--track",
    default="",
    metavar="TRACKER",
    help="Also give every measurement to a tracker: tensorboard (files beside the run folder), mlflow or wandb, which "
    "sends them to its server.",
)


def memory(help: str) -> Decorator:
    """Return the decorator that adds the option ``--memory``, which means something else for each command."""
    return click.option("--memory", default="", metavar="AMOUNT", help=help)


def run_folder(*, required: bool = False) -> Decorator:
    """Return the decorator that adds the option ``--out`` for the folder of a run."""
    help = "The run folder to write. If the run was stopped, the same command resumes it."
    return click.option("--out", type=PATH, help=help, required=required)


def say_code(*names: str) -> None:
    """Print which of the names of models and methods on the command line are code that will be imported and run."""
    for name in names:
        if names_code(name) and not Path(name).exists():
            err.print(f"running code: {name} (named on the command line)", markup=False)
