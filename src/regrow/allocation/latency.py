"""The time of a network under the masks of a search, interpolated from times at several widths."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.allocation.cost import enclosing_modules


@dataclass(frozen=True)
class Latency:
    """The measured time of a search space's forward pass, by module, at several widths of the whole network.

    Args:
        curves: Module path → points (size, milliseconds), of ascending size; the last is at full width. The time is
            that beside the measured modules inside; that of the network, ``""``, is all other time. The size of a layer
            is the number of its parameter entries; that of others is the mean fraction that layers have of theirs.
    """

    curves: Mapping[str, Sequence[tuple[float, float]]]

    @property
    def total(self) -> float:
        """Milliseconds of the whole pass at full width."""
        return sum(curve[-1][1] for curve in self.curves.values())


@dataclass(frozen=True)
class TimeCurves:
    """The curves of the modules of a network, and where its masks enter them.

    Args:
        sizes: The sizes of the points of each curve, ``[modules, points]`` float64.
        ms: Their milliseconds, ``[modules, points]`` float64.
        layers: Which modules are layers, whose size is that of their tensors, ``[modules]`` bool.
        entries: The number of entries of each tensor, ``[tensors]`` float64.
        module: The index of the module of each tensor, ``[tensors]``.
        lines: For the dimension of each tensor that makes filters, and for the one that reads them: the index of the
            tensor that each position belongs to, the index of its filter, and one over the dimension's size.
        ops: The index of a module, the index of an operation that it belongs to, and its share in the module's time.
    """

    sizes: Tensor
    ms: Tensor
    layers: Tensor
    entries: Tensor
    module: Tensor
    lines: tuple[tuple[Tensor, Tensor, Tensor], ...]
    ops: tuple[Tensor, Tensor, Tensor]

    def total(self, ops: Tensor, filters: Tensor) -> Tensor:
        """Return the milliseconds under masks, ``[]`` float64; both masks end with a 1 for "none"."""
        filters, size = filters.double(), self.entries
        for tensor, line, part in self.lines:
            kept = filters.index_select(0, line) * part
            size = size * torch.zeros_like(self.entries).index_add(0, tensor, kept)
        module, op, part = self.ops
        running = torch.zeros_like(self.ms[:, 0]).index_add(0, module, ops.double().index_select(0, op) * part)
        size = torch.zeros_like(running).index_add(0, self.module, size)
        weight = running * self.ms[:, -1] * self.layers
        mean = (weight * size / self.sizes[:, -1]).sum() / weight.sum().clamp_min(1e-12)
        size = torch.where(self.layers, size, mean)[:, None]
        end = torch.searchsorted(self.sizes, size.detach(), right=True).clamp(1, self.sizes.shape[1] - 1)
        (low, high), (fast, slow) = ((t.gather(1, end - 1), t.gather(1, end)) for t in (self.sizes, self.ms))
        times = fast + (slow - fast) * (size - low) / (high - low).clamp_min(1e-9)
        return (running * times[:, 0]).sum()


def build_times(
    latency: Latency,
    parameters: Mapping[str, Tensor],
    lines: Mapping[tuple[str, bool], tuple[int, Tensor]],
    filters: int,
    sums: Mapping[str, Sequence[str]],
    ops: Mapping[str, int],
) -> TimeCurves:
    """Return the curves of the modules that run, tied to the masks of operations and filters.

    ``parameters``: those that run, by name; ``lines``: parameter, whether it reads → a dimension, and the filter of
    each position of it, ``filters`` for none; ``sums``: path of a sum → paths of its operations; ``ops``: path of
    a module → the index of the operation that it goes with. Operations share the time of their sum equally.
    """
    scales = {path: f"{path}.scale".lstrip(".") for path in sums}
    runs = {path: scales[total] in parameters for total, paths in sums.items() for path in (total, *paths)}
    layer = {name: name.rpartition(".")[0] for name in parameters if name not in scales.values()}
    names = [name for name, path in layer.items() if path and path in latency.curves]
    held = {layer[name] for name in names}
    curves = {
        path: [*curve]
        for path, curve in latency.curves.items()
        if path in held or (curve[-1][0] == 1 and runs.get(path, True))
    }
    owners = list[tuple[int, int, float]]()
    for i, path in enumerate(curves):
        owner = next((outer for outer in (path, *enclosing_modules(path)) if outer in ops), "")
        parts = sums.get(path) or [owner]
        owners += [(i, ops.get(op, len({*ops.values()})), 1 / len(parts)) for op in parts]
    most = 1 + max(map(len, curves.values()))
    points = torch.tensor([curve[:1] * (most - len(curve)) + curve for curve in curves.values()], dtype=torch.float64)
    index = {path: i for i, path in enumerate(curves)}
    positions = []
    for reads in (False, True):
        each = [lines[name, reads][1] if (name, reads) in lines else torch.tensor([filters]) for name in names]
        tensor = torch.arange(len(each)).repeat_interleave(torch.tensor([len(line) for line in each]))
        part = torch.cat([torch.full(line.shape, 1 / len(line), dtype=torch.float64) for line in each])
        positions.append((tensor, torch.cat(each), part))
    owner_index, op_index, shares = zip(*owners, strict=True)
    return TimeCurves(
        sizes=points[..., 0].contiguous(),
        ms=points[..., 1].contiguous(),
        layers=torch.tensor([path in held for path in curves]),
        entries=torch.tensor([parameters[name].numel() for name in names], dtype=torch.float64),
        module=torch.tensor([index[layer[name]] for name in names]),
        lines=(positions[0], positions[1]),
        ops=(torch.tensor(owner_index), torch.tensor(op_index), torch.tensor(shares, dtype=torch.float64)),
    )
