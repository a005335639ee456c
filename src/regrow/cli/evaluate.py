"""``regrow evaluate``: measure the quality, size and speed of a model."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Given
from regrow.cli.results import say_outcome
from regrow.cli.screen import number, say, say_peak, table, working, write_json
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
    from regrow.jobs.evaluate import run as run_job
    from regrow.jobs.recording import Invocation
    from regrow.store.run_folder import RunFolder

    folder = Path(settings.model)
    run = RunFolder(folder) if (folder / "run.json").is_file() else None
    if run:
        run.metrics()  # damaged ones are refused before anything is measured
    with working() as progress:
        result = run_job(settings, Invocation("", code, memory, announce=say, progress=progress))
    if json_file:
        write_json(json_file, result)
    size = result["size"]
    say(f"{number(size['parameters'])} parameters, {number(size['bytes'])} bytes in {size['dtype']}")
    rows = [(p["source"], number(p["ppl"]), number(p["ppl_error"], 2), p["tokens"]) for p in result["perplexity"]]
    if rows:
        table("Perplexity", ("source", "perplexity", "± se", "tokens"), rows, numbers=(1, 2, 3))
    for row in result["choices"]:
        whole = f"{row['accuracy']:.3f} ± {row['error']:.3f}"
        by_length = f"{row['accuracy_per_byte']:.3f} ± {row['error_per_byte']:.3f}"
        say(f"{row['task']}: accuracy {whole}, length-normalised {by_length} (n = {row['items']})")
    for row in result["harness"]:
        metrics, parts = row["metrics"], []
        for name in (name for name in metrics if not name.endswith("_stderr")):
            error = metrics.get(f"{name}_stderr")
            parts.append(f"{name} {metrics[name]:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
        say(f"{row['task']} in lm-eval: {', '.join(parts)} (n = {row['items']})")
    for row in result["accuracy"]:
        say(f"{row['source']}: accuracy {row['accuracy']:.3f} ± {row['error']:.3f} ({row['images']} images)")
    if speed := result["speed"]:
        say(f"{speed['per_second']:.1f} positions a second, {1000 * speed['seconds_median']:.1f} ms a call (median)")
    if memory:
        say_peak(result["memory"])
    if run and any(row["what"] == "recovery" for row in run.metrics()):
        say_outcome(run)
