"""The axes of a network as table rows: what each axis is, where it lies, and what one unit of it costs."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from regrow.allocation.cost import Cost
from regrow.amounts import Measure
from regrow.axes import Axis, AxisGraph


@dataclass(frozen=True)
class Row:
    """One row of the table of axes.

    Args:
        key: The axis's key.
        label: Which modules produce its units and which read them; the same for axes of one kind in every block.
        block: The numbered block that all of its tensors lie in, such as ``model.layers.7``; empty if there are
            several.
        size: How many units.
        mark: What cutting it does to the network's function (:class:`regrow.axes.Mark`).
        reason: Why it is frozen or has its mark.
        inside: The key of the axis whose units contain these units.
        unit_params: How many parameters removing one unit saves; 0 if the axis is frozen.
        unit_macs: How many multiply–accumulates per example removing one unit saves; 0 if the axis is frozen.
        tensors: How many tensors it lies in.
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

    def record(self) -> dict[str, str | int]:
        """Return the row as JSON-able data."""
        return asdict(self)


def inventory(axes: AxisGraph, chosen: Iterable[Axis] | None = None) -> list[Row]:
    """Return one row per axis, in the order of the network.

    Args:
        axes: The network's axes.
        chosen: The axes to list; all if ``None``.
    """
    parameters, macs = Cost(axes, Measure.PARAMETERS), Cost(axes, Measure.MACS)
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
    """Return the longest numbered path prefix that all names share, such as ``model.layers.7``; or ``""``.

    Args:
        names: Names of parameters or buffers.
    """
    parts = [name.split(".") for name in names]
    shared: list[str] = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    numbered = [i for i, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1]) if numbered else ""
