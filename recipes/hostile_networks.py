"""Hostile networks: every axis that tracing finds is one, and what cannot be cut is refused in one line.

    python recipes/hostile_networks.py                       # all three kinds; goes on where it was stopped
    python recipes/hostile_networks.py own --only width_     # networks of hostile_nets/ with this in their names
    python recipes/hostile_networks.py --show

There are 69 families of networks of our own (hostile_nets/), six of each by seed, half of them with an ordinary block
in front; 95 architectures of timm with random weights and small inputs; small transformers wrapped by peft. Each is
traced, and cut by five random plans in float64; every second plan is carried out after the network has run once. What
the cut network answers, run twice, is compared with the whole network in which dropped units count for nothing, by
means that know nothing of regrow's: reads written into the networks by hand (hostile_nets/masking.py), and for networks
without them zeros in all entries that the cut one has lost (there, too).

Outcomes: ``ok`` (within 1e-9 of the largest answer), ``nothing to cut`` (every axis is frozen), ``refused`` (one line,
by tracing or by ``apply``), ``raw error`` (anything else that is raised, or a tensor without numbers left on the
network), ``wrong`` (no error and another answer).
"""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from math import inf, lcm
from pathlib import Path
from random import Random
from typing import Any

import torch
from harness import Row, add, arguments, rows, today
from hostile_nets import algebra, control, memory, shapes, state
from hostile_nets.build import Built, Front, Net, families, idle_parts, randomise
from hostile_nets.masking import NOT_BY_ZEROS, Double, Masks, answers, kept_entries, masked, zero
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from regrow.core.axes import AxisGraph
from regrow.core.plan import Plan, PlanError
from regrow.surgery import apply
from regrow.surgery.carry import apply_unchecked
from regrow.tracing import TraceError, trace

OUT = Path(__file__).parent / "results" / "hostile_networks.jsonl"
FAMILIES = {
    f"{kind.__name__.rpartition('.')[2]}/{name}": family
    for kind in (control, memory, state, algebra, shapes)
    for name, family in families(kind).items()
}
VARIANTS = 6
PLANS = 5
FAULT = "a fault of regrow"
"""What ``apply`` says of a plan that its proof refuses and no code of the network explains."""
BOUND = 1e-9

Make = Callable[[], Built]


def own(name: str) -> Built:
    """One of our networks, always the same one: ``control/width_decides#2``."""
    built = _built(name)
    for part in _idle(name):
        delattr(built.model, part)
    return built


def _built(name: str) -> Built:
    family, _, seed = name.partition("#")
    torch.manual_seed(int(seed))
    built = FAMILIES[family](Random(f"{family}{seed}"))
    first = built.args[0]
    if int(seed) % 2 and type(built.model) is Net and isinstance(first, Tensor) and first.is_floating_point():
        built.model.front = Front(first.shape[-1])
    torch.manual_seed(int(seed) + 1)
    randomise(built.model).eval()
    return built


@cache
def _idle(name: str) -> list[str]:
    return [] if name.startswith("control") else idle_parts(_built(name), lambda built: run(built, 1))


