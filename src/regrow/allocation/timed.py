"""The cost of a network split into costs of parameter entries, of operations by themselves, and a rest."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from regrow.core.amounts import Measure
from regrow.core.axes import AxisGraph, Product, size_of


@dataclass(frozen=True)
class Prices:
    """The cost of a network in one measure, by what it consists of.

    Args:
        entries: Parameter or buffer name → the cost of each of its entries.
        ops: Path of an operation → its cost beside that of its entries.
        rest: The cost that remains whatever is removed.
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
    """Return measured times distributed over parameter entries and operations, so that masks can be priced in time.

    ``sums``: path of a sum → paths of its operations; ``ops``, ``layers``: path → its time; ``beside``: path of a sum →
    its time beside its operations; ``rest``: all other time. A module takes its time in proportion to the
    multiply–accumulates of its weights, so a layer with half its inputs and half its outputs is assumed to need a
    quarter; a module without any spreads it evenly over its parameters; an operation without parameters carries it
    itself. The time of a sum beside its operations is divided equally among them.
    """
    sizes, modules = axes.sizes(), {**layers, **ops}
    macs_per_entry = _macs_per_entry(axes, _macs_per_module(axes))
    inside: dict[str, list[str]] = {}
    for name in sorted(axes.parameters - axes.ties.keys()):
        if (path := next((path for path in enclosing_modules(name) if path in modules), None)) is not None:
            inside.setdefault(path, []).append(name)
    entries: dict[str, float] = {}
    alone = {path: beside.get(total, 0.0) / len(paths) for total, paths in sums.items() for path in paths}
    for path, time in modules.items():
        counts = {name: axes.count_entries([name], sizes) for name in inside.get(path, [])}
        macs = {name: macs_per_entry[name] * n for name, n in counts.items()}
        if total := sum(macs.values()):
            entries |= {name: time * macs[name] / total / n for name, n in counts.items()}
        elif counts:
            entries |= dict.fromkeys(counts, time / sum(counts.values()))
        elif path in ops:
            alone[path] = alone.get(path, 0.0) + time
        else:
            rest += time
    return Prices(entries, alone, rest)


def prices_in(axes: AxisGraph, measure: Measure, timed: Prices | None, ops: Collection[str]) -> Prices:
    """Return the cost per parameter entry and operation (``ops``: paths) in a measure; for time, ``timed`` itself."""
    match measure:
        case Measure.PARAMETERS | Measure.NONZERO:
            return Prices(dict.fromkeys(axes.shapes, 1.0))
        case Measure.BYTES:
            return Prices({name: float(axes.itemsize.get(name, 4)) for name in axes.shapes})
        case Measure.MACS:
            return _count_macs(axes, ops)
        case Measure.TIME if timed is not None:
            return timed
        case Measure.TIME:
            raise ValueError("how long operations take was not measured: latency(…) does it")
    raise ValueError(f"a search does not count {measure}; count params, nonzero, macs, bytes or ms")


def _count_macs(axes: AxisGraph, ops: Collection[str]) -> Prices:
    """Return costs in multiply–accumulates of one example, per parameter entry and operation (``ops``: paths).

    Those of a module with a weight are spread over its entries. Those of other modules (attention, products of
    activations) count in full as long as their operation is active, which is too much once widths are cut.
    """
    macs, alone, rest = _macs_per_module(axes), dict.fromkeys(ops, 0.0), 0.0
    for module, count in macs.items():
        if f"{module}.weight".lstrip(".") in axes.parameters:
            continue
        if path := next((path for path in (module, *enclosing_modules(module)) if path in alone), None):
            alone[path] += count
        else:
            rest += count
    return Prices(_macs_per_entry(axes, macs), alone, rest)


def _macs_per_module(axes: AxisGraph) -> Counter[str]:
    """Return module path → the multiply–accumulates that it does for one example."""
    sizes, macs = axes.sizes(), Counter[str]()
    for work in axes.work_per_example():
        macs[work.module] += size_of(Product(work.dims), sizes)
    return macs


def _macs_per_entry(axes: AxisGraph, macs: Counter[str]) -> dict[str, float]:
    """Return parameter name → the multiply–accumulates per example that each of its entries takes part in."""
    sizes, result = axes.sizes(), dict.fromkeys(axes.shapes, 0.0)
    for name in axes.shapes:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            result[name] = macs[module] / axes.count_entries([name], sizes)
    return result


def enclosing_modules(name: str) -> list[str]:
    """Return the paths of the modules that contain a parameter, the innermost first.

    >>> enclosing_modules("a.b.weight")
    ['a.b', 'a']
    """
    parts = name.split(".")
    return [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
