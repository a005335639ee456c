"""The class of commands: options derived from the declaration of their settings, early checks, and Ctrl-C."""

import importlib
import os
import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from regrow.cli import stop_at_once
from regrow.cli.boundary import NOTHING_YET, Stopped, record_interrupts
from regrow.cli.completion import complete
from regrow.cli.screen import HelpContext, err, show_lines
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.names import names_function
from regrow.distributed import read_ranks
from regrow.settings import prune
from regrow.settings.declaration import DeclaredSetting, list_declared, list_options
from regrow.settings.words import build_settings, command_name, parse_pairs

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_METAVARS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}
# The most options of a command that `--help` lists all
MOST_LISTED = 15
_ALL = "regrow.help_all"  # the key in a context's `meta` while `--help-all` is answered

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class PathType(click.Path):
    """The type of a path on the command line: not blank, with ``~`` and ``~user`` expanded."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Return the path of a text, with ``~`` expanded; raise BadParameter for a blank one or an unknown user."""
        text = os.fspath(value)
        if not text.strip():
            self.fail("the name is blank; name a file or a folder", param, ctx)
        try:
            return expanded(Path(text))
        except InputError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return run folders where the parameter names one, else what makes the shell list its files."""
        return complete(ctx, param, incomplete) or super().shell_complete(ctx, param, incomplete)


PATH = PathType(readable=False)


class _SettingType(click.ParamType):
    """The click type of a setting's value: parses and checks it as the setting is declared."""

    name = "value"

    def __init__(self, field: DeclaredSetting) -> None:
        self.field = field

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        """Return the value of a text, or raise UsageError, which names the allowed ones."""
        if self.field.is_mapping or not isinstance(value, str):  # pairs are parsed together
            return value
        try:
            return str(PATH.convert(value, param, ctx)) if self.field.setting.path else self.field.parse(value)
        except InputError as error:
            raise click.UsageError(str(error), ctx) from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the choices, files or known names that begin with ``incomplete``."""
        if self.field.setting.path:
            return PATH.shell_complete(ctx, param, incomplete)
        choices = [CompletionItem(text) for text in self.field.setting.choices if text.startswith(incomplete)]
        return choices or complete(ctx, param, incomplete)


class PositionalArgument(click.Argument):
    """The positional argument of a setting, which parses and checks it; its help is ``text``."""

    def __init__(self, field: DeclaredSetting) -> None:
        metavar = field.setting.metavar or f"{field.name.upper()}{'...' if field.is_repeated else ''}"
        nargs = -1 if field.is_repeated else 1
        super().__init__([field.name], required=False, type=_SettingType(field), metavar=metavar, nargs=nargs)
        self.text = field.setting.help


class GroupedOption(click.Option):
    """An option that help lists under ``heading`` (empty: under ``Options``); ``--help`` only if it is ``common``."""

    def __init__(self, words: list[str], *, heading: str = "", common: bool = False, **attributes: Any) -> None:
        super().__init__(words, **attributes)
        self.heading, self.common = heading or "Options", common


def _make_help_all(*, hidden: bool) -> click.Option:
    """Return the option ``--help-all``, which prints the help of a command with all its options, and exits."""

    def answer(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[_ALL] = True
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()

    flag = partial(click.Option, is_flag=True, is_eager=True, expose_value=False, callback=answer)
    return flag(["--help-all"], hidden=hidden, help="Show all options and exit.")


class Verb(click.Command):
    """A command of regrow, with the options of its ``settings`` (a dataclass of ``regrow.settings``) and ``params``.

    ``preload`` is a module that is imported before it runs, so that Ctrl-C does not interrupt imports: the default
    imports torch and nearly all that the other jobs need. ``distributed``: several processes may run it together.
    """

    context_class = HelpContext

    def __init__(
        self,
        *,
        preload: str = "regrow.jobs.prune",
        settings: type["DataclassInstance"] | None = None,
        distributed: bool = False,
        params: list[click.Parameter],
        **attributes: Any,
    ) -> None:
        params = [*_make_parameters(settings), *params] if settings else params
        options = sum(isinstance(parameter, click.Option) for parameter in params)
        self.options = options if options > MOST_LISTED else 0  # how many `--help-all` lists; 0: those of `--help`
        params.append(_make_help_all(hidden=not self.options))
        short = (attributes["help"] or "").partition("\n")[0]
        super().__init__(params=params, short_help=short, **attributes)
        self.preload, self.settings, self.distributed = preload, settings, distributed

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words into ``ctx.params``, those of settings into a dataclass under ``settings``.

        Return the words that are left, as click does. Raise UsageError for words that are not UTF-8.
        """
        for word in args:
            try:
                word.encode("utf-8")
            except UnicodeEncodeError:
                line = f"{word!r} is not valid UTF-8; rename the file, or write the text in UTF-8"
                raise click.UsageError(line, ctx) from None
        rest = super().parse_args(ctx, args)
        if self.settings and not ctx.resilient_parsing:  # as in completion, where settings may be missing
            ctx.params["settings"] = _take_settings(self.settings, ctx)
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options to help under their headings, after the positional arguments."""
        is_whole = not self.options or _ALL in ctx.meta
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, PositionalArgument):
                sections.setdefault("Arguments", []).append((parameter.make_metavar(ctx), parameter.text))
            elif (is_whole or getattr(parameter, "common", True)) and (row := parameter.get_help_record(ctx)):
                heading = getattr(parameter, "heading", "Options") if is_whole else "Common options"
                sections.setdefault(heading, []).append(row)
        if rest := sections.pop("Options", None):
            sections["Options"] = rest  # comes last: it holds --out and --help
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and how to see the options that are left out."""
        super().format_epilog(ctx, formatter)
        if self.options and _ALL not in ctx.meta:
            formatter.write(f"\n  All {self.options} options: {ctx.command_path} --help-all\n")

    def invoke(self, ctx: click.Context) -> object:
        """Check the command line, import what the command needs, and run it; Ctrl-C raises Stopped."""
        ranks = read_ranks()
        if ranks.several and not self.distributed:
            line = f"{self.name} runs in one process, and this is {ranks}"
            raise click.UsageError(f"{line}; start it without torchrun, or unset WORLD_SIZE", ctx)
        if ranks.several:
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # we report a lost connection, not torch
        Path.cwd()  # fails if the folder was deleted, over which compiled code may end the process
        from regrow.cli.checks import check_command_line  # what can be wrong is found before anything large is imported

        check_command_line(self.name or "", ctx.params)
        with nullcontext() if ranks.rank else show_lines("importing packages"):
            importlib.import_module(self.preload)
        if signal.getsignal(signal.SIGINT) is stop_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with record_interrupts() as signals:
            try:
                return super().invoke(ctx)
            except (KeyboardInterrupt, Exception) as error:
                if signals or isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
                    raise Stopped(self._explain_stop(ctx.params)) from None
                if isinstance(error, EOFError):  # which click takes for Ctrl-D
                    raise RuntimeError(f"a file ended too early ({error})") from error
                raise

    def _explain_stop(self, values: Mapping[str, Any]) -> str:
        """Return the message of a stopped command with its parameters ``values``: what is kept, and how to resume."""
        from regrow.store.replacing import WORK
        from regrow.store.run_record import RUN

        folder = values.get("resume") or values.get("out")
        if folder and not values.get("dry_run") and (folder / WORK / RUN).is_file():
            return f"stopped; {folder} keeps what was finished, and the same command resumes from there"
        return NOTHING_YET


