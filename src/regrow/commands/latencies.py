"""The latency table of a search, measured once and stored in its run folder, so that a resumed run uses the same."""

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


def read_or_measure(out: Path, model: nn.Module, batch: Batch, begun: bool) -> Latency:
    """Return the latency table stored in a run folder, or measure one (:func:`regrow.evaluation.latency`).

    Args:
        out: The run folder; nothing is written.
        model: The whole search space as a network.
        batch: The input of a timed pass.
        begun: Whether the search has started, so that the table must exist.

    Raises:
        StoreError: If the stored table is damaged, or missing although the search has started.
    """
    place = out / TABLE
    if not place.is_file() and not begun:
        return latency(model, batch)
    try:
        record = convert(read_json(place), schemas.LatencyJson, place, "restore it, or take a new folder")
    except InputError as error:
        raise StoreError(f"{error}, or take a new folder") from None
    return Latency(record.total, record.ops, record.sums, record.layers)


def write(out: Path, table: Latency) -> None:
    """Write a latency table into a run folder, unless it has one.

    Args:
        out: The run folder.
        table: The table.
    """
    if not (out / TABLE).is_file():
        with atomic_write(out / TABLE) as temporary:
            temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")
