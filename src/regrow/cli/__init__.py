"""The command line: one module per verb."""

import sys

import click

from regrow.cli.apply import apply
from regrow.cli.chat import chat
from regrow.cli.compare import compare
from regrow.cli.evaluate import evaluate
from regrow.cli.export import export
from regrow.cli.learn import learn
from regrow.cli.methods import methods
from regrow.cli.prune import prune
from regrow.cli.recover import recover
from regrow.cli.report import report
from regrow.cli.screen import failure
from regrow.cli.search import search
from regrow.cli.show import show

EPILOG = """\b
Start with
  regrow show smollm2-135m                     what can be cut, and what a unit costs
  regrow prune smollm2-135m --keep 0.9 --source news --source code --out RUN
  regrow evaluate RUN --source news            perplexity of the result
  regrow chat smollm2-135m RUN                 before and after, side by side
  regrow export RUN --to gguf --out m.gguf     the result for llama.cpp; or for transformers, onnxruntime
"""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="regrow")
def regrow() -> None:
    """Change the shape of trained networks, exactly: prune, grow and search on one shared core."""


for verb in (show, prune, recover, learn, search, apply, evaluate, chat, export, compare, report, methods):
    regrow.add_command(verb)


def main() -> None:
    """Run the command line; what the user can mend is told in one line, with exit code 2."""
    try:
        code = regrow.main(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(failure("stopped; what was finished is kept, and the same command goes on from there", 130))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        sys.exit(2)
    except click.ClickException as error:
        sys.exit(failure(error.format_message(), 2))
    except KeyboardInterrupt:
        sys.exit(failure("stopped; what was finished is kept, and the same command goes on from there", 130))
    except (ValueError, OSError) as error:
        sys.exit(failure(str(error) or type(error).__name__, 2))
    sys.exit(code if isinstance(code, int) else 0)
