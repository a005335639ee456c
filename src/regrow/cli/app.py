"""The command group ``regrow``, the conversion of failures to exit codes, and the report file about a bug."""

import os
import platform
import tempfile
import time
import traceback
from importlib import metadata

import click

from regrow.cli import INTERRUPTED, boundary
from regrow.cli.evaluate import chat, evaluate
from regrow.cli.folders import compare, history, methods, report, settings, undo
from regrow.cli.learn import learn, search
from regrow.cli.networks import apply, export, grow, show
from regrow.cli.prune import prune, recover
from regrow.cli.screen import failure, prepare
from regrow.core.process_memory import limit_arenas

_CODES = "\n".join(f"  {code:<5}{meaning}" for code, meaning in boundary.EXIT_CODES.items())
EPILOG = f"""\b
Start with
  regrow show smollm2-135m                     which axes can be cut, and what one unit costs
  regrow prune smollm2-135m --keep 0.9 --source news --source code --out RUN
  regrow evaluate RUN --source news            perplexity of the pruned model
  regrow chat smollm2-135m RUN                 chat with the original and the pruned model, in turn
  regrow export RUN --to gguf --out m.gguf     a file for llama.cpp; also for transformers and onnxruntime

\b
Exit codes
{_CODES}
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="regrow")
def regrow() -> None:
    """Prune, grow and search trained networks."""


VERBS = (
    *(show, prune, grow, recover, learn, search, apply, history, undo),
    *(evaluate, chat, export, compare, report, settings, methods),
)
for verb in VERBS:
    regrow.add_command(verb)


def code_of(words: list[str]) -> int:
    """Run one command; a failure is printed in one line, and an exit code of ``boundary.EXIT_CODES`` is returned."""
    limit_arenas()
    prepare()
    try:
        code = regrow.main(words, prog_name="regrow", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return boundary.USAGE
    except (KeyboardInterrupt, click.exceptions.Abort):
        return failure(boundary.NOTHING_YET, INTERRUPTED)
    except Exception as error:
        return _failed(error, words)


def _failed(error: BaseException, words: list[str]) -> int:
    """Print an error, with a report file if its cause is unknown, and return the exit code."""
    try:
        problem = boundary.failure_of(error)
        line = problem.line
        if problem.report:
            line += f"; a report was written to {_write_report(error, words)}"
            line += ", please attach it" if problem.code == boundary.BUG else ""
        return failure(line, problem.code)
    except Exception as second:
        names = f"{type(error).__name__}, and {type(second).__name__} while it was explained"
        return failure(f"this is a bug in regrow: {names}; run the command again, and report this line", boundary.BUG)


def _write_report(error: BaseException, words: list[str]) -> str:
    """Write a bug report to a file of its own, readable by its user only, and return the file's name.

    It has the traceback without the values of variables, versions, and the command with the names of its options.
    """
    named = [word.partition("=")[0] for word in words if word in regrow.commands or word.startswith("--")]
    lines = [
        "Report of regrow; please read it before you attach it.",
        f"written   {time.strftime('%Y-%m-%dT%H:%M:%S%z')}",
        f"python    {platform.python_version()} on {platform.system()} {platform.machine()}",
        *(f"{name:9} {_version(name)}" for name in ("regrow", "torch", "transformers", "numpy", "click", "rich")),
        f"command   {' '.join(named)}",
        "",
        boundary.hide_home("".join(traceback.format_exception(error))),
    ]
    try:
        handle, name = tempfile.mkstemp(prefix="regrow-report-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as failed:
        return f"nowhere ({failed.strerror})"
    return name


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
