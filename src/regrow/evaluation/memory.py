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
    """The memory that training steps need, in bytes.

    Args:
        held: Bytes of tensors before the first step: parameters, buffers, gradients, the batch.
        peak: The most bytes of live tensors at one moment, ``held`` included; storage that tensors share counts once.
            Workspace inside an operation is not seen.
    """

    held: int
    peak: int


class UnpredictableError(ValueError):
    """Raised if the memory of a step cannot be predicted; says why."""


class Live(TorchDispatchMode):
    """A dispatch mode that counts the bytes of live tensors in forward and backward passes, real or fake.

    ``held`` are the bytes of tensors that existed before; ``now`` those alive now; ``peak`` the most at one moment.

    Args:
        given: Tensors that exist already. Others that exist are counted when an operation first reads them.
        item: The number that ``tensor.item()`` returns, since fake tensors have none; the tensor's own if ``None``.

    >>> with Live() as live:
    ...     _ = torch.zeros(100, dtype=torch.float64).view(10, 10).sum()
    >>> live.peak, live.now
    (808, 8)
    """

    def __init__(self, given: Iterable[Tensor] = (), item: int | None = None) -> None:
        super().__init__()
        self.held = self.now = self.peak = 0
        self._item = item
        self._sizes: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._were_there(given)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = _tensors((*args, *kwargs.values()))
        self._were_there(read)
        if func is _ITEM and self._item is not None:
            number = float if args[0].is_floating_point() else int
            return bool(self._item) if args[0].dtype == torch.bool else number(self._item)
        result = func(*args, **kwargs)
        # An operation that writes into what it was given may have made it bigger.
        for tensor in _tensors((result, *read) if func._schema.is_mutable else (result,)):
            self._seen(tensor)
        return result

    def _were_there(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            new = self._seen(tensor, late=True)
            self.held += new
            self.peak += new

    def _seen(self, tensor: Tensor, late: bool = False) -> int:
        """Count a tensor's storage once, and return how many of its bytes were not counted before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if late and before is not None:
            return 0
        if before is None:
            self._alive[key] = weakref.ref(storage, partial(_forget, weakref.ref(self), key))
        self._sizes[key] = size
        self.now += size - (before or 0)
        self.peak = self.peak if late else max(self.peak, self.now)
        return size


def _forget(watch: "weakref.ref[Live]", key: int, _: Any) -> None:
    live = watch()
    if live is not None:
        live.now -= live._sizes.pop(key)
        del live._alive[key]


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the values of an operation, and in lists of them; faster than ``tree_leaves``."""
    result: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            result.append(value)
        elif isinstance(value, tuple | list):
            result += _tensors(value)
    return result


def training(optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]) -> Step:
    """Return a plain training step, which keeps one optimizer per network from step to step.

    Args:
        optimizer: Function from parameters to their optimizer.

    >>> step = training(partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    >>> step(nn.Linear(2, 3), Batch((torch.ones(4, 2),), labels=torch.tensor([0, 1, 2, 0])))
    """
    optimizers: weakref.WeakKeyDictionary[nn.Module, Optimizer] = weakref.WeakKeyDictionary()

    def step(model: nn.Module, batch: Batch) -> None:
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
    """Predict the memory that two training steps need by running them on tensors without data.

    Gradients and optimizer state of the first are there during the second. If a step reads a number from a tensor
    (``loss.item()``), it gets 1.

    Args:
        model: The network, which is not changed; or a function that builds it, without allocating its data.
        batch: The training batch; only its shapes matter, and it may be on the meta device.
        step: The training step, the same function that will train.

    Raises:
        UnpredictableError: If the size of a tensor depends on data.

    >>> step = training(partial(torch.optim.SGD, lr=0.1))
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
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    with mode, silence_torch():
        args, kwargs, labels = tree_map_only(Tensor, empty, (batch.args, dict(batch.kwargs), batch.labels))
        batch, parameters = Batch(args, kwargs, labels), list(copy.parameters())
        held = tree_leaves((parameters, list(copy.buffers()), [p.grad for p in parameters], args, kwargs, labels))
        live = Live([leaf for leaf in held if isinstance(leaf, Tensor)], item=1)
        try:
            with live:
                for _ in range(2):
                    step(copy, batch)
        except DynamicOutputShapeException as error:
            raise UnpredictableError(f"data decide how much {error.func} gives: no prediction without them") from error
    return Memory(live.held, live.peak)


def peak_meter(device: torch.device) -> Callable[[], int | None]:
    """Start measuring memory; return a function that returns the most bytes allocated beyond those held now.

    On a GPU that is what torch allocated, else resident memory of the process; ``None`` if the system does not report
    it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - held
    # Memory that an earlier call freed but the C library still holds would hide what this one needs.
    start = read_peak() if return_memory() and reset_peak() else None
    # On another system or with another C library, there is no peak rather than a wrong one.
    return lambda: None if start is None else max((read_peak() or 0) - start, 0)
