"""A latency table as prices: what a single entry of a parameter, and an operation by itself, take of a pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from regrow.axes import AxisGraph, size_of


@dataclass(frozen=True)
class Timed:
    """Milliseconds of a pass by what it is made of.

    Args:
        entries: Parameter → what each of its entries takes.
        ops: Path of an operation → what it takes beside its entries.
        rest: What stays whatever goes.
    """

    entries: Mapping[str, float]
    ops: Mapping[str, float]
    rest: float


def timed(
    axes: AxisGraph,
    sums: Mapping[str, Sequence[str]],
    *,
    ops: Mapping[str, float],
    beside: Mapping[str, float],
    layers: Mapping[str, float],
    rest: float,
) -> Timed:
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
    return Timed(entries, alone, rest)


def macs_of(axes: AxisGraph) -> Callable[[str], float]:
    """Name of a parameter → the multiply–accumulates of the traced example that each entry of it takes part in."""
    sizes = axes.sizes()
    done: dict[str, int] = {}
    for one in axes.work:
        done[one.module] = done.get(one.module, 0) + prod(size_of(dim, sizes) for dim in one.dims)

    def macs(name: str) -> float:
        module, _, leaf = name.rpartition(".")
        return done.get(module, 0) / prod(size_of(dim, sizes) for dim in axes.shapes[name]) if leaf == "weight" else 0.0

    return macs


def above(name: str) -> list[str]:
    """The modules that a parameter lies in, the nearest first.

    >>> above("a.b.weight")
    ['a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
