"""Which weights read an axis and where, and the norms of their columns."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Role, Slot, size_of
from regrow.core.scores import Tensors

# About how many entries of a matrix are in float64 at a time, in columns of a multiple of STRIP: they fit the cache.
# Each column is summed in the same order as in the whole matrix.
PART, STRIP = 2**18, 64


@dataclass(frozen=True)
class Reader:
    """A weight that contracts an axis (sums over its units), and where the units lie in it."""

    axis: str  # the axis's key
    size: int  # how many units it has
    weight: str  # the first name of the weight (the one in the statistics), even where the slot names a tied alias
    slot: Slot  # where the units lie in the contracted dimension
    width: int  # the weight's size in that dimension; a grouped convolution sees `groups × width` channels

    def positions(self, channels: int) -> Tensor:
        """Return the input channels of each unit, ``[size, k]`` int64, of an input with ``channels`` channels."""
        inside = self.slot.positions(self.size)
        groups = torch.arange(channels // self.width) * self.width
        return (inside[:, None, :] + groups[None, :, None]).reshape(self.size, -1)


def readers(axes: AxisGraph, units: Iterable[Axis]) -> tuple[Reader, ...]:
    """Return the weights that read each of the axes ``units``, and where; tied weights appear once."""
    sizes = axes.sizes()
    result: dict[tuple[str, Slot], Reader] = {}
    for axis in units:
        for slot in axis.consumers():
            weight = axes.ties.get(slot.name, slot.name)
            width = size_of(axes.shapes[weight][slot.dim], sizes)
            result.setdefault((axis.key, replace(slot, name=weight)), Reader(axis.key, axis.size, weight, slot, width))
    return tuple(result.values())


def group_by_weight(reads: Sequence[Reader]) -> dict[str, list[Reader]]:
    """Return name of a weight → its readers, one per axis that it reads."""
    result: dict[str, list[Reader]] = {}
    for reader in reads:
        result.setdefault(reader.weight, []).append(reader)
    return result


def scorable_axes(axes: AxisGraph, units: Sequence[Axis] | None = None) -> tuple[Axis, ...]:
    """Return those of ``units`` (or ``axes.units()``) that some weight reads; metrics cannot score the others."""
    return tuple(axis for axis in (axes.units() if units is None else units) if axis.consumers())


def axis_parameters(axes: AxisGraph, axis: Axis, weights: Tensors) -> Iterator[tuple[str, Slot, Tensor]]:
    """Yield (first name, slot, entries per unit) of the parameters that an axis runs through, tied ones once.

    The entries, ``[size, k]``, are indices along the slot's dimension; parameters that ``weights`` lacks are left out.
    """
    seen = set()
    for slot in axis.slots:
        name = axes.ties.get(slot.name, slot.name)
        entries = replace(slot, name=name, role=Role.PRODUCES)
        if name in weights and entries not in seen:
            seen.add(entries)
            yield name, slot, slot.positions(axis.size)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter under each of its names, detached but not copied."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def column_norms(weight: Tensor, dim: int, groups: int = 1, *, form: str = "square") -> Tensor:
    """Return a norm per input channel of a weight, contracted along ``dim``, ``[groups * weight.shape[dim]]`` float64.

    ``form``: ``square``: ‖W_j‖²; ``norm``: ‖W_j‖; ``mean``: mean over i of abs(W_ij). ``groups``: of a convolution.

    >>> column_norms(torch.tensor([[3.0, 0.0], [4.0, -2.0]]), 1).tolist()
    [25.0, 4.0]
    """
    plain = weight.dim() == 2 and weight.is_contiguous() and weight.device.type == "cpu"
    if plain and dim == 1 and groups == 1 and weight.numel() > PART:
        parts = weight.detach().split(max(STRIP, PART // len(weight) // STRIP * STRIP), 1)
        return torch.cat([_column_norms(part.contiguous(), dim, groups, form) for part in parts])
    return _column_norms(weight, dim, groups, form)


def _column_norms(weight: Tensor, dim: int, groups: int, form: str) -> Tensor:
    """Return :func:`column_norms` of a weight, of which a float64 copy is made as a whole."""
    wide = weight.detach().to(torch.float64, copy=True)  # worked on in place: an embedding's takes gigabytes
    parts = wide.unflatten(0, (groups, -1)) if groups > 1 else wide[None]
    rest = [d for d in range(1, parts.dim()) if d != dim + 1]
    parts = parts.abs_() if form == "mean" else parts.square_()
    if rest:
        parts = parts.mean(rest) if form == "mean" else parts.sum(rest)
    result = parts.flatten().cpu()
    return result.sqrt() if form == "norm" else result