def _make_parameters(settings_class: type["DataclassInstance"]) -> list[click.Parameter]:
    """Return the click parameters, one per setting, by which a command gets the values of its settings."""
    return [
        PositionalArgument(field)
        if field.setting.argument
        else GroupedOption([_declare_option(field), field.name], **_describe_option(field))
        for field in list_options(settings_class)
    ]


def _declare_option(field: DeclaredSetting) -> str:
    """Return the name of a setting's option; where it may be left open, of a switch that turns it on or off."""
    return f"{field.option}/--{field.negated}" if field.type is bool and field.default is None else field.option


def _take_settings(settings_class: type["DataclassInstance"], context: click.Context) -> "DataclassInstance | None":
    """Remove the settings' values and ``config`` from ``context.params``, and return the settings made of them.

    ``config``: a run whose settings count where the command line gives none. With ``--resume``, which takes those of
    its run, return ``None``, or raise UsageError if one is given besides.
    """
    stated: dict[str, Any] = {}
    options = []
    for field in list_options(settings_class):
        value = context.params.pop(field.name)
        if context.get_parameter_source(field.name) != ParameterSource.COMMANDLINE:
            continue
        options.append(field.option)
        if field.is_mapping:
            value = parse_pairs(value, field.option)
        elif field.type is bool and field.default is not None:
            value = not field.default
        stated[field.name] = value
    config = context.params.pop("config", None)
    if context.params.get("resume"):
        options += ["--config"] if config else []
        if options:
            raise click.UsageError(f"--resume takes the settings of its run; leave out {', '.join(options)}", context)
        return None
    return build_settings(settings_class, stated, _read_config(config, settings_class, stated) if config else {})


