"""Which weights read an axis, and importance scores that need only the weights: magnitude and random."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Slot
from regrow.core.scores import Scores, Statistics

PART, STRIP = 2**18, 64
"""About how many entries of a matrix are in float64 at a time, in columns of a multiple of STRIP: they fit the cache.
Each column is summed in the same order as in the whole matrix."""


@dataclass(frozen=True)
class Reader:
    """A weight that contracts an axis (sums over its units), and where the units lie in it.

    Args:
        axis: The axis's key.
        size: How many units it has.
        weight: The first name of the weight (the one in the statistics), even where the slot names a tied alias.
        slot: Where the units lie in the contracted dimension.
    """

    axis: str
    size: int
    weight: str
    slot: Slot

    def positions(self, channels: int, width: int) -> Tensor:
        """Return the input channels of each unit, ``[size, k]`` int64.

        Args:
            channels: How many input channels the operation sees.
            width: The weight's size in the contracted dimension; a grouped convolution sees ``groups × width``.
        """
        inside = self.slot.positions(self.size)
        groups = torch.arange(channels // width) * width
        return (inside[:, None, :] + groups[None, :, None]).reshape(self.size, -1)


def readers(axes: AxisGraph, units: Sequence[Axis] | None = None) -> tuple[Reader, ...]:
    """Return the weights that read each axis; tied weights appear once.

    Args:
        axes: The network's axes.
        units: The axes to look at; ``axes.units()`` if none are named.
    """
    result: dict[tuple[object, ...], Reader] = {}
    for axis in axes.units() if units is None else units:
        for slot in axis.consumers():
            weight = axes.ties.get(slot.name, slot.name)
            place = (axis.key, weight, slot.dim, slot.outer, slot.stride, slot.inner, slot.offset)
            result.setdefault(place, Reader(axis.key, axis.size, weight, slot))
    return tuple(result.values())


def scorable(axes: AxisGraph, units: Sequence[Axis] | None = None) -> tuple[Axis, ...]:
    """Return the axes that some weight reads; activation-based metrics cannot score the others.

    Args:
        axes: The network's axes.
        units: The axes to choose from; ``axes.units()`` if none are named.
    """
    read = {reader.axis for reader in readers(axes, units)}
    return tuple(axis for axis in (axes.units() if units is None else units) if axis.key in read)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter under each of its names, detached but not copied.

    Args:
        model: The network.
    """
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


