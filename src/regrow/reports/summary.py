"""Run folders as one plain dictionary: everything that a page shows, checked, without loading a model."""

import math
from pathlib import Path
from typing import Any

from regrow.reports.course import course
from regrow.reports.findings import findings
from regrow.reports.fitted import reconstruction
from regrow.reports.reading import (
    JsonObject,
    ReportError,
    RunRecord,
    items,
    mapping,
    number,
    objects,
    read_run,
    size,
    text,
)
from regrow.reports.records import (
    BudgetFigures,
    MaskingCheck,
    Pair,
    Run,
    SourceRow,
    StageRow,
    Summary,
)
from regrow.reports.search import search
from regrow.reports.widths import scores, widths

FORMAT = "regrow-summary/1"
MAX_RUNS = 64
MAX_KINDS = 200

_MODELS = {
    "dense": "before",
    "before": "before",
    "cut": "cut",
    "pruned": "after",
    "after": "after",
    "recovered": "after",
}
_SIZES = ("params_all", "params_counted", "macs", "bytes")
_SPEEDS = ("tokens_per_s", "spread", "latency_ms", "peak_bytes")


def summarise(folders: list[Path]) -> Summary:
    """Read run folders into one dictionary that can be written as JSON, for :func:`to_html` and :func:`to_markdown`.

    Args:
        folders: The run folders, in the order of a comparison. Only ``run.json`` must exist in each.

    Returns:
        ``format``, ``runs`` (one dictionary per folder; what is not known is ``None`` or empty, and ``missing`` and
        ``problems`` say so in words) and ``kinds`` (the text domains that all runs were evaluated on).

    Raises:
        ReportError: If there is no folder, more than 64, or one without a readable ``run.json``.
    """
    if not 0 < len(folders) <= MAX_RUNS:
        raise ReportError(f"a report is made of 1 to {MAX_RUNS} run folders; got {len(folders)}")
    runs = [_run(read_run(Path(folder))) for folder in folders]
    _name(runs)
    measured = [[row["source"] for row in run["perplexity"] if row["after"]] for run in runs]
    shared = [kind for kind in measured[0] if all(kind in kinds for kinds in measured)]
    for run in runs:
        run["means"]["shared"] = _mean([row for row in run["perplexity"] if row["source"] in shared])
    return {"format": FORMAT, "runs": runs, "kinds": shared}


def _run(folder: RunRecord) -> Run:
    run, settings = folder.run, mapping(folder.run.get("settings"))
    kinds, frozen = widths(folder)
    metrics: dict[str, list[JsonObject]] = {}
    for row in folder.metrics:
        metrics.setdefault(text(row.get("what")), []).append(row)
    sources = _sources(run, settings)
    perplexity = _perplexity(metrics, sources)
    if not run.get("finished"):
        folder.problems.append("run.json has no finishing time: the run was interrupted or is still in progress")
    return {
        "name": text(folder.name) or "run",
        "label": "",
        "verb": text(run.get("verb")) or "prune",
        "command": text(run.get("command"), 8000),
        "model": _short(text(settings.get("model", settings.get("space")), 300)) or "the model",
        "method": text(settings.get("method")),
        "keep": number(settings.get("keep"), 0, 1),
        "measure": text(settings.get("measure"), 20),
        "target": text(settings.get("target"), 60) if run.get("verb") == "prune" else "",
        "regular": settings.get("regular") is True,
        "budget": _budget(metrics.get("budget", [])),
        "settings": _pairs(settings, skip=("sources", "method_settings", "pruning", "recovery_settings")),
        "method_settings": _pairs(mapping(settings.get("method_settings", settings.get("recovery_settings")))),
        "defaults": _pairs(mapping(run.get("defaults"))),
        "sources": sources,
        "versions": _pairs(mapping(run.get("versions"))),
        "started": text(run.get("started"), 40),
        "finished": text(run.get("finished"), 40),
        "seconds": [
            {"stage": text(stage, 40), "seconds": seconds}
            for stage, value in list(mapping(run.get("seconds")).items())[:40]
            if (seconds := number(value, 0, 1e10)) is not None
        ],
        "notes": [line for note in items(run.get("notes")) if (line := text(note, 1000))],
        "perplexity": perplexity,
        "outcome": _outcome(metrics.get("perplexity", [])),
        "means": {
            "seen": _mean([row for row in perplexity if row["seen"]]),
            "unseen": _mean([row for row in perplexity if row["seen"] is False]),
            "all": _mean(perplexity),
        },
        "choice": _choice(metrics.get("choice", [])),
        "size": _sides(metrics.get("size", []), _SIZES),
        "speed": _sides(metrics.get("speed", []), _SPEEDS),
        "verify": [_verify(row) for row in metrics.get("verify", [])[-8:]],
        "reconstruction": reconstruction(metrics.get("reconstruction", [])),
        "widths": kinds,
        "frozen": frozen,
        "scores": scores(folder, kinds),
        "findings": findings(folder),
        "course": course(folder),
        "search": search(folder),
        "stages": _stages(run),
        "missing": folder.missing,
        "problems": folder.problems[:20],
    }


