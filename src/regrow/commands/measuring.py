"""What a run measures of a model before and after its cut: size, quality, and what its budget counts."""

from typing import Any

from torch import nn

from regrow import evaluation
from regrow.allocation import cost_of
from regrow.amounts import STEPS, Measure
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.folder import RunFolder
from regrow.nets import Loaded
from regrow.progress import Progress, silent
from regrow.sources import Batch, Source


def measure(
    folder: RunFolder,
    loaded: Loaded,
    axes: AxisGraph,
    tests: tuple[Source, ...],
    seen: frozenset[str],
    name: str,
    progress: Progress = silent,
    *,
    recoveries: int = 0,
) -> dict[str, evaluation.Perplexity]:
    """Log size and quality of a model; give back its perplexities, for pairing.

    Args:
        folder: Where the figures go.
        loaded: The model.
        axes: Its axes.
        tests: What it is evaluated on.
        seen: The names of the sources that calibration saw.
        name: What the model is called.
        progress: Called as work goes on.
        recoveries: How many recoveries the model has had; rows of the second and later ones say so.
    """
    told: dict[str, Any] = {"model": name} | ({"round": recoveries} if recoveries > 1 else {})
    size = evaluation.size(loaded.model, axes.counted, next(loaded.model.parameters()).dtype)
    folder.log(
        "size",
        **told,
        params_all=size.parameters,
        params_counted=size.counted,
        macs=evaluation.macs(axes),
        bytes=size.bytes,
        dtype=size.dtype,
    )
    found: dict[str, evaluation.Perplexity] = {}
    for i, source in enumerate(tests):
        progress(i, len(tests), f"evaluating the {name} model on {source.name}")
        if loaded.tokenizer is None:
            result = evaluation.accuracy(loaded.model, source)
            folder.log("choice", task=source.name, **told, **_accuracy(result))
            continue
        one = evaluation.perplexity(loaded.model, source, tokenizer=loaded.tokenizer)
        found[source.name] = one
        folder.log("perplexity", **told, source=source.name, seen=source.name in seen, **_perplexity(one))
    progress(len(tests), len(tests), f"evaluating the {name} model")
    return found


def _perplexity(one: evaluation.Perplexity) -> dict[str, Any]:
    record = one.record()
    return {
        "ppl": one.ppl,
        "nll": one.mean,
        "se": one.error,
        "tokens": record["tokens"],
        "bits_per_byte": one.bits_per_byte,
        "nll_per_window": record["nll_per_window"],
    }


def _accuracy(result: evaluation.Accuracy) -> dict[str, Any]:
    return {"acc": result.accuracy, "acc_se": result.error, "n": len(result.right)}


def counted(folder: RunFolder, model: nn.Module, before: AxisGraph, after: AxisGraph, budget: Budget) -> None:
    """Log what a budget counts of a model, before and after its cut, where that is a target, or time.

    Time is told as predicted, and as it was before and is now: the fastest of several passes by one clock.

    Args:
        folder: Where the figures go.
        model: The model as it is now, of the axes ``after``.
        before: The axes that the budget was met on.
        after: Those of now.
        budget: What was to be met.
    """
    if budget.target is None and budget.measure != Measure.TIME:
        return
    was, now = (cost_of(axes, budget).total for axes in (before, after))
    row: dict[str, Any] = {"asked": budget.limit(was), "before": was, "after": now}
    if budget.measure == Measure.TIME:
        row |= {"predicted": now, "after": evaluation.fastest_pass(model, passed(before, budget))}
        row = {name: steps / STEPS[Measure.TIME] for name, steps in row.items()}
    context = budget.target.context if budget.target else 0
    device = budget.timing.device if budget.timing else ""
    folder.log("budget", measure=str(budget.measure), context=context, device=device, **row)


def passed(axes: AxisGraph, budget: Budget) -> Batch:
    """What a pass is timed with: the traced example, or as many tokens as a target names."""
    batch = Batch(axes.example.args, axes.example.kwargs)
    tokens = budget.target.context if budget.target else 0
    return evaluation.lengthen(batch, tokens) if tokens else batch
