"""Checks that all processes of a run have the same settings, weights and data."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from regrow.commands.calibration import parameter_sums
from regrow.commands.inputs import SourceHalves
from regrow.distributed import ProcessRank
from regrow.distributed.exchange import broadcast_record, everywhere
from regrow.errors import InputError
from regrow.settings.declaration import record_settings
from regrow.sources import Source
from regrow.store.statistics import fingerprint
from regrow.streaming.weights import StoredWeights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PATHS = ("model", "run", "sources", "unseen", "input")
"""Settings that may name another folder on another host: what they lead to is compared."""
_TOLERANCE = 1e-6
"""Sums of the same weights differ by rounding between kinds of CPU."""


def check_same_settings(ranks: ProcessRank, settings: "DataclassInstance", memory: str = "") -> None:
    """Raise InputError on every rank unless all have the same settings.

    Args:
        ranks: The processes.
        settings: The settings of the run.
        memory: How much memory each process may use.

    Raises:
        InputError: If they differ.
    """
    if ranks.several:
        values = {name: value for name, value in record_settings(settings).items() if name not in _PATHS}
        own = fingerprint(Source("", ()), values, memory)
        if not everywhere(ranks, broadcast_record(ranks, own) == own):
            raise InputError("the processes have different settings; start all with the same command")


def check_same_inputs(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights], kinds: SourceHalves) -> None:
    """Raise InputError on every rank unless all have the same weights and data.

    Args:
        ranks: The processes.
        networks: The networks, or the weights of those that run one block at a time.
        kinds: The data.

    Raises:
        InputError: If they differ.
    """
    if not ranks.several:
        return
    sums = [entry for one in networks for entry in (parameter_sums(one) if isinstance(one, nn.Module) else one.sums())]
    lead = broadcast_record(ranks, sums)
    if not everywhere(ranks, len(lead) == len(sums) and all(map(_is_close, lead, sums))):
        raise InputError(
            "the processes have models of different weights; seed the function that builds it, or copy the same folder "
            "to all hosts"
        )
    own = [[source.name, fingerprint(source)] for source in (*kinds.calibration, *kinds.evaluation)]
    if not everywhere(ranks, broadcast_record(ranks, own) == own):
        raise InputError(
            f"the processes read different data for {', '.join(dict.fromkeys(name for name, _ in own))}; copy the same "
            "files to all hosts"
        )


def _is_close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
