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

    name: str  # the name of its weight
    value: Tensor  # the input of the layer
    dim: int  # the dimension of the input that is contracted with the weight, negative: from the end
    output: Tensor  # the output of the layer; writing into it changes what the network goes on with
    again: Callable[[], Tensor]  # computes the output again, with the current weight
    other: Tensor | None = None  # the tensor that is added to the output, if that is its first use; else `None`


class LayerCalls(TorchFunctionMode):
    """Calls a function for each watched layer, as soon as its output is first used.

    A view of the output with the same channels, and dropout in evaluation mode, do not count as a use.

    Args:
        watched: ``id`` of a weight → its name.
        handle: The function.
    """

    def __init__(self, watched: Mapping[int, str], handle: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self.watched, self.handle = watched, handle
        self.waiting: dict[int, LayerCall] = {}
        # ``id`` of a view → ``id`` of the output that it is a view of, and the view.
        self.views: dict[int, tuple[int, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call :meth:`handle` for the watched layers whose outputs are operands, then run the operation."""
        kwargs = kwargs or {}
        if self.waiting and getattr(func, "__name__", "") not in _SHAPE_METHODS:
            used = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and self.call_of(one)]
            if used and getattr(func, "__name__", "") == "__get__":
                answer = func(*args, **kwargs)  # .shape, .dtype; but .T is the tensor itself
                if not isinstance(answer, Tensor):
                    return answer
            keeps = func is torch.Tensor.view or (func is F.dropout and not kwargs.get("training", True))
            if used and keeps and self._follow(used[0], result := func(*args, **kwargs)):
                return result
            for tensor in reversed(used):
                if call := self._pop(tensor):
                    self._settle(call, func, args, kwargs)
        result = func(*args, **kwargs)
        if (read := next(find_inputs(self.watched, func, args, kwargs), None)) is not None:
            self.waiting[id(result)] = LayerCall(*read, result, lambda: func(*args, **kwargs))
        return result

    def call_of(self, tensor: Tensor) -> LayerCall | None:
        """Return the layer whose output a tensor is, in the shape of the tensor; ``None`` if it is no unused output."""
        first, view = self.views.get(id(tensor), (id(tensor), None))
        call = self.waiting.get(first)
        if call is None or view is None:
            return call
        return replace(call, output=view, again=partial(_compute_in_shape, call.again, view.shape))

    def _follow(self, output: Tensor, result: Tensor) -> bool:
        """Note that a tensor is a view of an output; returns False if its channels are not the same."""
        if result is output:
            return True
        same = result.dtype == output.dtype and result.shape[-1:] == output.shape[-1:]
        first = self.views.get(id(output), (id(output), None))[0]
        if not same or self.waiting[first].dim != -1:
            return False
        self.views[id(result)] = first, result
        return True

    def _pop(self, tensor: Tensor) -> LayerCall | None:
        """Remove and return the layer whose output a tensor is, with all views of the output."""
        call, first = self.call_of(tensor), self.views.get(id(tensor), (id(tensor), None))[0]
        self.waiting.pop(first, None)
        self.views = {at: one for at, one in self.views.items() if one[0] != first}
        return call

    def _settle(
        self, call: LayerCall, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        if func in ADDITIONS and len(args) == 2 and not kwargs:
            other = args[1] if args[0] is call.output else args[0]
            if isinstance(other, Tensor) and other is not call.output and other.shape == call.output.shape:
                call = replace(call, other=other)
        self.handle(call)

    def __exit__(self, kind: Any, value: Any, trace: Any) -> None:
        """Call :meth:`handle` for the watched layers whose outputs were never used, unless the pass has failed."""
        super().__exit__(kind, value, trace)
        while self.waiting and kind is None:
            first = next(iter(self.waiting))
            self.views = {at: one for at, one in self.views.items() if one[0] != first}
            self.handle(self.waiting.pop(first))


def _compute_in_shape(compute: Callable[[], Tensor], shape: torch.Size) -> Tensor:
    return compute().view(shape)


class LayerOutputs:
    """The outputs of a network's layers, produced one by one on request by forward passes in threads of their own.

    Args:
        run: Runs the network, in parts or as a whole, each batch and part in the context that it is given, and the
            batches in the turns that it is given.
        count: The number of batches.
    """

    def __init__(self, run: Callable[[Around, Turns], object], count: int) -> None:
        self._request, self._queue, self._turns = threading.Semaphore(0), queue.SimpleQueue[Any](), Turns(count)
        self._state = capture_state()
        self._stop, self._ended, self._early = False, False, dict[tuple[int, str], tuple[Tensor, Tensor | None]]()
        self._thread = threading.Thread(target=self._run, args=(run,), daemon=True)

    def __call__(self, number: int, name: str) -> tuple[Tensor, Tensor | None] | None:
        """Return a layer's output and the tensor added to it, if any; ``None`` if the layer does not run."""
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
                output, other = output.clone(), other if other is None else other.clone()
            self._early[key] = output, other
        return self._early.pop((number, name))

    def _offer(self, number: int, call: LayerCall) -> None:
        """Hand over a layer's output, from a thread, wait for the next request, and let the others go first."""
        self._queue.put(((number, call.name), call.output, call.other))
        self._wait()
        self._turns.wait(number)

    def _wait(self) -> None:
        self._request.acquire()
        if self._stop:
            raise StopRunError

    @contextmanager
    def _offering(self, number: int, watched: Mapping[int, str]) -> Iterator[None]:
        with torch.no_grad(), LayerCalls(watched, lambda call: self._offer(number, call)):
            yield

    def _run(self, run: Callable[[Around, Turns], object]) -> None:
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
    """Run a network in threads, layer by layer, only as far as its outputs are requested in the ``with`` block."""
    outputs = LayerOutputs(run, count)
    outputs._thread.start()
    try:
        yield outputs
    finally:
        outputs._stop = True
        outputs._request.release()
        outputs._thread.join()
