"""Paired forward: the dense network runs in threads and waits at each layer until the cut one has reached it.

Neither network runs twice and no output is kept longer than needed. Several batches run together: each waits at a
layer until all others have reached it, so that of what lies between two layers only one batch's is in memory.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from regrow.core.turns import StopRunError, Turns, capture_state
from regrow.scoring.watch import find_inputs
from regrow.streaming.network import Around

ADDITIONS = frozenset(
    {torch.add, torch.Tensor.add, torch.Tensor.add_, torch.Tensor.__add__, torch.Tensor.__radd__, torch.Tensor.__iadd__}
)
# Names of tensor methods that read the shape or layout of a tensor and not its numbers.
_SHAPE_METHODS = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "element_size"}
)


@dataclass(frozen=True)
class LayerCall:
    """A watched layer that has run, and whose output is about to be used for the first time."""

    name: str  # of its weight
    value: Tensor  # the input of the layer
    dim: int  # the dimension of the input that is contracted with the weight, negative: from the end
    output: Tensor  # the output of the layer, or a view of it; writing into it changes what the network computes
    again: Callable[[], Tensor]  # computes the output again, with the current weight
    output_id: int  # `id` of the output itself, also where ``output`` is a view of it
    other: Tensor | None = None  # the tensor that is added to the output, if that is its first use


class LayerCalls(TorchFunctionMode):
    """Calls ``handle`` with each run of a watched layer as soon as its output is first used, or at the end.

    A context manager around forward passes. ``watched``: ``id`` of a weight → its name. A view of the output with the
    same channels, and dropout in evaluation mode, do not count as a use.
    """

    def __init__(self, watched: Mapping[int, str], handle: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self.watched, self.handle = watched, handle
        self.unused: dict[int, LayerCall] = {}  # `id` of an unused output, or of a view of one → the call

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call :meth:`handle` for the watched layers whose outputs are operands, then run the operation."""
        kwargs = kwargs or {}
        if self.unused and getattr(func, "__name__", "") not in _SHAPE_METHODS:
            used = [
                leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and id(leaf) in self.unused
            ]
            if used and getattr(func, "__name__", "") == "__get__":
                attribute = func(*args, **kwargs)  # .shape, .dtype; but .T is the tensor itself
                if not isinstance(attribute, Tensor):
                    return attribute
            keeps = func is torch.Tensor.view or (func is F.dropout and not kwargs.get("training", True))
            if used and keeps:
                result = func(*args, **kwargs)
                if self._follow_view(used[0], result):
                    return result
            for tensor in reversed(used):
                if call := self._pop(id(tensor)):
                    self.handle(replace(call, other=_find_addend(call.output, func, args, kwargs)))
        result = func(*args, **kwargs)
        contraction = next(find_inputs(self.watched, func, args, kwargs), None)
        if contraction is not None:
            name, value, dim = contraction
            again = partial(func, *args, **kwargs)
            self.unused[id(result)] = LayerCall(name, value, dim, result, again, id(result))
        return result

    def _follow_view(self, output: Tensor, result: Tensor) -> bool:
        """Note that ``result`` is a view of an unused output; if it has other channels, return False instead."""
        if result is output:
            return True
        call = self.unused[id(output)]
        if result.dtype != output.dtype or result.shape[-1:] != output.shape[-1:] or call.dim != -1:
            return False
        self.unused[id(result)] = replace(call, output=result, again=lambda: call.again().view(result.shape))
        return True

    def _pop(self, tensor_id: int) -> LayerCall | None:
        """Remove and return the call whose output, or a view of it, has this ``id``; ``None`` if it is not there."""
        call = self.unused.get(tensor_id)
        if call is not None:
            self.unused = {key: other for key, other in self.unused.items() if other.output_id != call.output_id}
        return call

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Call :meth:`handle` for the watched layers whose outputs were never used, unless the pass has failed."""
        super().__exit__(kind, value, trace)
        while kind is None and self.unused:
            if call := self._pop(next(iter(self.unused))):
                self.handle(call)


def _find_addend(output: Tensor, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Tensor | None:
    """Return the other operand if ``func`` adds a tensor of the same shape to ``output``, and else ``None``."""
    if func not in ADDITIONS or len(args) != 2 or kwargs:
        return None
    other = args[1] if args[0] is output else args[0]
    is_addend = isinstance(other, Tensor) and other is not output and other.shape == output.shape
    return other if is_addend else None


class LayerOutputs:
    """The outputs of a network's layers, produced one by one on request by forward passes in threads of their own.

    ``run``: (around, turns) → runs the network on ``count`` batches, each inside ``around(number, watched)``, in turns.
    """

    def __init__(self, run: Callable[[Around, Turns], object], count: int) -> None:
        self._request, self._queue, self._turns = threading.Semaphore(0), queue.SimpleQueue[Any](), Turns(count)
        self._state = capture_state()
        self._stop, self._ended = False, False
        self._early = dict[tuple[int, str], tuple[Tensor, Tensor | None]]()  # outputs that came before their request
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def __call__(self, number: int, name: str) -> tuple[Tensor, Tensor | None] | None:
        """Return (a layer's output on batch ``number``, the tensor added to it); ``None`` if the layer does not run.

        ``name``: of the layer's weight. It waits for the forward pass, and raises its errors.
        """
        while (number, name) not in self._early:
            if self._ended:
                return None
            self._request.release()
            message = self._queue.get()
            self._ended = not isinstance(message, tuple)
            if isinstance(message, BaseException):
                raise message
            if message is None:
                return None
            key, output, other = message
            if key != (number, name):  # it may be written over before it is requested
                output = output.clone()
                other = None if other is None else other.clone()
            self._early[key] = output, other
        return self._early.pop((number, name))

    def _offer(self, number: int, call: LayerCall) -> None:
        """In a thread: hand over a layer's output on batch ``number`` and wait for the next request and its turn."""
        self._queue.put(((number, call.name), call.output, call.other))
        self._wait()
        self._turns.wait(number)

    def _wait(self) -> None:
        """In a thread: wait for the next request; raise StopRunError if there will be none."""
        self._request.acquire()
        if self._stop:
            raise StopRunError

    @contextmanager
    def _offering(self, number: int, watched: Mapping[int, str]) -> Iterator[None]:
        """Context manager of the forward pass of batch ``number``, which hands over outputs of watched layers."""
        with torch.no_grad(), LayerCalls(watched, lambda call: self._offer(number, call)):
            yield

    def _run(self, run: Callable[[Around, Turns], object]) -> None:
        """In a thread: call ``run`` after the first request; then put ``None``, or its error, into the queue."""
        try:
            self._wait()
            with self._state():
                run(self._offering, self._turns)
            self._queue.put(None)
        except StopRunError:
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)


@contextmanager
def run_in_thread(run: Callable[[Around, Turns], object], count: int = 1) -> Iterator[LayerOutputs]:
    """Context manager that runs a network in threads, layer by layer, only as far as its outputs are requested.

    ``run``, ``count``: as for :class:`LayerOutputs`, which it gives: a function of (batch number, name of a weight).
    """
    outputs = LayerOutputs(run, count)
    outputs._thread.start()
    try:
        yield outputs
    finally:
        outputs._stop = True
        outputs._request.release()
        outputs._thread.join()
