"""Decide how many units axes gain: all MLPs, attention heads or channels of convolutional blocks, or named axes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import lcm
from typing import Literal

from regrow.core.amounts import Increase
from regrow.core.axes import Axis, AxisGraph, RecordedStep, Role, axes_in, matches
from regrow.core.axes.inventory import block

Part = Literal["mlp", "heads", "channels"]
PARTS: tuple[Part, ...] = ("mlp", "heads", "channels")
"""The kinds of axes that can be widened by one name."""
_NAMES = {"mlp": "MLP", "heads": "attention heads", "channels": "inner channels of convolutions"}


@dataclass(frozen=True)
class Widening:
    """How many units each axis gains, and why others cannot gain any.

    Args:
        grow: Axis key → the number of units it gains.
        refused: Axis key → why it cannot be widened.
    """

    grow: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def widening(
    axes: AxisGraph,
    parts: Mapping[Part, Increase],
    named: Mapping[str, Increase],
    *,
    round_to: int = 1,
    regular: bool = False,
    even: bool = False,
) -> Widening:
    """Return how many units each axis gains.

    Args:
        axes: The network's axes.
        parts: ``"mlp"``, ``"heads"`` or ``"channels"`` → the increase of every axis of that kind.
        named: Axis key, or a pattern of keys or of dotted names → the increase; it has precedence over ``parts``.
        round_to: Widths become multiples of this, rounded up.
        regular: Whether axes with the same role in several blocks get one width: the largest among them.
        even: Whether the numbers of added units must be even, for units that are added in pairs.

    Raises:
        ValueError: If the network has no axis of a kind or name, or none of them can be widened; names the reason.
    """
    wanted: dict[str, Increase] = {}
    refused: dict[str, str] = {}
    known = classify(axes) if parts else {}
    for part, increase in parts.items():
        found = [axes[key] for key, one in known.items() if one == part]
        if not found:
            raise ValueError(f"the network has no {_NAMES[part]}; `regrow show` lists its axes")
        wanted |= dict.fromkeys(_widenable(found, refused, f"the {_NAMES[part]}"), increase)
    for name, increase in named.items():
        wanted |= dict.fromkeys(_widenable(_named(axes, name), refused, f"axis {name!r}"), increase)
    grow = {key: _rounded(axes[key], axes[key].size + one.of(axes[key].size), round_to) for key, one in wanted.items()}
    if regular:
        grow = _level(axes, grow)
    units = {key: after - axes[key].size for key, after in grow.items()}
    if even:
        steps = {key: lcm(axes[key].multiple, round_to) for key in units}
        units = {key: n + n % 2 * steps[key] for key, n in units.items()}
    return Widening({key: n for key, n in units.items() if n}, {k: why for k, why in refused.items() if k not in grow})


def classify(axes: AxisGraph) -> dict[str, Part]:
    """Return axis key → what it is: hidden neurons of an MLP, attention heads, or inner channels of convolutions.

    Linear layers make hidden neurons and read them, convolutions make channels. An axis to which a residual connection
    adds is neither. Where convolutions lie in numbered blocks, channels outside of them (the first layer's) do not
    count.

    Args:
        axes: The network's axes, frozen ones too.
    """
    steps = _Steps.of(axes)
    heads = _heads(axes)
    result: dict[str, Part] = {}
    channels = []
    for axis in axes:
        made, read = (steps.readers_of(axis, role) for role in (Role.PRODUCES, Role.CONSUMES))
        if axis.key in heads:
            result[axis.key] = "heads"
            continue
        if _lies_in(axis, heads, axes) or not made or not read or not {*made}.isdisjoint(read):
            continue
        if any(steps.adds(step) for step in made if step > min(read)):
            continue
        if all(steps.convolves(step) for step in made):
            channels.append(axis)
        elif not any(steps.convolves(step) for step in (*made, *read)):
            result[axis.key] = "mlp"
    inner = [axis for axis in channels if block([slot.name for slot in axis.slots])]
    return result | dict.fromkeys((axis.key for axis in inner or channels), "channels")


@dataclass(frozen=True)
class _Steps:
    """The recorded operations, with who reads what.

    Args:
        steps: The operations.
        readers: Name of a parameter → the first operation that reads it.
        users: Operation → the first operation that reads its result.
    """

    steps: Sequence[RecordedStep]
    readers: Mapping[str, int]
    users: Mapping[int, int]

    @classmethod
    def of(cls, axes: AxisGraph) -> "_Steps":
        readers: dict[str, int] = {}
        users: dict[int, int] = {}
        for number, step in enumerate(axes.steps):
            for operand in step.operands:
                if isinstance(operand, str):
                    readers.setdefault(operand, number)
                else:
                    users.setdefault(operand, number)
        first = {name: axes.ties.get(name, name) for name in axes.shapes}
        return cls(axes.steps, {name: readers[one] for name, one in first.items() if one in readers}, users)

    def readers_of(self, axis: Axis, role: Role) -> list[int]:
        """Return the operations that read the tensors in which an axis has a role."""
        names = dict.fromkeys(slot.name for slot in axis.slots if slot.role is role)
        return [self.readers[name] for name in names if name in self.readers]

    def convolves(self, step: int) -> bool:
        """Whether an operation is a convolution."""
        return "conv" in self.steps[step].op

    def adds(self, step: int) -> bool:
        """Whether the next operation that combines the result of one with another result is a sum."""
        while step in self.users:
            step = self.users[step]
            if sum(isinstance(one, int) for one in self.steps[step].operands) > 1:
                return self.steps[step].op in ("add", "sub")
        return False


def _heads(axes: AxisGraph) -> set[str]:
    """Return the outermost axes that lie in the heads' dimension of an attention, the third from the end.

    Of an attention whose heads are frozen, these are the outermost frozen axes that its weights make.
    """
    found: set[str] = set()
    places: set[str] = set()
    for step in axes.steps:
        if step.op in ("scaled_dot_product_attention", "softmax", "_softmax"):
            every = [dims for dims in step.shapes if dims and len(dims) > 3]
            places |= {step.module} if every and step.module else set()
            found |= {key for dims in every for key in axes_in(dims[-3])}
    for axis in axes:
        made = [slot.name.rpartition(".")[0] for slot in axis.slots if slot.role is Role.PRODUCES]
        if not axis.free and made and all(name in places for name in made):
            found.add(axis.key)
    return {key for key in found if not _lies_in(axes[key], found, axes)}


def _lies_in(axis: Axis, others: Iterable[str], axes: AxisGraph) -> bool:
    """Whether an axis lies, at any depth, inside one of some others."""
    inside = axis.inside
    while inside:
        if inside in others:
            return True
        inside = axes[inside].inside if inside in axes.axes else ""
    return False


def _named(axes: AxisGraph, name: str) -> list[Axis]:
    """Return the axis of a key, or those whose key or tensors' names all fit a pattern.

    Raises:
        ValueError: If there is none.
    """
    if name in axes.axes:
        return [axes[name]]
    found = [a for a in axes if fnmatchcase(a.key, name) or all(matches(slot.name, name) for slot in a.slots)]
    # A pattern asks for what can be widened: axes inside others and frozen ones are left out if any other fits.
    chosen = [axis for axis in found if axis.free and not axis.narrow and not axis.inside] or found
    if not chosen:
        raise ValueError(f"no axis fits {name!r}; `regrow show` lists the keys of all axes")
    return chosen


def _widenable(found: Iterable[Axis], refused: dict[str, str], what: str) -> list[str]:
    """Return the keys of the axes that can be widened, and note the reason of the others.

    Raises:
        ValueError: If none can be widened.
    """
    keys = []
    for axis in found:
        if why := axis.narrow or ("" if axis.free else axis.reason):
            refused[axis.key] = why
        else:
            keys.append(axis.key)
    if not keys:
        key = next(iter(refused))
        raise ValueError(f"{what} cannot be widened: {key}: {refused[key]}; widen other axes, see `regrow show`")
    return keys


def _rounded(axis: Axis, size: int, round_to: int) -> int:
    step = lcm(axis.multiple, round_to)
    return -(-size // step) * step


def _level(axes: AxisGraph, sizes: Mapping[str, int]) -> dict[str, int]:
    """Return sizes in which all axes of one role get the largest size among them."""
    roles: dict[tuple[object, ...], list[str]] = {}
    for key in sizes:
        places = {(name, dim, role) for name, dim, *_, role in axes[key].kind[1]}
        roles.setdefault(tuple(sorted(places)), []).append(key)
    return {key: max(sizes[one] for one in group) for group in roles.values() for key in group}