class CachedColumns(Mapping[str, Tensor]):
    """Weights whose column norms are computed once, though several scores need them.

    Args:
        weights: Parameter name → tensor.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.shapes: dict[str, torch.Size] = {}
        self.norms: dict[tuple[str, int, int | None, str], Tensor] = {}

    def over(self, weights: Mapping[str, Tensor]) -> "CachedColumns":
        """Return the same norms over other tensors of the same values, such as a network that was loaded again.

        Args:
            weights: Parameter name → tensor.
        """
        made = CachedColumns(weights)
        made.shapes, made.norms = self.shapes, self.norms
        return made

    def __getitem__(self, name: str) -> Tensor:
        """Return a weight."""
        return self.weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def width(self, name: str, dim: int) -> int:
        """Return the size of a weight in a dimension.

        Args:
            name: The name of the weight.
            dim: The dimension.
        """
        if name not in self.shapes:
            self.shapes[name] = self.weights[name].shape
        return self.shapes[name][dim]

    def columns(self, name: str, dim: int, channels: int | None = None, *, form: str = "square") -> Tensor:
        """Return what :func:`columns` does for a weight.

        Args:
            name: The name of the weight.
            dim: The dimension that is contracted with the input.
            channels: How many input channels the operation sees: the size times the groups; ``None``: the size.
            form: As in :func:`columns`.
        """
        key = name, dim, channels, form
        if key not in self.norms:
            weight = self.weights[name]
            self.shapes[name] = weight.shape
            groups = 1 if channels is None else channels // weight.shape[dim]
            self.norms[key] = columns(weight, dim, groups, form=form)
        return self.norms[key]


def columns(weight: Tensor, dim: int, groups: int = 1, *, form: str = "square") -> Tensor:
    """Return one norm per input channel of a weight, ``[groups * weight.shape[dim]]`` float64.

    Args:
        weight: The weight.
        dim: The dimension that is contracted with the input.
        groups: The number of groups of a grouped convolution.
        form: ``square``: ‖W_j‖². ``norm``: ‖W_j‖. ``mean``: mean over i of abs(W_ij).

    >>> columns(torch.tensor([[3.0, 0.0], [4.0, -2.0]]), 1).tolist()
    [25.0, 4.0]
    """
    plain = weight.dim() == 2 and weight.is_contiguous() and weight.device.type == "cpu"
    if plain and dim == 1 and groups == 1 and weight.numel() > PART:
        parts = weight.detach().split(max(STRIP, PART // len(weight) // STRIP * STRIP), 1)
        return torch.cat([_columns(one.contiguous(), dim, groups, form) for one in parts])
    return _columns(weight, dim, groups, form)


def _columns(weight: Tensor, dim: int, groups: int, form: str) -> Tensor:
    own = weight.detach().to(torch.float64, copy=True)  # worked on in place: an embedding's takes gigabytes
    parts = own.unflatten(0, (groups, -1)) if groups > 1 else own[None]
    rest = [d for d in range(1, parts.dim()) if d != dim + 1]
    if form == "mean":
        return (parts.abs_().mean(rest) if rest else parts.abs_()).flatten().cpu()
    square = (parts.square_().sum(rest) if rest else parts.square_()).flatten().cpu()
    return square.sqrt() if form == "norm" else square


def magnitude(
    weights: Mapping[str, Tensor],
    axes: AxisGraph,
    statistics: Statistics | None = None,
    *,
    units: Sequence[Axis] | None = None,
    form: str = "columns",
) -> Scores:
    """Score units by the norm of their weights; needs no data.

    ``columns`` (FLAP's repository, "mag-sp"): Σ over the unit's input channels j of ‖W_j‖₂, over all weights that read
    it. ``group`` (DepGraph): the root of Σ w² over every parameter entry the unit owns.

    Args:
        weights: Parameter name → tensor.
        axes: The network's axes.
        statistics: Ignored; it is there because all metrics take it.
        units: The axes to score; ``axes.units()`` if none are named.
        form: ``"columns"`` or ``"group"``.

    Returns:
        One number per unit, ``[size]``.

    Source: An et al., FLAP (arXiv 2312.11983), code; Fang et al., DepGraph (arXiv 2301.12900).
    """
    chosen = scorable(axes, units)
    values: dict[str, Tensor] = {}
    if form == "columns":
        for reader in readers(axes, chosen):
            weight = weights[reader.weight]
            norms = columns(weight, reader.slot.dim, form="norm")
            summed = norms[reader.positions(len(norms), len(norms))].sum(1)
            values[reader.axis] = values.get(reader.axis, 0) + summed
    elif form == "group":
        for axis in chosen:
            owned = [
                columns(weights[name], slot.dim)[where].sum(1) for name, slot, where in tensors(axes, axis, weights)
            ]
            values[axis.key] = torch.stack(owned).sum(0).sqrt()
    else:
        raise ValueError(f"magnitude has the forms 'columns' and 'group'; got {form!r}")
    return check_scores(Scores(values, f"magnitude/{form}"))


def random(axes: AxisGraph, *, units: Sequence[Axis] | None = None, seed: int = 0) -> Scores:
    """Score units by uniform random numbers, seeded by each axis's key, so the order of axes does not matter.

    Args:
        axes: The network's axes.
        units: The axes to score; ``axes.units()`` if none are named.
        seed: The random seed.
    """
    values = {}
    for axis in scorable(axes, units):
        number = int.from_bytes(sha256(f"{seed}:{axis.key}".encode()).digest()[:7])
        values[axis.key] = torch.rand(axis.size, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    return Scores(values, "random")


def tensors(axes: AxisGraph, axis: Axis, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Slot, Tensor]]:
    """Yield the parameters that an axis runs through, tied ones once: (first name, slot, entries per unit).

    The entries have the shape ``[size, k]``.

    Args:
        axes: The network's axes.
        axis: The axis.
        weights: Parameter name → tensor; parameters that it lacks are left out.
    """
    seen = set()
    for slot in axis.slots:
        name = axes.ties.get(slot.name, slot.name)
        place = (name, slot.dim, slot.outer, slot.stride, slot.inner, slot.offset)
        if name in weights and place not in seen:
            seen.add(place)
            yield name, slot, slot.positions(axis.size)


def check_scores(scores: Scores) -> Scores:
    """Return the scores unchanged, or raise ValueError, with the axis, if one of them is NaN or infinite.

    Args:
        scores: The scores to check.

    Raises:
        ValueError: If one is not a number, with the axis it belongs to.
    """
    for key, values in scores.values.items():
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).sum())
            raise ValueError(
                f"{scores.metric} of {key!r}: {bad} of {len(values)} scores are not finite; its weights or inputs "
                "hold NaN or infinity"
            )
    return scores
