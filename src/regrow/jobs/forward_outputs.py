"""Run a network's own forward before and after a growth, compare what it gives, and restore a network."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from regrow.core.axes import Example
from regrow.core.sources import Batch, device_of, preserve_random_state
from regrow.surgery.output_comparison import common_outputs, max_difference, max_magnitude
from regrow.surgery.runner import Results, preserve_generators, reseed
from regrow.tracing.capture import in_eval_mode
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import OutputError, Snapshot, find_tensors, output_tensors, preserve_state

CACHES = frozenset(("past_key_values", "cache_params", "mems"))
"""Parts of an output that hold a state per block, and so have more parts in a network of more blocks."""


def run_once(model: nn.Module, example: Example) -> None:
    """Run a network on its example, so that what it caches for inputs of that shape is known before a change."""
    example = cast_example(example, model)
    with in_eval_mode(model), torch.no_grad(), preserve_random_state(), preserve_generators():
        if device_of(model).type != "meta":
            Batch(example.args, example.kwargs, where="the example").run(model)


@torch.no_grad()
def outputs_of(model: nn.Module, example: Example) -> Results:
    """Return the tensors and numbers that a network gives for an example, in eval mode; its state is not changed.

    Random operations start from the same seed in every call. Caches of states per block are left out.
    """
    inputs = Example(*tree_map(_copied, (example.args, dict(example.kwargs))))
    with preserve_state(model, entries=True), preserve_random_state(), preserve_generators(), in_eval_mode(model):
        reseed(0)
        random.seed(0)
        np.random.seed(0)
        answers = [*_compared(model(*inputs.args, **inputs.kwargs))]
        unknown = [x.isnan() for x in answers if x.is_floating_point() and bool(x.isnan().any())]
        return [*(x.nan_to_num(0.0, torch.inf, -torch.inf) for x in answers), *unknown]


def _copied(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _compared(answer: object) -> Iterator[Tensor]:
    """Yield copies of the tensors, and the numbers as tensors, of what a network returned."""
    if isinstance(answer, Mapping):
        for name, part in answer.items():
            yield from _compared(part) if name not in CACHES else ()
    elif isinstance(answer, list | tuple):
        for part in answer:
            yield from _compared(part)
    elif isinstance(answer, int | float):
        yield torch.tensor(answer)
    elif not type(answer).__name__.endswith("Cache"):
        with suppress(OutputError):  # a part without tensors
            for x in output_tensors(answer):
                yield torch.view_as_real(x.resolve_conj()).clone() if x.is_complex() else x.clone()


def measure_change(before: Results, after: Results) -> tuple[float, float]:
    """Return the largest absolute difference of two lists of outputs, and the largest output."""
    pairs = [(a, b) for a, b in common_outputs(before, after) if a.shape == b.shape]
    pairs = [(a, b) for a, b in pairs if a.is_floating_point()] or pairs
    ours: Results = [a for a, _ in pairs]
    theirs: Results = [b for _, b in pairs]
    return max_difference(ours, theirs) if pairs else torch.inf, max_magnitude([a.double() for a, _ in pairs])


def measure_exactly(before: Results, after: Results) -> float:
    """Return the largest change of an entry of outputs that must be the same in number, shape and value.

    It is relative to the entry, or to ten times the median of its output where that is more: values of another order,
    such as those of masked classes, hide nothing. Infinite if number or shape differ.
    """
    if [x is None or x.shape for x in before] != [x is None or x.shape for x in after]:
        return torch.inf
    return max((_relative_change(x.double(), y.double()) for x, y in common_outputs(before, after)), default=0.0)


def _relative_change(x: Tensor, y: Tensor) -> float:
    change = (x - y).abs().masked_fill(x == y, 0.0)
    sizes = x.abs()
    usual = sizes[(sizes > 0) & sizes.isfinite()]
    least = 10 * float(usual.median()) if usual.numel() else 0.0
    scale = torch.maximum(sizes, y.abs()).clamp_min(max(least, 1e-300))
    return float((change / scale).nan_to_num(torch.inf, torch.inf).max())


def examples_of(example: Example) -> list[Example]:
    """Return an example, and others of another batch size and of another length, where these can be recognised.

    >>> [tuple(example.args[0].shape) for example in examples_of(Example((torch.ones(3, 8),)))]
    [(3, 8), (1, 8)]
    >>> tokens = torch.ones(1, 8, dtype=torch.int64)
    >>> [tuple(example.args[0].shape) for example in examples_of(Example((tokens,)))]
    [(1, 8), (2, 8), (1, 4)]
    """
    tensors = [x for x in tree_leaves((example.args, dict(example.kwargs))) if isinstance(x, Tensor) and x.dim()]
    sizes = {x.shape[:1] for x in tensors}
    if len(sizes) != 1 or not all(x.shape[0] for x in tensors):
        return [example]
    several = next(iter(sizes))[0] > 1
    made = [example, _changed(example, lambda x: x[:1] if several else torch.cat([x, x]))]
    lengths = {tuple(x.shape) for x in tensors}
    length = tensors[0].shape[1] if tensors[0].dim() == 2 and len(lengths) == 1 else 0
    if length > 1 and not any(x.is_floating_point() for x in tensors):
        made.append(_changed(example, lambda x: x[:, : length // 2]))
    return made


def _changed(example: Example, change: Any) -> Example:
    args, kwargs = tree_map(
        lambda x: change(x) if isinstance(x, Tensor) and x.dim() else x, (example.args, dict(example.kwargs))
    )
    return Example(args, kwargs)


@dataclass(frozen=True)
class NetworkState:
    """Everything that a growth may change in a network: its structure, tensors, attributes and configurations."""

    contents: Snapshot
    tensors: Sequence[tuple[Tensor, int, Tensor]]
    fields: Sequence[tuple[object, Mapping[str, object]]]

    @classmethod
    def of(cls, model: nn.Module) -> "NetworkState":
        """Return the present state of a network; parameters are not copied, since a growth makes new ones."""
        written = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) and hasattr(m, "weight")}
        tensors = [x for x in find_tensors(model) if not x.is_meta]
        tensors = [x for x in tensors if not isinstance(x, nn.Parameter) or id(x) in written]
        copies = [(x, x._version, x.detach().clone()) for x in tensors]
        objects = [value for module in model.modules() for value in vars(module).values()]
        return cls(Snapshot(model), copies, [(value, _fields(value)) for value in objects if _has_fields(value)])

    def restore(self) -> None:
        """Give the network back everything that it had."""
        self.contents.restore()
        for holder, fields in self.fields:
            for name in _fields(holder).keys() - fields.keys():
                object.__delattr__(holder, name)
            for name, value in fields.items():
                if getattr(holder, name, None) is not value:
                    object.__setattr__(holder, name, value)
        with torch.no_grad():
            for tensor, version, old in self.tensors:
                if tensor._version != version:
                    tensor.detach().copy_(old)


def _has_fields(value: object) -> bool:
    plain = Tensor | nn.Module | type | Mapping | list | tuple | set
    return not isinstance(value, plain) and not callable(value) and bool(_fields(value))


def _fields(value: object) -> dict[str, object]:
    """Return the fields of an object, those in slots included."""
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    return {**{n: getattr(value, n) for n in slots if hasattr(value, n)}, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> list[str]:
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if not name.startswith("__")]
