"""The axes of a network as rows that a person can read: what each is, where, and what one unit of it costs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from regrow.allocation.cost import Cost
from regrow.axes import Axis, AxisGraph
from regrow.method import Measure


@dataclass(frozen=True)
class Row:
    """One axis.

    Args:
        key: Its key.
        label: What makes its units and what reads them; the same for the same kind of axis in every block.
        block: The numbered block all of its tensors lie in; empty where they lie in several.
        size: How many units.
        mark: What cutting means.
        reason: Why it is frozen or marked.
        inside: The key of the axis whose units contain these.
        unit_params: Parameters that one unit less saves, of all parameters.
        unit_macs: Multiply–accumulates of one example that one unit less saves.
        tensors: In how many tensors it lies.
    """

    key: str
    label: str
    block: str
    size: int
    mark: str
    reason: str
    inside: str
    unit_params: int
    unit_macs: int
    tensors: int

    def record(self) -> dict[str, Any]:
        """Everything as JSON-able data."""
        return asdict(self)


def inventory(axes: AxisGraph, chosen: Iterable[Axis] | None = None) -> list[Row]:
    """A row for each axis, in the order of the network.

    Args:
        axes: The network's axes.
        chosen: Which of them; all, unless given.
    """
    parameters, macs = Cost(axes, Measure.PARAMETERS, counted=False), Cost(axes, Measure.MACS)
    return [_row(axis, parameters, macs) for axis in (axes if chosen is None else chosen)]


def _row(axis: Axis, parameters: Cost, macs: Cost) -> Row:
    less = {axis.key: axis.size - 1}
    names = list(dict.fromkeys(slot.name for slot in axis.slots))
    return Row(
        key=axis.key,
        label=axis.label,
        block=block(names),
        size=axis.size,
        mark=str(axis.mark),
        reason=axis.reason,
        inside=axis.inside,
        unit_params=parameters.total - parameters(less) if axis.free else 0,
        unit_macs=macs.total - macs(less) if axis.free else 0,
        tensors=len(names),
    )


def block(names: list[str]) -> str:
    """The longest numbered prefix that all names share: ``model.layers.7``."""
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    numbered = [i for i, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1]) if numbered else ""
