"""``regrow evaluate`` and ``regrow chat``: measure a model, and talk to a language model, or to two of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import click

from regrow.cli import command
from regrow.cli.command import Verb
from regrow.cli.completion import complete
from regrow.cli.screen import format_number, print_table, say, say_peak, say_pieces, show_progress
from regrow.settings.evaluate import Settings

EPILOG = """\b
Examples
  regrow chat RUN                              chat with the result of a run
  regrow chat smollm2-135m RUN                 the original and the pruned model, in turn
  regrow chat RUN --prompt "What is a river?"  print one answer and exit

End with an empty line or Ctrl-D.
"""
_NO_TOKENIZER = "has no tokenizer, which chat needs; name a language model, for example smollm2-135m"


@click.command(cls=Verb, settings=Settings)
@click.option("--json", "json_file", type=command.PATH, help="Also write all results to this JSON file.")
@command.code
@command.memory
def evaluate(settings: Settings, json_file: Path | None, code: str, memory: str) -> None:
    """Measure quality, size and speed of MODEL.

    Quality is measured on the evaluation half of each source.
    """
    command.announce_code(settings.model, code)
    from regrow.jobs.evaluate import evaluate_named as run_job
    from regrow.jobs.recording import Invocation
    from regrow.store.atomic import JSON, write_output

    with show_progress() as progress:
        result = run_job(settings, Invocation("", code, memory, announce=say, progress=progress))
    if json_file:
        write_output(json_file, json.dumps(result, indent=1) + "\n", JSON)
    size = result["size"]
    say(f"{format_number(size['parameters'])} parameters, {format_number(size['bytes'])} bytes in {size['dtype']}")
    texts = result["perplexity"]
    rows = [(p["source"], format_number(p["ppl"]), format_number(p["ppl_error"], 2), p["tokens"]) for p in texts]
    if rows:
        print_table("Perplexity", ("source", "perplexity", "± se", "tokens"), rows, numbers=(1, 2, 3))
    for row in result["choices"]:
        whole = f"{row['accuracy']:.3f} ± {row['error']:.3f}"
        by_length = f"{row['accuracy_per_byte']:.3f} ± {row['error_per_byte']:.3f}"
        say(f"{row['task']}: accuracy {whole}, length-normalised {by_length} (n = {row['items']})")
    for row in result["accuracy"]:
        say(f"{row['source']}: accuracy {row['accuracy']:.3f} ± {row['error']:.3f} ({row['images']} images)")
    if not (rows or result["choices"] or result["accuracy"] or result["speed"]):
        say("note: quality was not measured; name a source, for example --source manual or --source mine=FILE")
    if speed := result["speed"]:
        say(f"{speed['per_second']:.1f} positions a second, {1000 * speed['seconds_median']:.1f} ms a call (median)")
    if memory:
        say_peak(result["memory"])


@click.command(cls=Verb, epilog=EPILOG)
@click.argument("model", shell_complete=complete)
@click.argument("other", required=False, shell_complete=complete)
@click.option("--prompt", "prompts", multiple=True, help="Print the answer to this message, and exit. Repeatable.")
@click.option("--longest", default=256, show_default=True, type=click.IntRange(min=1), help="Most tokens of an answer.")
@click.option(
    "--temperature",
    default=0.0,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Sampling temperature; 0: always the likeliest token.",
)
@command.dtype
@command.device
def chat(
    model: str, other: str | None, prompts: tuple[str, ...], longest: int, temperature: float, dtype: str, device: str
) -> None:
    """Chat with MODEL, or with two models in turn.

    MODEL and OTHER both answer each message. Each is a run folder, or any model that `regrow prune` takes.
    """
    from regrow import store
    from regrow.evaluation.generation import reply
    from regrow.jobs.models import ModelSpec, load_model

    names = [model, *([other] if other else [])]
    command.announce_code(model, other or "")
    with show_progress() as progress:
        for name in names:
            if Path(name, store.SHAPES).is_file() and store.read_shapes(name).origin.kind == "callable":
                raise click.UsageError(f"{name} {_NO_TOKENIZER}")
        models = [load_model(ModelSpec(name, dtype=dtype, device=device), progress) for name in names]
    for name, loaded in zip(names, models, strict=True):
        if loaded.tokenizer is None:
            raise click.UsageError(f"{name} {_NO_TOKENIZER}")
    history: list[list[dict[str, str]]] = [[] for _ in models]
    for question in prompts or _ask_questions():
        if len(prompts) > 1:
            say(f"you › {question}")
        for name, loaded, messages in zip(names, models, history, strict=True):
            if prompts:  # each is a conversation of its own
                messages.clear()
            messages.append({"role": "user", "content": question})
            pieces = reply(loaded.model, loaded.tokenizer, messages, longest=longest, temperature=temperature)
            messages.append({"role": "assistant", "content": say_pieces(name, pieces)})


def _ask_questions() -> Iterator[str]:
    """Ask on the terminal and yield each line that is typed, without outer blanks, until an empty one or Ctrl-D."""
    while True:
        try:
            text = click.prompt("you", prompt_suffix=" › ", default="", show_default=False).strip()
        except click.exceptions.Abort:
            say("")
            return
        if not text:
            return
        yield text
