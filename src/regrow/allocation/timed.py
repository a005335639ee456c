"""Prices: what a single entry of a parameter, an operation by itself, and the rest of a network cost."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from regrow.axes import AxisGraph, size_of
from regrow.work import per_example


@dataclass(frozen=True)
class Prices:
    """What a network costs by what it is made of.

    Args:
        entries: Parameter or buffer → what each of its entries costs.
        ops: Path of an operation → what it costs beside its entries.
        rest: What stays whatever goes.
    """

    entries: Mapping[str, float]
    ops: Mapping[str, float] = field(default_factory=dict)
    rest: float = 0.0


def spread_times(
    axes: AxisGraph,
    sums: Mapping[str, Sequence[str]],
    *,
    ops: Mapping[str, float],
    beside: Mapping[str, float],
    layers: Mapping[str, float],
    rest: float,
) -> Prices:
    """Spread times that were measured over parameters and operations.

    A module takes its time in proportion to the multiply–accumulates of its weights, so a layer with half its inputs
    and half its outputs is taken to need a quarter; one without any takes it evenly over its parameters; an operation
    without parameters all at once. What a sum takes beside its operations they share.

    Args:
        axes: The axes of the network as it was timed.
        sums: Path of each sum of candidates → the paths of its operations.
        ops: Operation → milliseconds (:func:`regrow.evaluation.latency`).
        beside: Sum → milliseconds beside its operations.
        layers: Layer that lies in no operation → milliseconds.
        rest: Milliseconds that no module accounts for.
    """
    sizes, each, modules = axes.sizes(), macs_of(axes), {**layers, **ops}
    own: dict[str, list[str]] = {}
    for name in axes.parameters - axes.ties.keys():
        if (lies := next((path for path in above(name) if path in modules), None)) is not None:
            own.setdefault(lies, []).append(name)
    entries: dict[str, float] = {}
    alone = {path: beside.get(total, 0.0) / len(paths) for total, paths in sums.items() for path in paths}
    for path, time in modules.items():
        many = {name: prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in sorted(own.get(path, []))}
        done = {name: each(name) * n for name, n in many.items()}
        if total := sum(done.values()):
            entries |= {name: time * done[name] / total / n for name, n in many.items()}
        elif many:
            entries |= dict.fromkeys(many, time / sum(many.values()))
        elif path in ops:
            alone[path] = alone.get(path, 0.0) + time
        else:
            rest += time
    return Prices(entries, alone, rest)


def macs_of(axes: AxisGraph) -> Callable[[str], float]:
    """Name of a parameter → the multiply–accumulates of one example that each entry of it takes part in."""
    sizes, done = axes.sizes(), _done(axes)

    def macs(name: str) -> float:
        module, _, leaf = name.rpartition(".")
        return done.get(module, 0) / prod(size_of(dim, sizes) for dim in axes.shapes[name]) if leaf == "weight" else 0.0

    return macs


def count_macs(axes: AxisGraph, ops: Collection[str]) -> Prices:
    """The multiply–accumulates of one example.

    What a module with a weight does is spread over its entries; what others do (attention, products of activations)
    counts whole as long as the operation that they lie in is there: more than it is, where widths go.

    Args:
        axes: The network's axes.
        ops: The paths of all operations.
    """
    each, alone, rest = macs_of(axes), dict.fromkeys(ops, 0.0), 0.0
    for module, many in _done(axes).items():
        if f"{module}.weight".lstrip(".") in axes.parameters:
            continue
        if path := next((path for path in (module, *above(module)) if path in alone), None):
            alone[path] += many
        else:
            rest += many
    return Prices({name: each(name) for name in axes.shapes}, alone, rest)


def _done(axes: AxisGraph) -> dict[str, int]:
    """Module → the multiply–accumulates of one example that it does."""
    sizes, done = axes.sizes(), dict[str, int]()
    for one in per_example(axes):
        done[one.module] = done.get(one.module, 0) + prod(size_of(dim, sizes) for dim in one.dims)
    return done


def above(name: str) -> list[str]:
    """The modules that a parameter lies in, the nearest first.

    >>> above("a.b.weight")
    ['a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
