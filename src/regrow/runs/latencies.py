"""The latency table of a search, measured once and kept in its run folder, so that a resumed run goes by the same."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from regrow.evaluation import latency
from regrow.runs.atomic import StoreError, written
from regrow.sources import Batch

TABLE = "latency.json"


def of(out: Path, model: nn.Module, batch: Batch) -> dict[str, float]:
    """What a run folder keeps, or what is measured now (:func:`regrow.evaluation.latency`); nothing is written.

    Raises:
        StoreError: If what is kept is no such table.
    """
    if not (out / TABLE).is_file():
        return latency(model, batch)
    try:
        found = {str(name): float(value) for name, value in json.loads((out / TABLE).read_text()).items()}
        if not found or not all(0 <= value < 1e9 for value in found.values()):
            raise ValueError("times are from 0 ms")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StoreError(f"{out / TABLE} cannot be used ({error!s:.80}); restore it, or take a new folder") from None
    return found


def keep(out: Path, table: Mapping[str, float]) -> None:
    """Write a table into a run folder that has none."""
    if not (out / TABLE).is_file():
        with written(out / TABLE) as temporary:
            temporary.write_text(json.dumps(dict(table), indent=1) + "\n")