def _read_config(run: Path, settings_class: type["DataclassInstance"], stated: Mapping[str, object]) -> dict[str, Any]:
    """Return the settings of a run that ``--config`` names, by field name; InputError for a run of another command.

    ``stated``: what the command line gives. InputError, too, if a setting names the user's code and is not in it.
    """
    from regrow.cli.checks import read_run_record
    from regrow.store.run_record import check_repeatable, convert_settings

    record, command = read_run_record(run), command_name(settings_class)
    if record["verb"] != command:
        raise InputError(f"{run} holds a run of {record['verb']!r}; give a run of `regrow {command}` to --config")
    check_repeatable(run, record)
    recorded = convert_settings(record["settings"], settings_class)
    values = {field.name: getattr(recorded, field.name) for field in list_options(settings_class)}
    for field in list_options(settings_class):
        if field.setting.code and field.name not in stated and names_function(name := values[field.name]):
            word = name if field.setting.argument else f"{field.option} {name}"
            raise InputError(
                f"{run}: {field.option} is {name!r:.80}, which names code, and only the command line names code; "
                f"add {word} to the command if you trust it"
            )
    return values


def _describe_option(field: DeclaredSetting) -> dict[str, Any]:
    """Return the keyword arguments of :class:`GroupedOption` for a setting: type, default, help, heading."""
    setting, text = field.setting, field.setting.help
    default = ", ".join(field.default) if field.is_repeated else field.default
    if field.is_required:
        text += "  [required]"
    elif not (field.is_mapping or field.type is bool or setting.exclusive_group or default in (None, "")):
        text += f"  [default: {default}]"
    if field.type is bool:
        left_open = {"default": None} if field.default is None else {}
        return {"is_flag": True, "help": text, "heading": setting.group, "common": setting.common, **left_open}
    multiple = field.is_repeated or field.is_mapping
    choices = f"[{'|'.join(setting.choices)}]" if setting.choices else _METAVARS[field.type]
    return {
        "multiple": multiple,
        "default": None if field.is_required or multiple else field.default,
        "type": _SettingType(field),
        "metavar": setting.metavar or choices,
        "help": text,
        "heading": setting.group,
        "common": setting.common,
    }


def _make_option(name: str) -> Decorator:
    """Return a decorator that adds the option of a setting of ``prune``, by field name, to another command."""
    field = list_declared(prune.Settings)[name]
    return click.option(field.option, name, cls=GroupedOption, **_describe_option(field))


MODEL_HELP = f"MODEL: {list_declared(prune.Settings)['model'].setting.help}"
dtype, device, input_shape = map(_make_option, ("dtype", "device", "input"))
code = click.option(
    "--code",
    cls=GroupedOption,
    default="",
    metavar="PKG:FN",
    help="Your function that builds the network of a run folder. It is imported and called; code named in the "
    "folder's files is never run.",
)
memory = click.option(
    "--memory",
    default="",
    metavar="AMOUNT",
    help="How much memory the command may use, like 4GiB. A text model that does not fit is read one block at a time.",
)
dry_run = click.option(
    "--dry-run",
    cls=GroupedOption,
    type=PATH,
    help="Only write the plan to this JSON file; `regrow apply` applies it.",
)


def run_folder(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: add ``--out``, the run folder to write, and ``--config``, a run whose settings are taken."""
    help = "A run of this command, whose settings are taken; options on the command line take precedence."
    config = click.option("--config", cls=GroupedOption, type=PATH, metavar="RUN", help=help)
    help = "The run folder to write. If the run was stopped, the same command resumes it."
    return config(click.option("--out", type=PATH, help=help)(command))


def announce_code(*names: str) -> None:
    """Print, on the error stream, each name that is code to be imported and run, ``module:function``; skip others."""
    for name in names:
        if names_function(name) and not Path(name).exists():
            err.print(f"running code: {name} (named on the command line)", markup=False)
