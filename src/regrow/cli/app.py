"""The command group ``regrow``, and the conversion of failures to exit codes."""

import click

from regrow.cli import INTERRUPTED, boundary
from regrow.cli.apply import apply
from regrow.cli.chat import chat
from regrow.cli.evaluate import evaluate
from regrow.cli.export import export
from regrow.cli.grow import grow
from regrow.cli.history import history, undo
from regrow.cli.learn import learn
from regrow.cli.methods import methods
from regrow.cli.prune import prune
from regrow.cli.recover import recover
from regrow.cli.report import compare, report
from regrow.cli.screen import failure, prepare
from regrow.cli.search import search
from regrow.cli.settings import settings
from regrow.cli.show import show
from regrow.core.process_memory import limit_arenas

_CODES = "\n".join(f"  {code:<5}{meaning}" for code, meaning in boundary.EXIT_CODES.items())
EPILOG = f"""\b
Start with
  regrow show smollm2-135m                     which axes can be cut, and what one unit costs
  regrow prune smollm2-135m --keep 0.9 --source news --source code --out RUN
  regrow evaluate RUN --source news            perplexity of the pruned model
  regrow chat smollm2-135m RUN                 chat with the original and the pruned model, side by side
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
    """Run one command; a failure is printed in one line, and an exit code of ``boundary.EXIT_CODES`` is returned.

    Args:
        words: The command line, without the program's name.
    """
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
    try:
        return _explain(error, words)
    except Exception as second:
        names = f"{type(error).__name__}, and {type(second).__name__} while it was explained"
        return failure(f"this is a bug in regrow: {names}; run the command again, and report this line", boundary.BUG)


def _explain(error: BaseException, words: list[str]) -> int:
    found = boundary.failure_of(error)
    line = found.line
    if found.report:
        from regrow.cli.bug_report import write_report

        line += f"; a report was written to {write_report(error, words)}"
        line += ", please attach it" if found.code == boundary.BUG else ""
    return failure(line, found.code)
