"""Commands that write a run folder: their processes, the report page, and what they print of results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.cli import screen
from regrow.cli.screen import say, say_peak, table, working
from regrow.core.amounts import format_bytes
from regrow.distributed import ProcessRank, read_ranks
from regrow.store.atomic import PAGE

if TYPE_CHECKING:
    from regrow.jobs.recording import Invocation


@contextmanager
def recorded_run(out: Path | None, *, code: str = "", memory: str = "") -> "Iterator[Invocation]":
    """Yield how a command is called, for the ``with`` block to run it; then print the result, and where it is.

    Of several processes, only rank 0 prints and writes the page.
    """
    assert out is not None  # as `check_words` found
    from regrow.jobs.recording import Invocation
    from regrow.reports import write_run_page
    from regrow.store.run_record import read_run

    with processes() as ranks:
        if not ranks.leads:
            yield Invocation(out, code, memory, ranks=ranks)
            return
        with working() as progress:
            yield Invocation(out, code, memory, ranks, say, progress, write_run_page)
        snapshot = read_run(out).get("snapshot")  # an error if the folder was deleted meanwhile
        say_run(out)
        if snapshot:
            size = format_bytes(snapshot["bytes"])
            say(f"{out / 'before'} holds what the run started from, {size}: `regrow undo {out}`")
        page = out / PAGE
        say(f"the result is in {out}{f'; open {page}' if page.is_file() else ''}")


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
    """Print what the page of a run says at its head, the quality of its networks, and the command to go on with."""
    from regrow.reports import read_runs, summary

    (run,) = read_runs([path])
    told = summary.summarise(run)
    for line in (told.sentence, *told.details):
        say(line)
    figures = [(row.label, row.before, row.after, row.remark) for row in told.figures]
    table("Before and after", ("", "before", "after", ""), figures, numbers=(1, 2))
    if run.quality:
        quality = summary.quality_table(run)
        rows = [[cell.partition(" ± ")[0] for cell in row] for row in quality.rows]
        table(quality.title, quality.columns, rows, numbers=range(1, len(quality.columns)))
    if run.task_results.accuracies:
        known = summary.accuracy_table(run)
        columns = (known.columns[0], *map(str, range(1, len(known.columns) - 1)), known.columns[-1])
        table(known.title, columns, known.rows, numbers=range(1, len(columns)))
    if run.file.verb not in ("learn", "search"):
        say(summary.describe_proof(run))
    for note in dict.fromkeys([*told.alarms, *run.file.notes]):
        say(f"note: {note}")
    if run.file.memory:
        say_peak(run.file.memory)
    if command := summary.next_command(run):
        say(f"go on with: {command}")
