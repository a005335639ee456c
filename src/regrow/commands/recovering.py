"""Recovery in a run folder, from whose checkpoint an interrupted run goes on."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from regrow.axes import AxisGraph
from regrow.commands.calibration import glance
from regrow.commands.checkpoints import fingerprint, open_checkpoint
from regrow.commands.folder import RunFolder
from regrow.evaluation import Perplexity, paired_difference
from regrow.methods import recovery_entry
from regrow.methods.recovery import RecoveryTask
from regrow.nets import Loaded
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.sources import Source


def recovered(
    folder: RunFolder,
    model: nn.Module,
    dense: Loaded,
    axes: AxisGraph,
    plan: Plan,
    sources: Sequence[Source],
    by: str,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    number: int = 1,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Let a cut network win back what it lost, or go on from the checkpoint of an interrupted call; logs what was done.

    Args:
        folder: Where checkpoints are written and the ``recovery`` row is logged.
        model: The network after the cut; changed in place.
        dense: The model before the cut.
        axes: Its axes.
        plan: The cut.
        sources: The text to learn from.
        by: One of ``regrow.methods.RECOVERIES``.
        settings: Its settings, where they differ from the defaults.
        seed: Of what is drawn.
        number: Which recovery of the network this is, from 1.
        progress: Called as work goes on.

    Returns:
        The logged row.

    Raises:
        ValueError: If the recovery or a setting is unknown, or the text is of no use for it.
    """
    work = recovery_entry(by).made(by, settings or {})
    texts = [fingerprint(source) for source in sources]
    weights = [glance(net) for net in (model, dense.model)]
    key = fingerprint(Source("", ()), by, dict(settings or {}), seed, texts, weights, str(dense.origin.record()))
    path, start = folder.path / "statistics" / "recovery.safetensors", time.perf_counter()
    spent = float(open_checkpoint(path, key).get("seconds", 0))
    seconds = lambda: spent + time.perf_counter() - start  # noqa: E731
    header = lambda: {"key": key, "seconds": seconds()}  # noqa: E731
    found = work(RecoveryTask(model, dense.model, axes, plan, sources, seed, path, header, progress))
    tokens = sum(source.tokens for source in sources)
    row = {"by": by, "tokens": tokens, "seconds": round(seconds(), 1), **found}
    row |= {"round": number} if number > 1 else {}
    folder.log("recovery", **row)
    return row


def check_recovery(by: str, sources: Sequence[str]) -> None:
    """Find out before anything is begun what is wrong with a wish to recover; an empty one is in order.

    Raises:
        ValueError: If there is no such recovery, it needs a package that is missing, or it has nothing to learn from.
    """
    if by:
        recovery_entry(by).made(by, {})
        if not sources:
            raise ValueError(f"--recover {by} learns from text or images; give at least one source, like --source news")


def compared(folder: RunFolder, found: Mapping[str, Perplexity], number: int = 1) -> None:
    """Log how far the recovered model is from the pruned one, and then from the dense one, on the same windows.

    Args:
        folder: Where those were measured, and where the figures go.
        found: The perplexities of the recovered model.
        number: Which recovery of the network this is, from 1.
    """
    more = {"round": number} if number > 1 else {}
    rows = {(row["model"], row["source"]): row for row in folder.metrics() if row["what"] == "perplexity"}
    for name, after in found.items():
        for model in ("pruned", "dense"):  # a page takes the last: what is left of the damage
            row = rows.get((model, name), {})
            nll = row.get("nll_per_window", [])
            if row.get("tokens") == sum(after.tokens) and len(nll) == len(after.nll) and None not in nll:
                pair = paired_difference(Perplexity(name, tuple(nll), after.tokens, after.bytes, after.origin), after)
                folder.log("paired", source=name, delta_nll=pair.mean, se=pair.error, of=[model, "recovered"], **more)