def _perplexity(metrics: dict[str, list[JsonObject]], sources: list[SourceRow]) -> list[dict[str, Any]]:
    """Return one row per text domain: perplexity before and after, and their ratio.

    If a reconstruction or recovery followed a cut, ``after`` is the perplexity after it, ``cut`` that after the cut,
    and ``recovered`` the fraction of the lost log-perplexity that was won back; ``fitted`` is the perplexity after the
    first of the two.
    """
    calibrated = {row["name"]: bool(row["calibration_tokens"]) for row in sources}
    cut = {text(line.get("source"), 60) for line in metrics.get("perplexity", []) if line.get("model") == "cut"}
    rows: dict[str, dict[str, Any]] = {}
    for line in metrics.get("perplexity", []):
        source, side = text(line.get("source"), 60), _MODELS.get(text(line.get("model")))
        if not source or not side or (source not in rows and len(rows) >= MAX_KINDS):
            continue
        blank = dict.fromkeys(("before", "cut", "fitted", "after"))
        row = rows.setdefault(source, {"source": source, "seen": calibrated.get(source), **blank})
        row["seen"] = line["seen"] if isinstance(line.get("seen"), bool) else row["seen"]
        if line["model"] == "recovered":
            between = "fitted" if source in cut else "cut"
            row[between] = row[between] or row["after"]
        row[side] = _measured(line)
    paired = {text(line.get("source"), 60): line for line in metrics.get("paired", [])}
    for source, row in rows.items():
        delta = number(mapping(paired.get(source)).get("delta_nll"), -60, 60)
        before, after = ((row[side] or {}).get("ppl") for side in ("before", "after"))
        row["delta_nll"], row["delta_se"] = delta, number(mapping(paired.get(source)).get("se"), 0, 60)
        row["ratio"] = math.exp(delta) if delta is not None else after / before if before and after else None
        row["recovered"] = _recovered(before, (row["cut"] or {}).get("ppl"), after)
    return list(rows.values())


def _recovered(before: float | None, cut: float | None, after: float | None) -> float | None:
    """Return the fraction of the log-perplexity lost by a cut that was won back; ``None`` if nothing was lost."""
    if not before or not cut or not after or cut <= before:
        return None
    return math.log(cut / after) / math.log(cut / before)


def _outcome(lines: list[JsonObject]) -> str:
    """Return what the last perplexities of a run are those of: after the cut, a reconstruction or a recovery."""
    models = {text(line.get("model")) for line in lines}
    return "Recovered" if "recovered" in models else "Reconstructed" if "cut" in models else "After"


def _measured(line: JsonObject) -> dict[str, Any]:
    """Return one perplexity, with the 95 % interval of its mean negative log-likelihood."""
    ppl, se = number(line.get("ppl"), 1e-3), number(line.get("se"), 0, 60)
    spread = math.exp(min(1.96 * se, 60)) if se is not None else None
    return {
        "ppl": ppl,
        "low": ppl / spread if ppl and spread else None,
        "high": ppl * spread if ppl and spread else None,
        "nll": number(line.get("nll")),
        "se": se,
        "tokens": size(line.get("tokens")),
        "bits_per_byte": number(line.get("bits_per_byte"), 0),
    }


