"""``regrow evaluate``: how good and how big a model is."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.recover import tell
from regrow.cli.screen import number, say, table, working


@click.command(cls=Verb)
@click.argument("model")
@options.source
@click.option("--choices", multiple=True, type=options.PATH, help="Multiple-choice items, JSON lines (.gz).")
@click.option(
    "--harness",
    multiple=True,
    metavar="TASK|FILE",
    help="Let EleutherAI's lm-eval run one of its tasks (arc_easy; it fetches the data), or a file of items as for "
    "--choices, on which it fetches nothing.",
)
@click.option("--items", default=200, show_default=True, type=int, help="How many items of each file or task.")
@click.option("--speed", is_flag=True, help="Also time a forward pass.")
@options.eval_tokens
@options.seq_len
@click.option("--json", "json_file", type=options.PATH, help="Also write everything to this file.")
@options.code
@options.dtype
@options.device
@options.input_shape
def evaluate(model: str, json_file: Path | None, **given: Any) -> None:
    """Evaluate MODEL: a run folder, or anything that `regrow prune` takes. Uses the evaluation half of each source."""
    from regrow.commands import RunFolder
    from regrow.commands.evaluate import evaluated

    options.check_json(json_file, model, *given["choices"], *given["harness"], *given["sources"])
    options.say_code(model, given["code"])
    measured = RunFolder(Path(model)).metrics() if Path(model, "run.json").is_file() else []
    with working() as progress:
        result = evaluated(model, progress=progress, **given)
    if json_file:
        import json

        from regrow.store.outputs import JSON, write_output

        write_output(json_file, json.dumps(result, indent=1) + "\n", JSON)
    size = result["size"]
    say(f"{number(size['parameters'])} parameters, {number(size['bytes'])} bytes in {size['dtype']}")
    rows = [(p["source"], number(p["ppl"]), number(p["ppl_error"], 2), p["tokens"]) for p in result["perplexity"]]
    if rows:
        table("Perplexity", ("kind", "perplexity", "± se", "tokens"), rows, numbers=(1, 2, 3))
    for row in result["choices"]:
        whole, by_length = (
            f"{row[key]:.3f} ± {row[f'error{key[8:]}']:.3f}" for key in ("accuracy", "accuracy_per_byte")
        )
        say(f"{row['task']}: accuracy {whole}, length-normalised {by_length} (n = {row['items']})")
    for row in result["harness"]:
        say(f"{row['task']} in lm-eval: {_figures(row['metrics'])} (n = {row['items']})")
    for row in result["accuracy"]:
        say(f"{row['source']}: accuracy {row['accuracy']:.3f} ± {row['error']:.3f} ({row['images']} images)")
    if result["speed"]:
        speed = result["speed"]
        say(f"{speed['per_second']:.1f} positions a second, {1000 * speed['seconds_median']:.1f} ms a call (median)")
    tell(measured)  # where the run recovered a cut: dense, pruned and recovered


def _figures(metrics: dict[str, float]) -> str:
    """``acc 0.500 ± 0.050, acc_norm …``."""
    errors = {name: f" ± {metrics[f'{name}_stderr']:.3f}" for name in metrics if f"{name}_stderr" in metrics}
    names = [name for name in metrics if not name.endswith("_stderr")]
    return ", ".join(f"{name} {metrics[name]:.3f}{errors.get(name, '')}" for name in names)
