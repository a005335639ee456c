"""What calibration has measured so far, on the disk: a run that is killed goes on where it was, bit for bit."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regrow.method import State
from regrow.runs.loop import Learned
from regrow.scores import Moments, Statistics
from regrow.sources import Source
from regrow.store.atomic import written

FORMAT = "regrow-statistics/1"
LEARNED = "regrow-learned/1"
_SUMS = ("total", "square", "mean_total", "mean_square")


def file_name(source: str, shard: int) -> str:
    """The name of a checkpoint; whatever the source is called, it is one plain name and no other source's.

    >>> file_name("news", 0), file_name("../News", 0)
    ('news-0.safetensors', 'news-ea82aa80-0.safetensors')
    """
    name = source
    # Capitals too: some disks do not tell them from small letters.
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,59}", source) or re.search(r"-[0-9a-f]{8}$", source):
        plain = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")[:40]
        name = f"{plain}-{hashlib.sha256(source.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}".lstrip("-")
    return f"{name}-{shard}.safetensors"


def fingerprint(source: Source, *more: Any) -> str:
    """A digest of everything that statistics on a source depend on.

    Args:
        source: Its batches count, not where they came from.
        more: What else counts: the number of shards, what is measured, the digest of the model.

    >>> from regrow.sources import Batch
    >>> one, two = (Source("s", [Batch((torch.tensor([i]),))]) for i in (1, 2))
    >>> fingerprint(one) == fingerprint(one), fingerprint(one) == fingerprint(two)
    (True, False)
    """
    digest = hashlib.sha256()
    for batch in source:
        _feed(digest, (batch.args, batch.kwargs, batch.labels))
    _feed(digest, more)
    return digest.hexdigest()


def write_statistics(path: Path, source: str, shard: int, statistics: Statistics, key: str) -> None:
    """Write the statistics of one shard of a source.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    tensors = {f"m{i}.{part}": getattr(m, part) for i, m in enumerate(statistics.moments.values()) for part in _SUMS}
    tensors |= {f"g{i}": gradient for i, gradient in enumerate(statistics.gradients.values())}
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "source": source,
        "shard": shard,
        "key": key,
        "tokens": statistics.tokens,
        "moments": [[name, m.count, m.sequences] for name, m in statistics.moments.items()],
        "gradients": list(statistics.gradients),
        "sha256": digest(tensors),
    }
    with written(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "regrow": json.dumps(header)})


def read_statistics(path: Path, source: str, shard: int, key: str) -> Statistics | None:
    """The statistics in a file; ``None`` if they are of something else, or damaged: then they are measured again."""
    try:
        with safe_open(path, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get("regrow", "null"))
            expected = {"format": FORMAT, "source": source, "shard": shard, "key": key}
            if not isinstance(header, dict) or any(header.get(name) != value for name, value in expected.items()):
                return None
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest(tensors) != header["sha256"]:
            return None
        moments = {
            name: Moments(count, tensors[f"m{i}.total"], tensors[f"m{i}.square"], sequences, *_means(tensors, i))
            for i, (name, count, sequences) in enumerate(header["moments"])
        }
        gradients = {name: tensors[f"g{i}"] for i, name in enumerate(header["gradients"])}
        return Statistics(source, int(header["tokens"]), moments, gradients)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def write_learned(path: Path, learned: Learned, key: str) -> None:
    """Write where a method that learns stands.

    Raises:
        StoreError: If the disk is full or does not let us write.
    """
    named = [("state", learned.state.tensors), ("optimiser", learned.optimiser)]
    places = [(part, name) for part, tensors in named for name in tensors]
    tensors = {
        f"t{i}": dict(named)[part][name].detach().cpu().contiguous().clone() for i, (part, name) in enumerate(places)
    }
    header = {
        "format": LEARNED,
        "key": key,
        "step": learned.step,
        "tensors": places,
        "values": dict(learned.state.values),
        "findings": dict(learned.state.findings),
        "sha256": digest(tensors),
    }
    with written(path) as temporary:
        save_file(tensors, temporary, {"format": "pt", "regrow": json.dumps(header)})


def read_learned(path: Path, state: State, key: str) -> Learned | None:
    """Where a method stood; ``None`` if that is of something else, or damaged: then it learns from the start.

    Args:
        path: The file.
        state: The first state of the method, which has the budget.
        key: What it must have been written with.
    """
    try:
        with safe_open(path, framework="pt") as content:
            header = json.loads((content.metadata() or {}).get("regrow", "null"))
            if not isinstance(header, dict) or header.get("format") != LEARNED or header.get("key") != key:
                return None
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
        if digest(tensors) != header["sha256"]:
            return None
        parts: dict[str, dict[str, Tensor]] = {"state": {}, "optimiser": {}}
        for i, (part, name) in enumerate(header["tensors"]):
            parts[part][name] = tensors[f"t{i}"]
        values, findings = dict(header["values"]), dict(header["findings"])
        state = replace(state, values=values, tensors=parts["state"], findings=findings)
        return Learned(int(header["step"]), state, parts["optimiser"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _means(tensors: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
    return tensors[f"m{i}.mean_total"], tensors[f"m{i}.mean_square"]


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of named tensors, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        _feed(found, (name, tensors[name]))
    return found.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Add a value to a digest, with what tells it from others that have the same bytes."""
    match value:
        case Tensor():
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        case Mapping():
            _feed(digest, sorted(value.items()))
        case str() | bytes():
            digest.update(repr(value).encode())
        case Iterable():
            parts = list(value)
            digest.update(f"{len(parts)}(".encode())
            for part in parts:
                _feed(digest, part)
        case _:
            digest.update(f"{value!r};".encode())
