"""Checks that all processes of a run have the same settings, weights and data."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.core.sources import Source
from regrow.core.tasks import Task, first_examples, first_tensor
from regrow.distributed import ProcessRank
from regrow.distributed.parallel import broadcast_record, checksum, everywhere
from regrow.jobs.inputs import PendingWindows, SourceHalves
from regrow.settings.declaration import record_settings
from regrow.store.statistics import fingerprint
from regrow.streaming.weights import StoredWeights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PATHS = ("model", "run", "sources", "unseen", "input")
"""Settings that may name another folder on another host: what they lead to is compared."""
EXAMPLES = 256
"""How many examples of each part of a task are compared."""


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
    _check_weights(ranks, networks)
    every = (*kinds.calibration, *kinds.evaluation)
    sources = [one for one in every if not isinstance(one.batches, PendingWindows)]  # which rank 0 will generate
    _check_data(ranks, [source.name for source in sources], [fingerprint(source) for source in sources])


def check_same_tasks(ranks: ProcessRank, model: nn.Module, tasks: Sequence[Task]) -> None:
    """Raise InputError on every rank unless all have the same weights, and tasks that start with the same examples.

    Args:
        ranks: The processes.
        model: The network.
        tasks: The tasks.

    Raises:
        InputError: If they differ.
    """
    if ranks.several:
        _check_weights(ranks, [model])
        parts = (first_examples(part, EXAMPLES) for task in tasks for part in (task.train, task.test))
        sums = [[checksum(first_tensor(one.inputs)), checksum(one.labels)] for one in parts]
        _check_data(ranks, [task.name for task in tasks], sums)


def _check_weights(ranks: ProcessRank, networks: Sequence[nn.Module | StoredWeights]) -> None:
    sums = [checksum(tensor) for one in networks for tensor in _saved_tensors(one)]
    if not everywhere(ranks, broadcast_record(ranks, sums) == sums):
        raise InputError(
            "the processes have models of different weights; seed the function that builds it, or copy the same folder "
            "to all hosts"
        )


def _check_data(ranks: ProcessRank, names: Sequence[str], sums: Sequence[object]) -> None:
    own = [*names, *sums]
    if not everywhere(ranks, broadcast_record(ranks, own) == own):
        listed = ", ".join(dict.fromkeys(names))
        raise InputError(f"the processes read different data for {listed}; copy the same files to all hosts")


def _saved_tensors(network: nn.Module | StoredWeights) -> Iterator[Tensor]:
    """Yield the parameters and saved buffers of a network; of one that runs one block at a time, one is in memory."""
    if isinstance(network, nn.Module):
        yield from (one for one in network.state_dict().values() if isinstance(one, Tensor))
    else:
        yield from (network[name] for name, _ in network.places())
