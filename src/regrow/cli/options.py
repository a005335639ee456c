"""Options that several verbs share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from regrow.cli.screen import err
from regrow.errors import InputError
from regrow.limits import expanded
from regrow.references import names_code

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class FileName(click.Path):
    """A path as it is typed: not blank; ``~`` and ``~user`` become home folders."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """The path.

        Raises:
            click.BadParameter: If it is blank, or there is no such home folder.
        """
        text = os.fspath(value)
        if not text.strip():
            self.fail("the name is blank; name a file or a folder", param, ctx)
        try:
            return expanded(Path(text))
        except InputError as error:
            self.fail(str(error), param, ctx)


PATH = FileName()

MODEL_HELP = (
    "MODEL is a transformers folder or hub id, a .gguf file, smollm2-135m or gemma3-270m (from their PyPI packages), "
    "a torchvision name (resnet18), or a Python callable pkg.mod:fn."
)

source = click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="NAME[=PATH]",
    help="A kind of text: news, code, manual, talk, or NAME=PATH of a file or folder. For image models: digits, or "
    "NAME=FOLDER with a folder per class. Repeat it: several kinds carry over better than one.",
)
dtype = click.option(
    "--dtype", default="", metavar="DTYPE", help="float32, bfloat16 or float16. As stored, if not given."
)
device = click.option(
    "--device", default="cpu", show_default=True, help="Where the model runs: cpu, cuda, cuda:1, mps."
)
code = click.option(
    "--code",
    default="",
    metavar="PKG:FN",
    help="The function that builds the network of a run folder, where your own code does. It is run; names that files "
    "give never are.",
)
input_shape = click.option(
    "--input",
    "input",
    default="",
    metavar="SHAPE",
    help="What an image model takes, batch first: 1x3x32x32. Else as the run noted it, as its function says, of its "
    "source's images, or a guess, which is printed.",
)
seq_len = click.option("--seq-len", default=256, show_default=True, type=int, help="Tokens per window of text.")
eval_tokens = click.option(
    "--eval-tokens", default=2048, show_default=True, type=int, help="Evaluation tokens per source."
)


def run_folder(**more: Any) -> Decorator:
    """The option for the folder of a run.

    Args:
        more: As for ``click.option``.
    """
    return click.option("--out", type=PATH, help="The run folder. The same command resumes a stopped run.", **more)


def say_code(*names: str) -> None:
    """Say which of the names from the command line are code that will be imported and run."""
    for name in names:
        if names_code(name) and not Path(name).exists():
            err.print(f"running code: {name} (named on the command line)", markup=False)


def check_json(path: Path | None, *inputs: str | Path) -> None:
    """Assert that a JSON file can be written, before the work begins.

    Args:
        path: The file; nothing is checked without one.
        inputs: What the command reads: files, ``NAME=PATH``, or anything else.

    Raises:
        StoreError: If it cannot.
    """
    from regrow.store.outputs import JSON, check_output

    if path:
        files = [part for one in inputs for part in (str(one), str(one).partition("=")[2]) if part]
        check_output(path, JSON, files, streams=True)


def fraction(text: str | None, name: str) -> float:
    """A number above 0 and at most 1.

    Raises:
        click.UsageError: If it is not.
    """
    try:
        value = float(text or "")
    except ValueError:
        raise click.UsageError(f"{name} is a fraction like 0.8; got {text!r}") from None
    if not 0 < value <= 1:
        raise click.UsageError(f"{name} is the fraction that stays, above 0 and at most 1; got {text}")
    return value


def checked_target(text: str) -> str:
    """The unit of a target.

    Raises:
        click.UsageError: If it is no target.
    """
    from regrow.amounts import Target

    try:
        return str(Target.parse(text).measure)
    except ValueError as error:
        raise click.UsageError(f"--target: {error}") from None
