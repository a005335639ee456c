"""Commands that write a run folder: their processes, the report page, and what they print of results."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from regrow.cli import screen
from regrow.cli.screen import print_table, say, say_peak, show_progress
from regrow.core.amounts import format_bytes
from regrow.distributed import ProcessRank, read_ranks
from regrow.store.atomic import PAGE

if TYPE_CHECKING:
    from regrow.jobs.recording import Invocation


@contextmanager
def recorded_run(out: Path | None, *, code: str = "", memory: str = "") -> "Iterator[Invocation]":
    """Context manager: yield an ``Invocation``, with which the block runs a job that writes ``out``; print the result.

    ``out``: the run folder, which was checked to be given; ``code``, ``memory``: the values of these options; empty:
    not given. Of several processes, only rank 0 prints and writes the page.
    """
    assert out is not None  # as `check_command_line` found
    from regrow.jobs.recording import Invocation
    from regrow.reports import write_run_page
    from regrow.store.run_record import read_run

    with join_processes() as ranks:
        if not ranks.leads:
            yield Invocation(out, code, memory, ranks=ranks)
            return
        with show_progress() as progress:
            yield Invocation(out, code, memory, ranks, say, progress, write_run_page)
        snapshot = read_run(out).get("snapshot")  # an error if the folder was deleted meanwhile
        say_run(out)
        if snapshot:
            size = format_bytes(snapshot["bytes"])
            say(f"{out / 'before'} holds the model before, {size}: `regrow undo {out} --out {out}-before` copies it")
        page = out / PAGE
        say(f"the result is in {out}{f'; open {page}' if page.is_file() else ''}")


@contextmanager
def join_processes() -> Iterator[ProcessRank]:
    """Context manager: connect this process with those that torchrun started, and yield its rank; only rank 0 prints.

    A single process is not connected. Of several, one whose peer has failed or ended ends at the next exchange, with
    one line on the error stream.
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
    """Print the report of a run folder: result, quality of its networks, warnings, and the command to go on with."""
    from regrow.reports import read_runs, summary

    (run,) = read_runs([path])
    head = summary.summarise(run)
    for line in (head.sentence, *head.details):
        say(line)
    figures = [(row.label, row.before, row.after, row.remark) for row in head.figures]
    print_table("Before and after", ("", "before", "after", ""), figures, numbers=(1, 2))
    if run.quality:
        quality = summary.quality_table(run)
        rows = [[cell.partition(" ± ")[0] for cell in row] for row in quality.rows]
        print_table(quality.title, quality.columns, rows, numbers=range(1, len(quality.columns)))
    if run.task_results.accuracies:
        matrix = summary.accuracy_table(run)
        first, *tasks, last = matrix.columns
        columns = (first, *(str(1 + i) for i in range(len(tasks))), last)  # tasks by number
        print_table(matrix.title, columns, matrix.rows, numbers=range(1, len(columns)))
    if run.file.verb not in ("learn", "search"):
        say(summary.describe_proof(run))
    for note in dict.fromkeys([*head.alarms, *run.file.notes]):  # each once
        say(f"note: {note}")
    if run.file.memory:
        say_peak(run.file.memory)
    if command := summary.next_command(run, str(path)):
        say(f"go on with: {command}")