def random_plan(axes: AxisGraph, random: Random, marks: tuple[str, ...] = ()) -> Plan:
    """A random number of random units of each axis; those whose sizes must agree lose alike.

    Args:
        axes: The axes.
        random: Where randomness comes from.
        marks: Leave axes with these marks whole.
    """
    groups: dict[str, list[Any]] = {}
    for axis in axes.free():
        groups.setdefault(axis.count or axis.key, []).append(axis)
    keep: dict[str, list[int]] = {}
    for members in groups.values():
        step = lcm(*(axis.times * axis.multiple for axis in members))
        most = min(axis.size * axis.times for axis in members) // step
        least = min(most, max(-(-max(axis.least, 1) * axis.times // step) for axis in members))
        if random.random() < 0.2 or any(str(axis.mark) in marks for axis in members):
            continue
        count = random.randint(least, most)
        for axis in members:
            keep[axis.key] = sorted(random.sample(range(axis.size), count * step // axis.times))
    return Plan.keeping(axes, keep)


def run(built: Built, times: int = 2) -> list[Tensor]:
    """What a network answers, run several times with its own copy of the inputs."""
    results: list[Tensor] = []
    with torch.no_grad(), Double():
        for _ in range(times):
            args, kwargs = _copied((built.args, dict(built.kwargs)))
            results += [x.detach().clone() for x in answers(built.model(*args, **kwargs))]
    return results


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value


def distance(results: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a part of the largest expected number; infinite where forms differ."""
    if [x.shape for x in results] != [x.shape for x in expected]:
        return inf
    scale = max((float(x[x.isfinite()].abs().max()) for x in expected if x.isfinite().any()), default=0.0) or 1.0
    gaps = [
        (a.double() - b.double()).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0.0)
        for a, b in zip(results, expected, strict=True)
        if a.numel()
    ]
    return max((float(gap.nan_to_num(inf, inf, inf).max()) for gap in gaps), default=0.0) / scale


def made(make: Make, warm: bool) -> Built:
    """A network, new or after a run."""
    built = make()
    if warm:
        run(built, 1)
    return built


def reference(make: Make, axes: AxisGraph, plan: Plan, warm: bool) -> list[Tensor]:
    """What the whole network answers when the units that a plan drops count for nothing.

    Its own code says where units are read; if it does not, there are zeros in place of all that the cut one has lost.

    Raises:
        NotImplementedError: If neither way can tell.
    """
    # apply_unchecked is what apply does once it has tried
    kept = kept_entries(lambda: made(make, warm).model, lambda model: apply_unchecked(model, axes, plan)[0])
    masks, built = Masks(kept), made(make, warm)
    with masked(masks):
        results = run(built)
    cut = [axes[key] for key, change in plan.changes.items() if len(change.keep) < change.size]
    if all({f"{slot.name}:{slot.dim}" for slot in axis.slots} & masks.read for axis in cut):
        return results
    if axis := next((axis for axis in cut if axis.mark in NOT_BY_ZEROS), None):
        raise NotImplementedError(f"neither zeros nor the network itself mask {axis.key}, which is {axis.mark}")
    built, fast = made(make, warm), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with zero(built.model, kept):
            return run(built)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def left_behind(model: nn.Module) -> str:
    """Where a tensor without numbers is held, if anywhere in reach of the network."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", model)]
    while waiting:
        path, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if isinstance(value, FakeTensor) or value.is_meta:
                return path
        elif isinstance(value, dict):
            waiting += [(f"{path}[{key!r}]", part) for key, part in value.items()]
        elif isinstance(value, list | tuple | set) or type(value).__name__ == "deque":
            waiting += [(f"{path}[{i}]", part) for i, part in enumerate(value)]
        elif isinstance(value, type(left_behind)):
            waiting += [(f"{path}<closure>", cell.cell_contents) for cell in value.__closure__ or ()]
        elif hasattr(value, "__dict__") and not isinstance(value, type) and type(value).__module__ != "logging":
            waiting += [(f"{path}.{name}", part) for name, part in vars(value).items()]
            if isinstance(value, nn.Module):
                of_class = vars(type(value)).items()
                waiting += [(f"{path}.{name}", part) for name, part in of_class if isinstance(part, Tensor)]
    return ""


def examine(name: str, make: Make, marks: tuple[str, ...] = ()) -> Row:
    """Trace a network, cut it by random plans, and compare.

    Args:
        name: Of the network.
        make: Builds it, always the same one.
        marks: Axes with these marks are left whole.
    """
    row: Row = {"network": name, "axes": 0, "plans": 0, "outcome": "ok", "largest": 0.0, "refusal": ""}
    started = time.process_time()
    try:
        _examine(name, make, marks, row)
    except (TraceError, PlanError) as error:
        raw = "\n" in str(error) or not str(error) or FAULT in str(error)
        row |= {"outcome": "raw error" if raw else "refused", "refusal": str(error)}
    except NotImplementedError as error:
        row |= {"outcome": "not covered", "refusal": str(error)}
    except Exception as error:
        row |= {"outcome": "raw error", "refusal": f"{type(error).__name__}: {str(error).strip()[:300]}"}
    return row | {"seconds": round(time.process_time() - started, 2), "date": today()}


def _examine(name: str, make: Make, marks: tuple[str, ...], row: Row) -> None:
    expected = run(make())
    built = make()
    try:
        axes = trace(built.model, *built.args, **built.kwargs)
    finally:
        if place := left_behind(built.model):
            raise RuntimeError(f"a tensor without numbers is left at {place}")
        if (gap := distance(run(built), expected)) > 0:
            raise RuntimeError(f"tracing changed the network: it answers something else, by {gap:.1e}")
    row["axes"] = len(axes.free())
    if not row["axes"]:
        reasons = Counter(axis.reason for axis in axes if axis.size > 1)
        row |= {"outcome": "nothing to cut", "refusal": "; ".join(reason for reason, _ in reasons.most_common(3))}
        return
    random = Random(name)
    for i in range(PLANS):
        plan, warm = random_plan(axes, random, marks), i % 2 == 1
        built = made(make, warm)
        try:
            apply(built.model, axes, plan)
        except PlanError as error:
            if "\n" in str(error) or FAULT in str(error):
                raise
            row |= {"refused": row.get("refused", 0) + 1, "refusal": str(error)}
            continue
        if place := left_behind(built.model):
            raise RuntimeError(f"a tensor without numbers is left at {place}")
        expected = reference(make, axes, plan, warm)
        row["largest"] = max(row["largest"], distance(run(built), expected))
        row["plans"] += 1
    if row["largest"] > BOUND:
        row["outcome"] = "wrong"
    elif not row["plans"]:
        row["outcome"] = "refused"


def networks(kinds: list[str]) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Name and examination of every network of some kinds."""
    if "own" in kinds:
        for i in range(VARIANTS):
            for family in FAMILIES:
                name = f"{family}#{i}"
                yield name, lambda name=name: examine(name, lambda: own(name))
    if "timm" in kinds or "peft" in kinds:
        from hostile_nets import packages

        yield from packages.networks(kinds, examine)


def show(found: list[Row]) -> None:
    """The outcomes by kind, and every refusal."""
    first = [row["network"].partition("/")[0] for row in found]
    kinds = [kind if kind in ("timm", "peft") else "own" for kind in first]
    for kind in ("own", "timm", "peft"):
        some = [row for row, k in zip(found, kinds, strict=True) if k == kind]
        counts = Counter(row["outcome"] for row in some)
        plans, largest = sum(row["plans"] for row in some), max((row["largest"] for row in some), default=0)
        print(f"{kind:5} {len(some):4} networks, {plans:5} plans: {dict(counts)}, largest difference {largest:.1e}")
    for row in found:
        if row["outcome"] in ("wrong", "raw error", "not covered"):
            print(f"{row['outcome']:12} {row['network']:42} {row['largest']:.1e} {row['refusal']}")


def main() -> None:
    """Examine what is not in the file yet."""
    args = arguments(__doc__, OUT, {"kinds*": ()}, only="")
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    every = [] if args.show else networks(args.kinds or ["own", "timm", "peft"])
    done = {row["network"] for row in rows(args.out)}
    left = [(name, examination) for name, examination in every if args.only in name and name not in done]
    started = time.monotonic()
    for i, (name, examination) in enumerate(left, 1):
        row = add(args.out, examination())
        eta = (time.monotonic() - started) / i * (len(left) - i) / 60
        outcome = f"{row['outcome']} {row['largest']:.1e} {row['refusal'][:140]}"
        print(f"{i}/{len(left)} {name}: {outcome} ({eta:.0f} min left)", flush=True)
    show(rows(args.out))


if __name__ == "__main__":
    main()
