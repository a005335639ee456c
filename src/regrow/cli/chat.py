"""``regrow chat``: talk to a language model, or to two side by side."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import beside, say, working
from regrow.settings.shared import check_combination

if TYPE_CHECKING:
    from regrow.nets import Loaded

EPILOG = """\b
Examples
  regrow chat RUN                              chat with the result of a run
  regrow chat smollm2-135m RUN                 the original and the pruned model, side by side
  regrow chat RUN --prompt "What is a river?"  print one answer and exit

End with an empty line or Ctrl-D. /new starts a new conversation.
"""


_NO_TOKENIZER = "has no tokenizer, which chat needs; name a language model, for example smollm2-135m"


@click.command(cls=Verb, epilog=EPILOG)
@click.argument("model")
@click.argument("other", required=False)
@click.option("--prompt", help="Print the answer to this one message, and exit.")
@click.option("--longest", default=256, show_default=True, type=click.IntRange(min=1), help="Most tokens of an answer.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0: always the likeliest token.",
)
@click.option("--seed", default=0, show_default=True, type=int, help="Random seed of sampling.")
@flags.dtype
@flags.device
@flags.precision
def chat(
    model: str,
    other: str | None,
    prompt: str | None,
    longest: int,
    temperature: float,
    seed: int,
    dtype: str,
    device: str,
    precision: str,
) -> None:
    """Chat with MODEL, or with MODEL and OTHER side by side.

    Each is a run folder, or any model that `regrow prune` takes.
    """
    from regrow import store
    from regrow.evaluation.generation import reply
    from regrow.jobs.models import ModelSpec, load_model
    from regrow.nets.devices import autocasting

    check_combination(precision, dtype=dtype)
    names = [model, *([other] if other else [])]
    options.say_code(*names)
    with working() as progress:
        for name in names:
            if Path(name, store.SHAPES).is_file() and store.read_shapes(name).origin.kind == "callable":
                raise click.UsageError(f"{name} {_NO_TOKENIZER}")
        loaded = [load_model(ModelSpec(name, dtype=dtype, device=device), progress) for name in names]
    for name, one in zip(names, loaded, strict=True):
        if one.tokenizer is None:
            raise click.UsageError(f"{name} {_NO_TOKENIZER}")
    with ExitStack() as passes:
        for one in loaded:
            passes.enter_context(autocasting(one.model, precision))
        _converse(names, loaded, prompt, partial(reply, longest=longest, temperature=temperature, seed=seed))


def _converse(
    names: list[str], loaded: "list[Loaded]", prompt: str | None, reply: Callable[..., Iterator[str]]
) -> None:
    history: list[list[dict[str, str]]] = [[] for _ in loaded]
    for question in [prompt] if prompt is not None else _questions(history):
        for said in history:
            said.append({"role": "user", "content": question})
        replies = [reply(one.model, one.tokenizer, said) for one, said in zip(loaded, history, strict=True)]
        answers = beside(names, replies)
        for said, answer in zip(history, answers, strict=True):
            said.append({"role": "assistant", "content": answer})


def _questions(history: list[list[dict[str, str]]]) -> Iterator[str]:
    while True:
        try:
            text = click.prompt("you", prompt_suffix=" › ", default="", show_default=False).strip()
        except click.exceptions.Abort:
            say("")
            return
        if not text:
            return
        if text == "/new":
            for said in history:
                said.clear()
            continue
        yield text
