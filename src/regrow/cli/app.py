"""The command group ``regrow``, and the conversion of failures to exit codes."""

import sys
import traceback
from itertools import chain

import click

from regrow.cli import INTERRUPTED, boundary
from regrow.cli.evaluate import chat, evaluate
from regrow.cli.folders import methods, report, undo
from regrow.cli.learn import learn, search
from regrow.cli.networks import apply, export, grow, show
from regrow.cli.prune import prune, recover
from regrow.cli.screen import HelpContext, escape_controls, print_failure, set_up_terminal
from regrow.core.process_memory import limit_arenas, share_cores

_CODES = "\n".join(f"  {code:<5}{meaning}" for code, meaning in boundary.EXIT_CODES.items())
EPILOG = f"""\b
Start with
  regrow show smollm2-135m                     which axes can be cut, and what one unit costs
  regrow prune smollm2-135m --smaller 10% --out RUN
  regrow evaluate RUN --source news            perplexity of the pruned model
  regrow chat smollm2-135m RUN                 chat with the original and the pruned model, in turn
  regrow export RUN --to gguf --out m.gguf     a file for llama.cpp; also for transformers and onnxruntime

\b
Completion in bash (zsh, fish: docs/command-line.md)
  eval "$(_REGROW_COMPLETE=bash_source regrow)"

\b
Exit codes
{_CODES}
"""


HEADINGS = {
    "Change a network": (prune, recover, grow, learn, search),
    "Measure and use a network": (show, evaluate, chat, export),
    "Plans, runs and methods": (apply, undo, report, methods),
}


class CommandGroup(click.Group):
    """The commands of regrow, which ``--help`` lists under ``HEADINGS``."""

    context_class = HelpContext

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands, each with the first line of its help."""
        for heading, commands in HEADINGS.items():
            with formatter.section(heading):
                formatter.write_dl([(command.name or "", command.short_help or "") for command in commands])


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=CommandGroup, epilog=EPILOG, context_settings=SETTINGS)
@click.version_option(package_name="regrow")
def regrow() -> None:
    """Prune, grow and search trained networks."""


for command in chain(*HEADINGS.values()):
    regrow.add_command(command)


def run_command(words: list[str]) -> int:
    """Run the command in ``words``, print a failure in one line, and return an exit code of ``boundary.EXIT_CODES``."""
    limit_arenas()
    share_cores()
    set_up_terminal()
    try:
        code = regrow.main(words, prog_name="regrow", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return boundary.USAGE
    except (KeyboardInterrupt, click.exceptions.Abort):
        return print_failure(boundary.NOTHING_YET, INTERRUPTED)
    except Exception as error:
        return _report_error(error)


def _report_error(error: Exception) -> int:
    """Print an error, with its traceback if regrow did not raise it on purpose, and return the exit code."""
    failure = boundary.classify_failure(error)
    if failure.traced:
        sys.stderr.write(escape_controls("".join(traceback.format_exception(error)), keep="\n"))
    return print_failure(failure.line, failure.code)
