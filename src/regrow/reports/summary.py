"""Run folders as one summary: everything that a page shows, validated, without loading a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from regrow.reports import quantities as q
from regrow.reports.reading import ReportError, RunRecord, read_run, scores, widths
from regrow.reports.records import (
    ChoiceTask,
    Domain,
    MaskingCheck,
    Pair,
    PairedDifference,
    Reconstruction,
    Sizes,
    SourceAccuracy,
    SourcePerplexity,
    SourceRow,
)
from regrow.reports.runs import AccuracyMatrix, Course, LearnedTask, Run, ShapeChange, Summary
from regrow.reports.search import search
from regrow.store.metrics import BudgetRow, SizeRow
from regrow.store.schemas import StageJson

FORMAT = "regrow-summary/1"
MAX_RUNS = 64
_SIDES = {
    "dense": "before",
    "before": "before",
    "cut": "cut",
    "pruned": "after",
    "after": "after",
    "recovered": "after",
}


class MissingTasks(msgspec.Struct, frozen=True):
    """Tasks whose data were missing."""

    tasks: list[str] = []


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    """Read run folders into one dictionary that can be written as JSON, for :func:`to_html` and :func:`to_markdown`.

    Args:
        folders: The run folders, in the order of a comparison. Only ``run.json`` must exist in each.

    Returns:
        The fields of :class:`regrow.reports.runs.Summary`; what is not known is ``None`` or empty, and ``missing`` and
        ``problems`` of a run say so in words.

    Raises:
        ReportError: If there is no folder, more than 64, or one without a valid ``run.json``.
    """
    summary: dict[str, Any] = msgspec.to_builtins(read_summary(folders))
    return summary


def read_summary(folders: Sequence[Path]) -> Summary:
    """Read run folders into one record."""
    if not 0 < len(folders) <= MAX_RUNS:
        raise ReportError(f"a report is made of 1 to {MAX_RUNS} run folders; got {len(folders)}")
    runs = [_run(read_run(Path(folder))) for folder in folders]
    labels = _labels(runs)
    runs = [msgspec.structs.replace(run, label=label) for run, label in zip(runs, labels, strict=True)]
    measured = [[row.source for row in run.perplexity if row.after] for run in runs]
    return Summary(FORMAT, runs, [kind for kind in measured[0] if all(kind in names for names in measured)])


def _run(folder: RunRecord) -> Run:
    run, settings = folder.run, folder.run.settings
    groups, frozen = widths(folder)
    model = q.in_words(settings.get("model", settings.get("space"))).rstrip("/\\").replace("\\", "/")
    keep = settings.get("keep")
    return Run(
        name=folder.name,
        label="",
        verb=run.verb or "prune",
        command=run.command,
        model=model.rpartition("/")[2] or "the model",
        method=q.in_words(settings.get("method")),
        keep=float(keep) if isinstance(keep, float | int) and 0 <= keep <= 1 else None,
        measure=q.in_words(settings.get("measure")),
        target=q.in_words(settings.get("target")) if run.verb == "prune" else "",
        regular=settings.get("regular") is True,
        budget=folder.last("budget", BudgetRow),
        settings=_pairs({name: value for name, value in settings.items() if name not in ("sources", "pruning")}),
        method_settings=_pairs(settings.get("method_settings", settings.get("recovery_settings"))),
        defaults=_pairs(run.defaults),
        sources=folder.each("run.json: sources", run.sources, SourceRow),
        versions=_pairs(run.versions),
        started=run.started,
        finished=run.finished or "",
        seconds=run.seconds,
        notes=run.notes,
        perplexity=_domains(folder),
        outcome=_outcome(folder),
        choice=_tasks(folder),
        size=Sizes(**_by_side(folder.rows("size", SizeRow), ("before", "after"))),
        verify=folder.rows("verify", MaskingCheck)[-8:],
        reconstruction=folder.last("reconstruction", Reconstruction),
        widths=groups,
        frozen=frozen,
        scores=scores(folder, groups),
        findings=folder.findings if folder.findings and (folder.findings.spectrum or folder.findings.modules) else None,
        course=_course(folder),
        search=search(folder),
        stages=_stages(folder),
        missing=folder.missing,
        problems=folder.problems[:20],
    )


def _course(folder: RunRecord) -> Course | None:
    """Return the measurements of a continual-learning run; ``None`` if it is a run of another kind."""
    if folder.run.verb != "learn":
        return None
    records = {row.task: row for row in folder.rows("task", LearnedTask)}
    matrix = folder.last("matrix", AccuracyMatrix) or AccuracyMatrix()
    rows = {i: row.accuracy for i, row in records.items()} | dict(enumerate(matrix.matrix))
    count = next(i for i in range(len(rows) + 1) if i not in rows)
    names = matrix.tasks + [record.name for _, record in sorted(records.items())[len(matrix.tasks) :]]
    names += [f"task {i + 1}" for i in range(len(names), max((len(rows[i]) for i in range(count)), default=0))]
    learned = [rows[i] for i in range(count)]
    done = len(matrix.matrix) == count  # else further tasks are under way: their matrix is still to come
    if done:
        whole = msgspec.structs.replace(matrix, matrix=learned, tasks=names)
    else:
        whole = AccuracyMatrix(names, learned, matrix.before)
    gone = folder.last("gone", MissingTasks)
    kept = [records[i] for i in range(count) if i in records]
    return Course(whole, kept, folder.rows("growth", ShapeChange), gone.tasks if gone else [])


def _domains(folder: RunRecord) -> list[Domain]:
    """Return one row per text domain: perplexity before and after, and of the cut if a fit or recovery followed it."""
    by_source: dict[str, dict[str, Any]] = {}
    for row in folder.rows("perplexity", SourcePerplexity):
        sides = by_source.setdefault(row.source, {"seen": False})
        if row.model == "recovered" and "after" in sides:
            sides.setdefault("fitted" if "cut" in sides else "cut", sides["after"])
        if side := _SIDES.get(row.model):
            sides |= {side: row, "seen": row.seen}
    pairs = {row.source: row for row in folder.rows("paired", PairedDifference)}
    for source, sides in by_source.items():
        if source in pairs:
            sides |= {"delta_nll": pairs[source].delta_nll, "delta_se": pairs[source].se}
    return [Domain(source, **sides) for source, sides in by_source.items()]


def _tasks(folder: RunRecord) -> list[ChoiceTask]:
    rows: dict[str, list[SourceAccuracy]] = {}
    for row in folder.rows("choice", SourceAccuracy):
        rows.setdefault(row.task, []).append(row)
    return [ChoiceTask(task, **_by_side(members, ("before", "cut", "after"))) for task, members in rows.items()]


def _by_side(rows: Sequence[Any], sides: Sequence[str]) -> dict[str, Any]:
    """Return side → the last row of a model on that side."""
    return {side: row for row in rows if (side := _SIDES.get(row.model, "")) in sides}


def _outcome(folder: RunRecord) -> str:
    """Return what the last measurements of a run are those of: the cut, a reconstruction or a recovery."""
    models = {row.get("model") for row in folder.metrics.get("perplexity", [])}
    return "Recovered" if "recovered" in models else "Reconstructed" if "cut" in models else "After"


def _stages(folder: RunRecord) -> list[StageJson]:
    """Return the runs that made the network, in order, if it has had more than this one."""
    return [*folder.run.stages, *filter(None, [folder.run.stage])] if folder.run.stages else []


def _pairs(values: object) -> list[Pair]:
    """Return settings as names and words, without empty ones."""
    table = values if isinstance(values, Mapping) else {}
    return [Pair(name, words) for name, value in list(table.items())[:60] if (words := q.in_words(value))]


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a short, unique label of each run: method and keep, then seed, then its folder."""
    labels = []
    for run in runs:
        kept = run.target if run.keep is None else f"{run.keep:g}"
        labels.append(" ".join(filter(None, (run.method or run.name, kept, "regular" * run.regular)))[:60])
    seeds = [next((f"seed {pair.value}" for pair in run.settings if pair.name == "seed"), "") for run in runs]
    for suffixes in (seeds, [run.name for run in runs], [f"#{i + 1}" for i in range(len(runs))]):
        pairs = list(zip(labels, suffixes, strict=True))
        labels = [f"{label} {suffix}"[:90] if labels.count(label) > 1 else label for label, suffix in pairs]
    return labels
