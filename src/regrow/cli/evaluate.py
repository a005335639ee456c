"""``regrow evaluate``: measure the quality, size and speed of a model."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Given
from regrow.cli.results import say_outcome
from regrow.cli.screen import number, say, say_peak, table, working
from regrow.settings.evaluate import Settings


@click.command(cls=Verb, settings=Settings)
@click.option("--json", "json_file", type=options.PATH, help="Also write all results to this JSON file.")
@options.code
@options.memory(
    "How much memory the evaluation may use, like 4GiB. If the model does not fit, it is read one block at a time, "
    "with the same result; how is printed first. For text models in a transformers folder or run folder, or packaged "
    "ones."
)
def evaluate(given: Given[Settings], json_file: Path | None, code: str, memory: str) -> None:
    """Measure quality, size and speed of MODEL, on the evaluation half of each source."""
    settings = given.build()
    options.say_code(settings.model, code)
    from regrow.jobs import evaluate as evaluation
    from regrow.store.run_folder import RunFolder

    folder = Path(settings.model)
    run = RunFolder(folder) if (folder / "run.json").is_file() else None
    if run:
        run.metrics()  # damaged ones are refused before anything is measured
    with working() as progress:
        result = evaluation.evaluate(settings, progress, code=code, memory=memory, announce=say)
    if json_file:
        import json

        from regrow.store.atomic import JSON, write_output

        write_output(json_file, json.dumps(result, indent=1) + "\n", JSON)
    size = result["size"]
    say(f"{number(size['parameters'])} parameters, {number(size['bytes'])} bytes in {size['dtype']}")
    rows = [(p["source"], number(p["ppl"]), number(p["ppl_error"], 2), p["tokens"]) for p in result["perplexity"]]
    if rows:
        table("Perplexity", ("source", "perplexity", "± se", "tokens"), rows, numbers=(1, 2, 3))
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
    if memory:
        say_peak(result["memory"])
    if run and any(row["what"] == "recovery" for row in run.metrics()):
        say_outcome(run)


def _figures(metrics: dict[str, float]) -> str:
    """Return the metrics of an lm-eval task in words: ``acc 0.500 ± 0.050, acc_norm …``."""
    errors = {name: f" ± {metrics[f'{name}_stderr']:.3f}" for name in metrics if f"{name}_stderr" in metrics}
    names = [name for name in metrics if not name.endswith("_stderr")]
    return ", ".join(f"{name} {metrics[name]:.3f}{errors.get(name, '')}" for name in names)
