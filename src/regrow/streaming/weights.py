"""The stored weights of a network by name, each read when it is asked for and released by whoever asked."""

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from regrow.core.errors import InputError
from regrow.nets.load import count_nonfinite
from regrow.store.errors import StoreError
from regrow.store.weights import digest
from regrow.streaming.buffer_pool import BufferPool
from regrow.streaming.checkpoint import Checkpoint, TensorPlace


class StoredWeights(Mapping[str, Tensor]):
    """The parameters and saved buffers of a network, read from a checkpoint in the network's dtype.

    A tied tensor has several names; it is stored under one of them.

    Args:
        checkpoint: The stored tensors.
        model: The network; its tensors need no numbers.
        name: The name of the network, for messages.
        digests: Stored name → the SHA-256 of the tensor's bytes, compared when it is first read; empty: not compared.

    Raises:
        InputError: If the checkpoint has other names or shapes than the network.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, name: str, digests: Mapping[str, str] | None = None
    ) -> None:
        self.checkpoint, self.name = checkpoint, name
        self.unchecked, self.finite = dict(digests or {}), set[str]()
        self.like = _saved_tensors(model)
        groups: dict[int, list[str]] = {}
        for key, tensor in self.like.items():
            groups.setdefault(id(tensor), []).append(key)
        self.first = {key: names[0] for names in groups.values() for key in names}
        self.stored: dict[str, str] = {}
        for names in groups.values():
            there = next((key for key in names if key in checkpoint), None)
            if there is None:
                raise _other_names(name, f"lacks {names[0]!r}")
            self.stored[names[0]] = there
            place, wanted = checkpoint.places[there], self.like[there]
            if place.shape != tuple(wanted.shape) or place.dtype.is_floating_point != wanted.is_floating_point():
                raise _other_names(name, f"holds {there!r} as {place.dtype} {list(place.shape)}")
        if other := next((key for key in checkpoint if key not in self.like), None):
            raise _other_names(name, f"holds {other!r}")

    def __getitem__(self, key: str) -> Tensor:
        """Return what :meth:`read` does, in fresh memory."""
        return self.read(key)

    def read(self, key: str, pool: BufferPool | None = None) -> Tensor:
        """Return a tensor in memory of its own."""
        stored = self.stored[self.first[key]]
        own = self.checkpoint.read(stored, pool)
        if (expected := self.unchecked.get(stored)) and digest(own) != expected:
            raise StoreError(
                f"{self.checkpoint.places[stored].file}: {stored!r} does not have the recorded SHA-256: it is damaged "
                "or was changed; copy it again"
            )
        self.unchecked.pop(stored, None)
        tensor = own.to(self.like[key].dtype)
        if isinstance(self.like[key], nn.Parameter) and stored not in self.finite:
            if bad := count_nonfinite(tensor):
                raise InputError(
                    f"{self.name}: {bad} entries of {stored!r} are NaN or infinite; use an undamaged checkpoint"
                )
            self.finite.add(stored)
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)

    def places(self) -> Iterator[tuple[str, TensorPlace]]:
        """Yield (name, place in the files) of every tensor, under its first name."""
        for key, stored in self.stored.items():
            yield key, self.checkpoint.places[stored]

    def parameters(self) -> "StoredParameters":
        """Return the parameters alone, as scoring reads them."""
        return StoredParameters(self)

    def bytes_of(self, key: str) -> int:
        """Return how many bytes a tensor takes in memory."""
        return self.like[key].numel() * self.like[key].element_size()

    def is_aligned(self, key: str) -> bool:
        """Whether a tensor begins at a cache line when it is read."""
        stored, like = self.stored[self.first[key]], self.like[key]
        place = self.checkpoint.places[stored]
        return place.start % 64 == 0 or place.dtype != like.dtype or stored in self.checkpoint.aligned

    def sums(self) -> list[float]:
        """Return the sum of the first entries of every parameter, which tells different weights apart cheaply."""
        own = (key for key, first in self.first.items() if key == first and isinstance(self.like[key], nn.Parameter))
        parts = (self.checkpoint.first_entries(self.stored[key], 4096).to(self.like[key].dtype) for key in own)
        return [float(part.float().double().sum()) for part in parts]


class StoredParameters(Mapping[str, Tensor]):
    """The parameters among stored weights, each read when it is asked for, into the memory of released ones.

    Args:
        weights: The stored weights.
    """

    def __init__(self, weights: StoredWeights) -> None:
        self.weights, self.buffers = weights, BufferPool()
        self.names = {key: None for key, one in weights.like.items() if isinstance(one, nn.Parameter)}

    def __getitem__(self, key: str) -> Tensor:
        """Return a parameter in memory of its own."""
        return self.weights.read(key, self.buffers)

    def __contains__(self, key: object) -> bool:
        return key in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and saved buffer under each of its names."""
    result: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        saved = {k: one for k, one in module._buffers.items() if k not in module._non_persistent_buffers_set}
        result |= {dot + k: one for k, one in {**module._parameters, **saved}.items() if one is not None}
    return result


def _other_names(name: str, what: str) -> InputError:
    return InputError(
        f"{name}: its checkpoint {what}, unlike the model; a checkpoint whose names are converted is not read block by "
        "block: load it in memory (leave out --memory)"
    )
