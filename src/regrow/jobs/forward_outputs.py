"""Run a network's own forward before and after a growth, compare what it gives, and restore a network."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from regrow.core.axes import Example
from regrow.core.sources import Batch, device_of, preserve_random_state
from regrow.surgery.output_comparison import common_outputs, max_difference, max_magnitude
from regrow.surgery.runner import Results, preserve_generators, reseed
from regrow.tracing.capture import in_eval_mode
from regrow.tracing.meta_copy import cast_example
from regrow.tracing.model_state import OutputError, Snapshot, find_tensors, output_tensors, preserve_state

# Parts of an output that hold a state per block, and so have more parts in a network of more blocks.
CACHES = frozenset(("past_key_values", "cache_params", "mems"))


def warm_caches(model: nn.Module, example: Example) -> None:
    """Run a network in eval mode on an example, so that it caches what depends on the input's shape.

    Modes and random state are restored, other changes stay; on the meta device nothing is run.
    """
    example = cast_example(example, model)
    with in_eval_mode(model), torch.no_grad(), preserve_random_state(), preserve_generators():
        if device_of(model).type != "meta":
            Batch(example.args, example.kwargs, where="the example").run(model)


@torch.no_grad()
def compute_outputs(model: nn.Module, example: Example) -> Results:
    """Return copies of the tensors and numbers that a network gives for an example, in eval mode.

    The network's state is not changed. Random operations start from the same seed in every call. Caches of states per
    block are left out. For each output with NaN, a mask of these is added, and NaN is 0 in the output.
    """
    inputs = Example(*tree_map_only(Tensor, lambda x: x.detach().clone(), (example.args, dict(example.kwargs))))
    with preserve_state(model, entries=True), preserve_random_state(), preserve_generators(), in_eval_mode(model):
        reseed(0)
        random.seed(0)
        np.random.seed(0)
        outputs = [*_comparable_tensors(model(*inputs.args, **inputs.kwargs))]
        nan_masks = [x.isnan() for x in outputs if x.is_floating_point() and bool(x.isnan().any())]
        return [*(x.nan_to_num(0.0, torch.inf, -torch.inf) for x in outputs), *nan_masks]


def _comparable_tensors(output: object) -> Iterator[Tensor]:
    """Yield copies of the tensors (complex ones as real), and the numbers as tensors, of what a network returned."""
    if isinstance(output, Mapping):
        for name, part in output.items():
            yield from _comparable_tensors(part) if name not in CACHES else ()
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _comparable_tensors(part)
    elif isinstance(output, int | float):
        yield torch.tensor(output)
    elif not type(output).__name__.endswith("Cache"):
        with suppress(OutputError):  # a part without tensors
            for x in output_tensors(output):
                yield torch.view_as_real(x.resolve_conj()).clone() if x.is_complex() else x.clone()


def measure_change(before: Results, after: Results) -> tuple[float, float]:
    """Return the largest absolute difference of two lists of outputs, and the largest finite magnitude before.

    Outputs are paired by position. Pairs of unequal shapes are left out, and integers where there are floating-point
    ones; the difference is infinite if none remain, and if one has NaN.
    """
    pairs = [(a, b) for a, b in common_outputs(before, after) if a.shape == b.shape]
    pairs = [(a, b) for a, b in pairs if a.is_floating_point()] or pairs
    olds: Results = [old for old, _ in pairs]
    news: Results = [new for _, new in pairs]
    return max_difference(olds, news) if pairs else torch.inf, max_magnitude([old.double() for old, _ in pairs])


def measure_relative_change(before: Results, after: Results) -> float:
    """Return the largest relative change of an entry of outputs, a ratio; infinite if their number or a shape differs.

    It is relative to the entry's magnitude, or to ten times the median magnitude of its output before if that is more.
    So very large entries, such as those of masked classes, hide no change in others.
    """
    if [x is None or x.shape for x in before] != [x is None or x.shape for x in after]:
        return torch.inf
    return max((_relative_change(x.double(), y.double()) for x, y in common_outputs(before, after)), default=0.0)


def _relative_change(x: Tensor, y: Tensor) -> float:
    """Return the largest relative change from ``x``, before, to ``y``, as in :func:`measure_relative_change`."""
    change = (x - y).abs().masked_fill(x == y, 0.0)
    sizes = x.abs()
    usual = sizes[(sizes > 0) & sizes.isfinite()]
    least = 10 * float(usual.median()) if usual.numel() else 0.0
    scale = torch.maximum(sizes, y.abs()).clamp_min(max(least, 1e-300))  # never a division by 0
    return float((change / scale).nan_to_num(torch.inf, torch.inf).max())


def vary_example(example: Example) -> list[Example]:
    """Return an example, then one of another batch size, and of token ids one of half the length.

    The batch size is changed if all tensors have the same first dimension, the length if all are integers of one
    two-dimensional shape.

    >>> [tuple(example.args[0].shape) for example in vary_example(Example((torch.ones(3, 8),)))]
    [(3, 8), (1, 8)]
    >>> tokens = torch.ones(1, 8, dtype=torch.int64)
    >>> [tuple(example.args[0].shape) for example in vary_example(Example((tokens,)))]
    [(1, 8), (2, 8), (1, 4)]
    """
    tensors = [x for x in tree_leaves((example.args, dict(example.kwargs))) if isinstance(x, Tensor) and x.dim()]
    sizes = {x.shape[:1] for x in tensors}
    if len(sizes) != 1 or not all(x.shape[0] for x in tensors):
        return [example]
    several = tensors[0].shape[0] > 1
    examples = [example, _map_tensors(example, lambda x: x[:1] if several else torch.cat([x, x]))]
    lengths = {tuple(x.shape) for x in tensors}
    length = tensors[0].shape[1] if tensors[0].dim() == 2 and len(lengths) == 1 else 0
    if length > 1 and not any(x.is_floating_point() for x in tensors):
        examples.append(_map_tensors(example, lambda x: x[:, : length // 2]))
    return examples


def _map_tensors(example: Example, change: Any) -> Example:
    """Return an example with ``change`` (tensor → tensor) applied to each tensor that has dimensions."""
    inputs = example.args, dict(example.kwargs)
    return Example(*tree_map_only(Tensor, lambda x: change(x) if x.dim() else x, inputs))


@dataclass(frozen=True)
class NetworkState:
    """Everything that a growth may change in a network: its structure, tensors, attributes and configurations."""

    contents: Snapshot  # modules, parameters and attributes, and what containers hold
    tensors: Sequence[tuple[Tensor, int, Tensor]]  # tensor, its version (torch counts writes), a copy
    fields: Sequence[tuple[object, Mapping[str, object]]]  # object, such as a configuration, and its fields

    @classmethod
    def of(cls, model: nn.Module) -> "NetworkState":
        """Return the present state of a network; parameters are not copied, since a growth makes new ones."""
        written = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) and hasattr(m, "weight")}
        tensors = [x for x in find_tensors(model) if not x.is_meta]
        tensors = [x for x in tensors if not isinstance(x, nn.Parameter) or id(x) in written]
        copies = [(x, x._version, x.detach().clone()) for x in tensors]
        objects = [value for module in model.modules() for value in vars(module).values()]
        return cls(Snapshot(model), copies, [(value, _read_fields(value)) for value in objects if _has_fields(value)])

    def restore(self) -> None:
        """Restore the network of :meth:`of`, in place, bit for bit."""
        self.contents.restore()
        for holder, fields in self.fields:
            for name in _read_fields(holder).keys() - fields.keys():
                object.__delattr__(holder, name)
            for name, value in fields.items():
                if getattr(holder, name, None) is not value:
                    object.__setattr__(holder, name, value)
        with torch.no_grad():
            for tensor, version, old in self.tensors:
                if tensor._version != version:
                    tensor.detach().copy_(old)


def _has_fields(value: object) -> bool:
    """Whether a value has fields, such as a configuration, and is no tensor, module, class, container or function."""
    plain = Tensor | nn.Module | type | Mapping | list | tuple | set
    return not isinstance(value, plain) and not callable(value) and bool(_read_fields(value))


def _read_fields(value: object) -> dict[str, object]:
    """Return name → value of the fields of an object, those in ``__slots__`` included."""
    slots = [name for kind in type(value).__mro__ for name in _public_slots(getattr(kind, "__slots__", ()))]
    return {**{n: getattr(value, n) for n in slots if hasattr(value, n)}, **getattr(value, "__dict__", {})}


def _public_slots(slots: Any) -> list[str]:
    """Return the names in the ``__slots__`` of a class (a string is one name), without those that begin with ``__``."""
    names = [slots] if isinstance(slots, str) else [*slots]
    return [name for name in names if not name.startswith("__")]
