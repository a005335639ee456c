"""Peak memory of training: the most bytes of live tensors, predicted without allocating them."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.process_memory import read_peak, reset_peak, return_memory
from regrow.core.sources import Batch, device_of, logits_in
from regrow.tracing.capture import silence_torch
from regrow.tracing.meta_copy import meta_copy

# A training step: forward, loss, backward, optimizer. It stores its own state between steps.
Step = Callable[[nn.Module, Batch], Any]

_ITEM = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Memory:
    """The bytes that training steps need: before the first, and at most.

    Args:
        held: Bytes of tensors before the first step: parameters, buffers, gradients, the batch.
        peak: The most bytes of live tensors at one moment, ``held`` included; storage that tensors share counts once.
            Workspace inside an operation is not seen.
    """

    held: int
    peak: int


class UnpredictableError(ValueError):
    """Raised if the memory of a training step cannot be predicted, since the size of a tensor depends on data."""


class MemoryCounterMode(TorchDispatchMode):
    """A dispatch mode that counts the bytes of live tensors in forward and backward passes, real or fake.

    ``held`` are the bytes of tensors that existed before; ``now`` those alive now; ``peak`` the most at one moment.

    Args:
        existing: Tensors that exist already. Others that exist are counted when an operation first reads them.
        item: The number that ``tensor.item()`` returns, since fake tensors have none; the tensor's own if ``None``.

    >>> with MemoryCounterMode() as live:
    ...     _ = torch.zeros(100, dtype=torch.float64).view(10, 10).sum()
    >>> live.peak, live.now
    (808, 8)
    """

    def __init__(self, existing: Iterable[Tensor] = (), item: int | None = None) -> None:
        super().__init__()
        self.held = self.now = self.peak = 0
        self._item = item
        self._sizes: dict[int, int] = {}  # address of a storage → its bytes
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._count_existing(existing)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _tensors_in((*args, *kwargs.values()))
        self._count_existing(read)
        if func is _ITEM and self._item is not None:
            number = float if args[0].is_floating_point() else int
            return bool(self._item) if args[0].dtype == torch.bool else number(self._item)
        result = func(*args, **kwargs)
        # An operation that writes into its inputs, such as resize_, may have enlarged them.
        for tensor in _tensors_in((result, *read) if func._schema.is_mutable else (result,)):
            self._count_storage(tensor)
        return result

    def _count_existing(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors that are not counted yet to ``held``, ``now`` and ``peak``: they existed before."""
        for tensor in tensors:
            new = self._count_storage(tensor, existed=True)
            self.held += new
            self.peak += new

    def _count_storage(self, tensor: Tensor, *, existed: bool = False) -> int:
        """Update ``now`` and ``peak`` by a tensor's storage, and return its bytes.

        One that ``existed`` before the block is counted in ``now`` alone; 0 is returned if it was counted already.
        """
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if existed and before is not None:
            return 0
        if before is None:
            self._alive[key] = weakref.ref(storage, partial(_subtract_storage, weakref.ref(self), key))
        self._sizes[key] = size
        self.now += size - (before or 0)
        self.peak = self.peak if existed else max(self.peak, self.now)
        return size


def _subtract_storage(reference: "weakref.ref[MemoryCounterMode]", key: int, _: Any) -> None:
    """Subtract the freed storage ``key`` from the counter that ``reference`` leads to, if that still exists."""
    counter = reference()
    if counter is not None:
        counter.now -= counter._sizes.pop(key)
        del counter._alive[key]


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the values of an operation, and in lists of them; faster than ``tree_leaves``."""
    result: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            result.append(value)
        elif isinstance(value, tuple | list):
            result += _tensors_in(value)
    return result


def make_training_step(optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Step:
    """Return a plain training step with cross-entropy loss, which keeps one optimizer per network between steps.

    Args:
        optimizer: Function from parameters to their optimizer.

    >>> step = make_training_step(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    >>> step(nn.Linear(2, 3), Batch((torch.ones(4, 2),), labels=torch.tensor([0, 1, 2, 0])))
    """
    optimizers: weakref.WeakKeyDictionary[nn.Module, Optimizer] = weakref.WeakKeyDictionary()

    def step(model: nn.Module, batch: Batch) -> None:
        """Train a model on a batch for one step; raise ValueError if it has no labels."""
        if model not in optimizers:
            optimizers[model] = optimizer(model.parameters())
        optimizers[model].zero_grad()
        logits, labels = logits_in(batch.run(model)), batch.labels
        if labels is None:
            raise ValueError("a step of learning needs a batch with labels")
        if logits.shape[:-1] == labels.shape:
            logits, labels = logits.flatten(0, -2), labels.flatten()
        F.cross_entropy(logits, labels).backward()
        optimizers[model].step()

    return step


def predict_memory(model: nn.Module | Callable[[], nn.Module], batch: Batch, step: Step) -> Memory:
    """Return the predicted memory of two training steps, which are run on tensors without data.

    Gradients and optimizer state of the first are there during the second. If a step reads a number from a tensor
    (``loss.item()``), it gets 1.

    Args:
        model: The network, which is not changed; or a function that builds it, without allocating its data.
        batch: The training batch; only its shapes matter, and it may be on the meta device.
        step: The training step, the same function that will train.

    Raises:
        UnpredictableError: If the size of a tensor depends on data.

    >>> step = make_training_step(partial(torch.optim.SGD, lr=0.1))
    >>> batch = Batch((torch.ones(9, 64),), labels=torch.zeros(9, dtype=torch.int64))
    >>> predict_memory(nn.Linear(64, 8), batch, step).held
    4456
    """
    if isinstance(model, nn.Module):
        copy, mode = meta_copy(model, {})
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            copy = model()
    device = device_of(copy)

    def empty(tensor: Tensor) -> Tensor:
        """Return a tensor of the same layout and dtype on the network's device, without data."""
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with mode, silence_torch():
        args, kwargs, labels = tree_map_only(Tensor, empty, (batch.args, dict(batch.kwargs), batch.labels))
        batch, parameters = Batch(args, kwargs, labels), list(copy.parameters())
        held = tree_leaves((parameters, list(copy.buffers()), [p.grad for p in parameters], args, kwargs, labels))
        counter = MemoryCounterMode([leaf for leaf in held if isinstance(leaf, Tensor)], item=1)
        try:
            with counter:
                for _ in range(2):
                    step(copy, batch)
        except DynamicOutputShapeException as error:
            raise UnpredictableError(f"data decide how much {error.func} gives: no prediction without them") from error
    return Memory(counter.held, counter.peak)


def start_peak_meter(device: torch.device) -> Callable[[], int | None]:
    """Reset the peak of memory; return a function that returns the most bytes in use since, less those at the reset.

    On a GPU these are what torch allocated, else resident memory of the process; ``None`` if it is not known.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    # Memory that an earlier call freed but the C library still holds would hide what this one needs.
    # On another system or with another C library, there is no peak rather than a wrong one.
    start = read_peak() if return_memory() and reset_peak() else None
    return lambda: None if start is None else max((read_peak() or 0) - start, 0)