def _mean(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return geometric means over the text domains measured on both sides, or after the cut only."""
    sides = [((row["before"] or {}).get("ppl"), (row["after"] or {}).get("ppl")) for row in rows]
    both = [(math.log(before), math.log(after)) for before, after in sides if before and after]
    after = [math.log(ppl) for _, ppl in sides if ppl]
    if both:
        a, b = (sum(column) / len(both) for column in zip(*both, strict=True))
        cut = [math.log(ppl) for row in rows if (ppl := (row["cut"] or {}).get("ppl"))]
        middle = math.exp(sum(cut) / len(cut)) if len(cut) == len(both) else None
        return {
            "count": len(both),
            "before": math.exp(a),
            "cut": middle,
            "after": math.exp(b),
            "ratio": math.exp(b - a),
            "recovered": _recovered(math.exp(a), middle, math.exp(b)),
        }
    if not after:
        return None
    mean = math.exp(sum(after) / len(after))
    return {"count": len(after), "before": None, "cut": None, "after": mean, "ratio": None, "recovered": None}


def _choice(lines: list[JsonObject]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        task, side = text(line.get("task"), 60), _MODELS.get(text(line.get("model")))
        if task and side and (task in rows or len(rows) < MAX_KINDS):
            row = rows.setdefault(task, {"task": task, "before": None, "cut": None, "after": None})
            row[side] = {name: number(line.get(name), 0, 1) for name in ("acc", "acc_se", "acc_norm")}
            row[side]["n"] = size(line.get("n"))
    return list(rows.values())


def _sides(lines: list[JsonObject], names: tuple[str, ...]) -> dict[str, dict[str, Any] | None]:
    sides: dict[str, dict[str, Any] | None] = {"before": None, "after": None}
    for line in lines:
        if (side := _MODELS.get(text(line.get("model")))) in sides:
            sides[side] = {name: number(line.get(name), 0) for name in names} | {"dtype": text(line.get("dtype"), 20)}
    return sides


def _budget(lines: list[JsonObject]) -> BudgetFigures | None:
    """Return the quantity that a target counts: requested, before, after, and predicted (time only)."""
    line = lines[-1] if lines else {}
    asked, after = number(line.get("asked"), 0), number(line.get("after"), 0)
    if asked is None or after is None:
        return None
    return {
        "asked": asked,
        "before": number(line.get("before"), 0),
        "after": after,
        "predicted": number(line.get("predicted"), 0),
        "measure": text(line.get("measure"), 20),
        "context": size(line.get("context")) or 0,
    }


def _verify(line: JsonObject) -> MaskingCheck:
    difference, bound = number(line.get("max_abs_diff"), 0), number(line.get("bound"), 0)
    return {
        "max_abs_diff": difference,
        "bound": bound,
        "dtype": text(line.get("dtype"), 20),
        "argmax_flips": size(line.get("argmax_flips")),
        "holds": None if difference is None or bound is None else difference <= bound,
    }


def _sources(run: JsonObject, settings: JsonObject) -> list[SourceRow]:
    return [
        {
            "name": name,
            "origin": text(source.get("origin"), 300),
            "calibration_tokens": size(source.get("calibration_tokens")),
            "evaluation_tokens": size(source.get("evaluation_tokens")),
        }
        for source in (objects(run.get("sources")) or objects(settings.get("sources")))[:MAX_KINDS]
        if (name := text(source.get("name"), 60))
    ]


def _stages(run: JsonObject) -> list[StageRow]:
    """Return the runs that made the network, in order, if it has had more than this one."""
    stages = objects(run.get("stages"))
    return [
        {
            "name": text(stage.get("name"), 60),
            "verb": text(stage.get("verb"), 20),
            "command": text(stage.get("command"), 8000),
            "changed": text(stage.get("changed"), 200),
            "before": size(stage.get("before")) or None,
            "parameters": size(stage.get("parameters")),
        }
        for stage in ([*stages[-MAX_KINDS:], mapping(run.get("stage"))] if stages else [])
    ]


def _pairs(values: JsonObject, skip: tuple[str, ...] = ()) -> list[Pair]:
    """Return settings as names and words, without empty ones."""
    pairs: list[Pair] = []
    for name, value in list(values.items())[:60]:
        parts = [text(part, 80) for part in items(value, 20)] if isinstance(value, list) else [text(value, 300)]
        if name not in skip and any(parts):
            pairs.append({"name": text(name, 40), "value": ", ".join(part for part in parts if part)})
    return pairs


def _short(model: str) -> str:
    """Return a model's name without the folders before it."""
    return model.rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def _name(runs: list[Run]) -> None:
    """Give each run a short, unique label: method and keep, then seed, then its folder."""
    seeds = [next((pair["value"] for pair in run["settings"] if pair["name"] == "seed"), "") for run in runs]
    for run in runs:
        kept = f" {run['target']}" if run["keep"] is None else f" {run['keep']:g}"
        kept = kept.rstrip() + " regular" * run["regular"]
        run["label"] = f"{run['method'] or run['name']}{kept}"
    names = [run["name"] for run in runs]
    for suffixes in ([f"seed {seed}" for seed in seeds], names, [f"#{i + 1}" for i in range(len(runs))]):
        labels = [run["label"] for run in runs]
        for run, label, suffix in zip(runs, labels, suffixes, strict=True):
            if labels.count(label) > 1:
                run["label"] = text(f"{label} {suffix}", 60)
