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


def timed(axes: AxisGraph, sums: Mapping[str, Sequence[str]], table: Mapping[str, float]) -> Timed:
    """Spread the times of a table over parameters and operations.

    A module takes its time in proportion to the multiply–accumulates of its weights, so a layer with half its inputs
    and half its outputs is taken to need a quarter; one without any takes it evenly over its parameters; an operation
    without parameters all at once. What a sum takes beside its operations they share.

    Args:
        axes: The axes of the network as it was timed.
        sums: Path of each sum of candidates → the paths of its operations.
        table: Module → milliseconds (:func:`regrow.evaluation.latency`); under ``""`` what no module accounts for.
    """
    ops = dict.fromkeys((path for paths in sums.values() for path in paths), 0.0)
    sizes, own = axes.sizes(), dict[str, list[str]]()
    for name in axes.shapes:
        lies = next((path for path in above(name) if path in table and path not in sums), None)
        if lies is not None:
            own.setdefault(lies, []).append(name)
    entries: dict[str, float] = {}
    rest, each = table.get("", 0.0), macs_of(axes)
    for path, time in table.items():
        names = own.get(path, [])
        many = {name: prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in names}
        done = {name: each(name) * many[name] for name in names}
        if path in sums:
            for one in sums[path]:
                ops[one] += time / len(sums[path])
        elif total := sum(done.values()):
            entries |= {name: time * done[name] / total / many[name] for name in names}
        elif names:
            entries |= dict.fromkeys(names, time / sum(many.values()))
        elif path in ops:
            ops[path] += time
        elif path:
            rest += time
    return Timed(entries, ops, rest)


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
