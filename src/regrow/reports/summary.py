"""Run folders as one record of everything that a page shows, validated, without loading a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from regrow.reports import quantities as q
from regrow.reports.reading import FolderContent, ReportError, read_run, widths
from regrow.reports.rows import SourceRow
from regrow.reports.runs import AccuracyMatrix, ChoiceTask, Course, Domain, Run, Sizes, Summary
from regrow.reports.search import read_search
from regrow.reports.words import MATRIX_FIGURES
from regrow.store.convert import convert

MAX_RUNS = 64
_SIDES = {
    "dense": "before",
    "before": "before",
    "cut": "cut",
    "pruned": "after",
    "after": "after",
    "recovered": "after",
}


def summarise(folders: Sequence[Path]) -> Summary:
    """Read run folders for :func:`to_html` and :func:`to_markdown`.

    Args:
        folders: The run folders, in the order of a comparison. Only ``run.json`` must exist in each.

    Returns:
        What is known of each run; ``missing`` and ``problems`` of a run say in words what is not.

    Raises:
        ReportError: If there is no folder, more than 64, or one without a valid ``run.json``.
    """
    if not 0 < len(folders) <= MAX_RUNS:
        raise ReportError(f"a report is made of 1 to {MAX_RUNS} run folders; got {len(folders)}")
    runs = [_run(read_run(Path(folder))) for folder in folders]
    runs = [replace(run, label=label) for run, label in zip(runs, _labels(runs), strict=True)]
    measured = [[row.source for row in run.perplexity if row.after] for run in runs]
    return Summary(runs, [source for source in measured[0] if all(source in names for names in measured)])


def _run(folder: FolderContent) -> Run:
    file, settings, findings = folder.run, folder.run.settings, folder.findings
    groups, frozen = widths(folder)
    model = q.in_words(settings.get("model", settings.get("space"))).rstrip("/\\").replace("\\", "/")
    keep, sources = settings.get("keep"), list[SourceRow]()
    models = {row.model for row in folder.of("perplexity")}
    sizes, tasks = Sizes(), dict[str, ChoiceTask]()
    for row in folder.of("size"):
        _put(sizes, row)
    for row in folder.of("choice"):
        _put(tasks.setdefault(row.task, ChoiceTask(row.task)), row)
    with folder.leave_out():
        sources = convert({"sources": file.sources}, dict[str, list[SourceRow]], "run.json", "left out")["sources"]
    return Run(
        name=folder.name,
        label="",
        file=file,
        model=model.rpartition("/")[2] or "the model",
        method=q.in_words(settings.get("method")),
        keep=float(keep) if isinstance(keep, float | int) and 0 <= keep <= 1 else None,
        target=q.in_words(settings.get("target")) if file.verb == "prune" else "",
        regular=settings.get("regular") is True,
        budget=folder.last("budget"),
        settings=_in_words({name: value for name, value in settings.items() if name not in ("sources", "pruning")}),
        method_settings=_in_words(settings.get("method_settings", settings.get("recovery_settings"))),
        defaults=_in_words(file.defaults),
        sources=sources,
        perplexity=_domains(folder),
        outcome="Recovered" if "recovered" in models else "Reconstructed" if "cut" in models else "After",
        choice=list(tasks.values()),
        size=sizes,
        verify=folder.of("verify")[-8:],
        reconstruction=folder.last("reconstruction"),
        recovery=folder.last("recovery"),
        training=folder.last("training"),
        widths=groups,
        frozen=frozen,
        scores=folder.scores,
        findings=findings if findings and (findings.spectrum or findings.modules) else None,
        course=_course(folder) if file.verb == "learn" else None,
        search=read_search(folder) if file.verb == "search" else None,
        missing=folder.missing,
        problems=folder.problems[:20],
    )


def _course(folder: FolderContent) -> Course:
    """Return the measurements of a continual-learning run."""
    records = {row.task: row for row in folder.of("task")}
    matrix = folder.last("matrix")
    ended, names = (matrix.matrix, matrix.tasks) if matrix else ([], [])
    rows = {i: row.accuracy for i, row in records.items()} | dict(enumerate(ended))
    count = next(i for i in range(len(rows) + 1) if i not in rows)
    learned = [rows[i] for i in range(count)]
    names = names + [record.name for _, record in sorted(records.items())[len(names) :]]
    names += [f"task {i + 1}" for i in range(len(names), max(map(len, learned), default=0))]
    whole = AccuracyMatrix(names, learned, matrix.before if matrix else [])
    if matrix and len(ended) == count:  # else further tasks are under way: their matrix is still to come
        for figure in MATRIX_FIGURES:
            setattr(whole, figure.name, getattr(matrix, figure.name))
    gone = folder.last("gone")
    kept = [records[i] for i in range(count) if i in records]
    return Course(whole, kept, folder.of("growth"), gone.tasks if gone else [])


def _put(record: Domain | ChoiceTask | Sizes, row: Any) -> None:
    """Put the row of a model on its side of a record, if the record has that side."""
    side = _SIDES.get(row.model, "")
    if hasattr(record, side):
        setattr(record, side, row)


def _domains(folder: FolderContent) -> list[Domain]:
    """Return one record per text domain: before and after, and of the cut if a fit or recovery followed it."""
    domains: dict[str, Domain] = {}
    for row in folder.of("perplexity"):
        domain = domains.setdefault(row.source, Domain(row.source))
        if row.model == "recovered" and domain.cut is None:
            domain.cut = domain.after
        elif row.model == "recovered" and domain.fitted is None:
            domain.fitted = domain.after
        if row.model in _SIDES:
            domain.seen = row.seen
            _put(domain, row)
    for pair in folder.of("paired"):
        if pair.source in domains:
            domains[pair.source].delta_nll, domains[pair.source].delta_se = pair.delta_nll, pair.se
    return list(domains.values())


def _in_words(values: object) -> dict[str, str]:
    """Return settings in words, without empty ones."""
    table = values if isinstance(values, Mapping) else {}
    return {name: words for name, value in list(table.items())[:60] if (words := q.in_words(value))}


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return a short, unique label of each run: method and keep, then seed, then its folder."""
    labels = []
    for run in runs:
        kept = run.target if run.keep is None else f"{run.keep:g}"
        labels.append(" ".join(filter(None, (run.method or run.name, kept, "regular" * run.regular)))[:60])
    seeds = [f"seed {run.settings['seed']}" if "seed" in run.settings else "" for run in runs]
    for suffixes in (seeds, [run.name for run in runs], [f"#{i + 1}" for i in range(len(runs))]):
        pairs = list(zip(labels, suffixes, strict=True))
        labels = [f"{label} {suffix}"[:90] if labels.count(label) > 1 else label for label, suffix in pairs]
    return labels
