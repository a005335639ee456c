"""The latency table of a search, measured once and kept in its run folder, so that a resumed run goes by the same."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import nn

from regrow.errors import InputError
from regrow.evaluation import Latency, latency
from regrow.limits import read_json
from regrow.sources import Batch
from regrow.store import schemas
from regrow.store.atomic import atomic_write
from regrow.store.convert import convert
from regrow.store.errors import StoreError

TABLE = "latency.json"


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
        told = convert(read_json(place), schemas.LatencyJson, place, "restore it, or take a new folder")
    except InputError as error:
        raise StoreError(f"{error}, or take a new folder") from None
    return Latency(told.total, told.ops, told.sums, told.layers)


def keep(out: Path, table: Latency) -> None:
    """Write a table into a run folder that has none."""
    if not (out / TABLE).is_file():
        with atomic_write(out / TABLE) as temporary:
            temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")
