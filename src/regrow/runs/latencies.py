"""The latency table of a search, measured once and kept in its run folder, so that a resumed run goes by the same."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from regrow.evaluation import Latency, latency
from regrow.sources import Batch
from regrow.store.atomic import written
from regrow.store.errors import StoreError

TABLE, _PARTS = "latency.json", ("ops", "sums", "layers")


def of(out: Path, model: nn.Module, batch: Batch, begun: bool) -> Latency:
    """What a run folder keeps, or what is measured now (:func:`regrow.evaluation.latency`); nothing is written.

    Args:
        out: The folder.
        model: The whole space.
        batch: What a pass takes.
        begun: Whether the search has begun, by a table that must be there then.

    Raises:
        StoreError: If what is kept is no such table, or gone.
    """
    place = out / TABLE
    if not place.is_file() and not begun:
        return latency(model, batch)
    try:
        told = json.loads(place.read_text())
        parts = [{str(name): float(value) for name, value in told[part].items()} for part in _PARTS]
        found = Latency(float(told["total"]), *parts)
        if not all(0 <= value < 1e9 for value in (found.total, *(v for part in parts for v in part.values()))):
            raise ValueError("times are from 0 ms")
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise StoreError(f"{place} cannot be used ({error!s:.80}); restore it, or take a new folder") from None
    return found


def keep(out: Path, table: Latency) -> None:
    """Write a table into a run folder that has none."""
    if not (out / TABLE).is_file():
        with written(out / TABLE) as temporary:
            temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")
