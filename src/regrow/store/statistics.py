"""Files of finished calibration shards, from which a killed run resumes bit for bit."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
from torch import nn

from regrow.core.scores import Statistics
from regrow.core.sources import Source, preserve_random_state
from regrow.store.convert import convert
from regrow.store.errors import explain_os_errors
from regrow.store.schemas import Count
from regrow.store.tensors import add_to_digest, read_tensors, write_tensors

# Name of the folder in which a run keeps what it needs to resume; not part of a finished run.
FOLDER = "statistics"
FORMAT = "regrow-statistics/3"


class StatisticsHeader(msgspec.Struct, frozen=True):
    """The header of a file with the calibration statistics (core.scores.Statistics) of one shard of a source.

    Shards are the disjoint parts into which a source's batches are divided: batch i is in part i % their number.
    """

    source: str  # the name of the source
    shard: Count  # its index, from 0
    key: str  # the fingerprint of batches and settings
    tokens: Count  # labelled positions seen
    moments: dict[str, Count]  # name of a weight → positions of its input seen
    gradients: list[str]  # names of parameters with a gradient
    fisher: list[str]  # keys of axes with squared gradients


def shard_file_name(source: str, shard: int) -> str:
    """Return the file name for the ``shard``-th part of a source; the source's name goes into it as a hash."""
    return f"{hashlib.sha256(source.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}-{shard}.safetensors"


def fingerprint(source: Source, *settings: object) -> str:
    """Return the SHA-256, in hexadecimal, of the batches of a source, which are all read, and of the settings.

    The random state of the source's generators is left as it was.

    >>> import torch
    >>> from regrow.core.sources import Batch
    >>> one, two = (Source("s", [Batch((torch.tensor([i]),))]) for i in (1, 2))
    >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(two)
    (True, False)
    """
    digest = hashlib.sha256()
    with preserve_random_state(source.generators):  # a loader may shuffle: the next pass is as if this were none
        for batch in source:
            add_to_digest(digest, (batch.args, batch.kwargs, batch.labels))
    add_to_digest(digest, settings)
    return digest.hexdigest()


def save_statistics(run: Path, source: str, shard: int, statistics: Statistics, *, key: str = "") -> None:
    """Write the statistics of one shard of a source into the folder ``statistics`` of a run, replacing older ones.

    ``run``: the folder of its files; ``shard``: index of the part of its batches; ``key``: its :func:`fingerprint`.
    """
    path = run / FOLDER / shard_file_name(source, shard)
    with explain_os_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    tensors = {f"{i:06}": tensor for i, tensor in enumerate(statistics.tensors())}
    write_tensors(path, tensors, {"source": source, "shard": shard, "key": key, **statistics.header()}, FORMAT)


def read_finished_shards(run: Path, keys: Mapping[str, str], shards: int = 1) -> dict[tuple[str, int], Statistics]:
    """Return (source, shard) → statistics of an interrupted calibration, for ``done`` of ``scoring.collect``.

    ``run``: as for :func:`save_statistics`; ``keys``: name of a source → its :func:`fingerprint`; ``shards``: into how
    many parts each source is divided. Files that are missing, damaged or of another key are left out.
    """
    finished = {}
    for source, key in keys.items():
        for shard in range(shards):
            try:
                header, tensors = read_tensors(run / FOLDER / shard_file_name(source, shard), FORMAT)
                record = convert(header, StatisticsHeader)
                count = 2 * len(record.moments) + len(record.gradients) + len(record.fisher)
                if (record.source, record.shard, record.key, len(tensors)) == (source, shard, key, count):
                    finished[source, shard] = Statistics.assemble(source, header, tensors.values())
            except (ValueError, KeyError, TypeError):
                continue
    return finished


def parameter_sums(model: nn.Module) -> list[float]:
    """Return the sum of the first 4096 entries of each parameter, in their order: a cheap check for changed weights."""
    return [float(p.detach().flatten()[:4096].float().double().sum()) for p in model.parameters()]
