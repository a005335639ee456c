"""Options and checks that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from regrow.cli.screen import err
from regrow.core.errors import InputError
from regrow.core.limits import expanded
from regrow.core.names import names_code

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class FileName(click.Path):
    """The type of a path on the command line: not blank, with ``~`` and ``~user`` expanded."""

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Convert the text of a path.

        Raises:
            click.BadParameter: If the text is blank, or there is no such home folder.
        """
        text = os.fspath(value)
        if not text.strip():
            self.fail("the name is blank; name a file or a folder", param, ctx)
        try:
            return expanded(Path(text))
        except InputError as error:
            self.fail(str(error), param, ctx)


PATH = FileName()

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


needed_memory = memory(
    "How much memory the run may use, like 4GiB. What it needs is printed first, term by term; a run that needs "
    "more is refused. For text models."
)


def run_folder(*, required: bool = False) -> Decorator:
    """Return the decorator that adds the option ``--out`` for the folder of a run."""
    help = "The run folder to write. If the run was stopped, the same command resumes it."
    return click.option("--out", type=PATH, help=help, required=required)


def say_code(*names: str) -> None:
    """Print which of the names of models and methods on the command line are code that will be imported and run."""
    for name in names:
        if names_code(name) and not Path(name).exists():
            err.print(f"running code: {name} (named on the command line)", markup=False)
