"""Commands that write a run folder: their processes, the report page, and what they print of results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import screen
from regrow.cli.screen import say, say_peak, table, working
from regrow.core.amounts import format_bytes
from regrow.distributed import ProcessRank, read_ranks

if TYPE_CHECKING:
    from regrow.jobs.recording import Invocation

PAGE = "report.html"


class RunPage:
    """Writes the report page of a run into its folder, as the run finishes.

    A run finishes without a page if a package is missing or the page cannot be made; if the disk cannot take the page,
    the run fails and can be resumed.
    """

    error: Exception | None = None
    """What prevented the page."""

    def __call__(self, folder: Path) -> None:
        """Write the page into the complete folder of a run, or raise StoreError if the file cannot be written."""
        from regrow.reports import write_page
        from regrow.store.errors import StoreError

        self.error = None
        try:
            write_page([folder], folder / PAGE)
        except StoreError:
            raise
        except Exception as error:
            self.error = error


@contextmanager
def recorded_run(
    what: str, out: Path | None, *, code: str = "", memory: str = "", track: str
) -> "Iterator[Invocation]":
    """Yield how a command is called, for the ``with`` block to run it; then print the result, and where it is.

    The result is a folder with a ``what``: a model or a network. Of several processes, only rank 0 prints and writes
    the page.
    """
    if out is None:
        raise click.UsageError("--out names the folder of the run, for example --out run")
    from regrow.jobs.recording import Invocation
    from regrow.reports import ReportError
    from regrow.store.run_record import read_run

    page = RunPage()
    with processes() as ranks:
        if not ranks.leads:
            yield Invocation(out, code, memory, ranks=ranks)
            return
        with working() as progress:
            yield Invocation(out, code, memory, track, ranks, say, progress, page)
        snapshot = read_run(out).get("snapshot")  # an error if the folder was deleted meanwhile
        say_run(out)
        if snapshot:
            size = format_bytes(snapshot["bytes"])
            say(f"{out / 'before'} holds what the run started from, {size}: `regrow undo {out}`")
        if page.error is not None:
            say(f"the {what} is in {out}; no page was written: {page.error}")
            if not isinstance(page.error, ReportError):
                raise page.error
        elif (out / PAGE).is_file():
            say(f"{what} and page are in {out}; open {out / PAGE}")


@contextmanager
def processes() -> Iterator[ProcessRank]:
    """Connect this process with those that torchrun started for its run; yields its rank. Only rank 0 prints results.

    A rank ends with one line on the error stream at its next exchange with one that has failed or ended.
    """
    ranks = read_ranks()
    if not ranks.several:
        yield ranks
        return
    from regrow.distributed.parallel import connected

    screen.out.quiet = screen.out.quiet or not ranks.leads
    with connected(ranks):
        yield ranks


def say_run(path: Path) -> None:
    """Print what the page of a run says at its head, and the quality of its networks."""
    from regrow.reports import quantities, summarise, words
    from regrow.reports.page import describe

    (run,) = summarise([path]).runs
    text = describe(run)
    for line in (text.headline, *text.details, *words.reconstruction(run)):
        say(line)
    table("Key numbers", ("", "", ""), [(key.label, key.value, key.below) for key in text.keys], numbers=(1,))
    if run.perplexity:
        sides = [side for side in ("before", "cut", "fitted", "after") if any(row.ppl(side) for row in run.perplexity)]
        rows = [
            (
                f"{row.source} ({'seen' if row.seen else 'unseen'})",
                *(quantities.significant(row.ppl(side)) for side in sides),
                quantities.factor(row.ratio),
                quantities.percent(row.recovered),
            )
            for row in run.perplexity
        ]
        columns = ("source", *sides, "change", "loss recovered")
        table("Perplexity on the evaluation half of each source", columns, rows, numbers=range(1, len(columns)))
    if run.course:
        tasks, rows = run.course.matrix.tasks, []
        sizes = {row.name: f"{row.parameters:,}" for row in run.course.records}
        for name, row in zip(tasks, run.course.matrix.matrix, strict=False):
            cells = [f"{100 * value:.1f}" if value is not None else "–" for value in row]
            rows.append((name, *cells, *[""] * (len(tasks) - len(row)), sizes.get(name, "")))
        columns = ("after learning", *(f"{i + 1}" for i in range(len(tasks))), "parameters")
        table("Accuracy on each task, per cent", columns, rows, numbers=range(1, len(columns)))
    for task in run.choice:
        known = [row for row in (task.before, task.cut, task.after) if row]
        accuracies = " → ".join(f"{row.acc:.3f}" for row in known)
        say(f"accuracy on {task.task}: {accuracies} (n = {known[-1].n})")
    if done := run.training:
        loss = f"{quantities.significant(done.loss_before)} → {quantities.significant(done.loss_after)}"
        say(f"trained {done.train} parameters for {done.steps} steps; loss on the training data {loss}")
    if repair := run.recovery:
        say(f"recovered by {repair.by} on {repair.tokens:,} tokens in {repair.seconds:.0f} s")
    for note in dict.fromkeys([*text.alarms, *run.file.notes]):
        say(f"note: {note}")
    if run.file.memory:
        say_peak(run.file.memory)
