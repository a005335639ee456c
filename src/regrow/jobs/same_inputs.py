"""Checks that all processes of a run have the same settings, weights and data."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.sources import Source
from regrow.core.tasks import Task, first_examples, first_tensor
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_record, checksum, everywhere
from regrow.jobs.inputs import PendingWindows, SourceHalves
from regrow.store.statistics import fingerprint
from regrow.streaming.weights import StoredWeights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PATHS = ("model", "run", "sources", "unseen", "input")
"""Settings that may name another folder on another host: what they lead to is compared."""
EXAMPLES = 256
"""How many examples of each part of a task are compared."""


def check_same_settings(ranks: ProcessRank, settings: "DataclassInstance", memory: str = "") -> None:
    """Raise InputError on every rank unless all have the same settings, and the same limit of memory."""
    values = {name: value for name, value in asdict(settings).items() if name not in _PATHS}
    if not _are_same(ranks, fingerprint(Source("", ()), values, memory)):
        raise InputError("the processes have different settings; start all with the same command")


def check_same_inputs(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights], halves: SourceHalves) -> None:
    """Raise InputError on every rank unless all have the same weights (of networks, or in their files) and data."""
    if ranks.several:
        _check_weights(ranks, networks)
        every = (*halves.calibration, *halves.evaluation)
        sources = [source for source in every if not isinstance(source.batches, PendingWindows)]  # rank 0 generates
        _check_data(ranks, [source.name for source in sources], [fingerprint(source) for source in sources])


def check_same_tasks(ranks: ProcessRank, model: nn.Module, tasks: Sequence[Task]) -> None:
    """Raise InputError on every rank unless all have the same weights, and tasks that start with the same examples."""
    if ranks.several:
        _check_weights(ranks, [model])
        parts = (first_examples(part, EXAMPLES) for task in tasks for part in (task.train, task.test))
        sums = [[checksum(first_tensor(part.inputs)), checksum(part.labels)] for part in parts]
        _check_data(ranks, [task.name for task in tasks], sums)


def _check_weights(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights]) -> None:
    if not _are_same(ranks, [checksum(tensor) for network in networks for tensor in _saved_tensors(network)]):
        raise InputError(
            "the processes have models of different weights; seed the function that builds it, or copy the same folder "
            "to all hosts"
        )


def _check_data(ranks: ProcessRank, names: Sequence[str], sums: Sequence[object]) -> None:
    if not _are_same(ranks, [*names, *sums]):
        listed = ", ".join(dict.fromkeys(names))
        raise InputError(f"the processes read different data for {listed}; copy the same files to all hosts")


def _are_same(ranks: ProcessRank, record: object) -> bool:
    """Whether all ranks have the same JSON data."""
    return not ranks.several or everywhere(ranks, broadcast_record(ranks, record) == record)


def _saved_tensors(network: nn.Module | StoredWeights) -> Iterator[Tensor]:
    """Yield the parameters and saved buffers of a network; of one that runs one block at a time, one is in memory."""
    if isinstance(network, nn.Module):
        yield from (value for value in network.state_dict().values() if isinstance(value, Tensor))
    else:
        yield from (network[name] for name, _ in network.places())
