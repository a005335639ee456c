"""What regrow can cut, widen and save of every network of torchvision and of the families of transformers.

    python benchmarks/coverage.py --jobs 2            # all; goes on where it stopped
    python benchmarks/coverage.py --only video --match mvit --again
    python benchmarks/coverage.py --show              # the tables, from the rows that are there

Per network one row in JSON: seconds to trace; axes, free and frozen; the share of parameters left when every free axis
is cut to its minimum, with more and more marks; masked = shrunk in float64 for the smallest plan and for random plans
over all free axes; widened = original in float64, evaluated and, where the network can be trained on the example, in
training; saved and loaded = cut, bit for bit; and each reason why axes are frozen, with the share of the parameters
that they lie in. After ``--seconds`` there are no more plans, and after twice that the process ends; it may hold
``--gigabytes``. ``--jobs`` run at a time, and ``--again`` measures what has a row, too.
"""

import copy
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch
from shared import Row, again, arguments, by_key, collect, peak, run, table, tell
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from nets import KINDS, Net, floats, gap, nets
from regrow.core.axes import AxisGraph, Mark, size_of
from regrow.core.plan import Plan, PlanError
from regrow.nets import Origin, replace_attention
from regrow.store import load, save
from regrow.surgery import apply
from regrow.surgery.verify import RELATIVE_BOUND, measure_distances
from regrow.tracing import TraceError, trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import laws

OUT = Path(__file__).parent / "results" / "coverage.jsonl"
MARKS = (Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED, Mark.RESTATED)


def measured(net: Net, plans: int, seconds: float) -> Iterator[Row]:
    """The row of a network as it becomes known."""
    start = time.perf_counter()
    torch.set_num_threads(1)
    row: Row = {"name": net.name, "kind": net.kind, "group": net.group}
    model, (args, kwargs) = replace_attention(net.build()) if net.kind != "transformers" else net.build(), net.example()
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "example": _shapes(args, kwargs)}
    begun = time.perf_counter()
    try:
        axes = trace(model, *args, **kwargs)
    except TraceError as error:
        yield row | {"traced": "", "trace_s": round(time.perf_counter() - begun, 2), "error": _line(error)}
        return
    row |= {"traced": getattr(axes, "recorded", "export"), "trace_s": round(time.perf_counter() - begun, 2)}
    row |= {"axes": len(axes), "free": len(axes.free()), "left": left(axes), "frozen": frozen(axes)}
    row |= {"unreached": len(axes.unreached), "notes": list(axes.notes)}
    yield row
    row |= smallest(model, axes)
    yield row
    row |= saved(model, axes, net)
    yield row
    row |= widened(model, axes)
    yield row
    generator = torch.Generator().manual_seed(0)
    drawn = (laws.random_plan(axes, generator) for _ in range(plans))
    for counts in compared(model, axes, drawn):
        row["random"] = {"of": plans, **counts}
        yield row | {"seconds": round(time.perf_counter() - start, 1), "peak_mib": peak()}
        if time.perf_counter() - start > seconds:
            break


def _shapes(args: Any, kwargs: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def left(axes: AxisGraph) -> dict[str, float]:
    """The share of parameters left when every free axis is cut to its minimum, marks added one by one."""
    total, shares = parameters(axes, axes.sizes()), {}
    for n in range(1, len(MARKS) + 1):
        plan = laws.smallest_plan(axes, MARKS[:n])
        shares[MARKS[n - 1].value] = round(parameters(axes, plan.sizes(axes)) / total, 4)
    return shares


def parameters(axes: AxisGraph, sizes: dict[str, int]) -> int:
    """How many parameters there are when axes have these sizes; tied ones count once."""
    untied = (name for name in axes.parameters if name not in axes.ties)
    return sum(prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in untied)


def frozen(axes: AxisGraph) -> list[dict[str, Any]]:
    """Every reason why axes are not cut: how many, one of them, and the share of parameters that they lie in."""
    sizes = axes.sizes()
    numbers = {name: prod(size_of(dim, sizes) for dim in axes.shapes[name]) for name in axes.parameters}
    total, reasons = parameters(axes, sizes), {}
    for axis in axes:
        if not axis.free:
            entry = reasons.setdefault(re.sub(r"\d+", "#", axis.reason), ([], set()))
            entry[0].append(axis.key)
            entry[1].update(axes.ties.get(slot.name, slot.name) for slot in axis.slots if slot.name in numbers)
    shares = {why: round(sum(map(numbers.get, names)) / total, 4) for why, (_, names) in reasons.items()}
    entries = [
        {"reason": why[:300], "axes": len(keys), "such_as": keys[0], "share": shares[why]}
        for why, (keys, _) in reasons.items()
    ]
    return sorted(entries, key=lambda entry: -entry["share"])


def compared(model: nn.Module, axes: AxisGraph, plans: Iterable[Plan]) -> Iterator[dict[str, Any]]:
    """Masked against shrunk, plan by plan: how many were compared, refused and wrong, and the worst distance."""
    result: dict[str, Any] = {"plans": 0, "wrong": 0, "worst": 0.0, "refused": 0, "refusals": []}
    plans = iter(plans)
    again = True
    while again:
        again = False
        try:
            for plan, distance in measure_distances(model, axes, plans):
                result["plans"] += 1
                result["worst"] = max(result["worst"], distance)
                if not distance <= RELATIVE_BOUND and distance <= 10 * (noise := sensitivity(model, axes, plan)):
                    result.setdefault("sensitive", []).append([distance, noise])
                elif not distance <= RELATIVE_BOUND:
                    result["wrong"] += 1
                    result.setdefault("first_wrong", {key: list(c.keep) for key, c in plan.changes.items()})
                yield result
        except PlanError as error:
            result["refused"] += 1
            result["refusals"] = list(dict.fromkeys([*result["refusals"], _line(error)]))[:3]
            again = True
            yield result


def sensitivity(model: nn.Module, axes: AxisGraph, plan: Plan) -> float:
    """How far the cut network's own answer moves, in float64, if each number of its input moves by its last bit.

    A deep network with drawn weights may amplify that beyond the bound; then the bound can decide nothing.
    """
    double = laws.in_double(apply(copy.deepcopy(model), axes, plan)[0])
    inputs = laws.in_double((axes.example.args, dict(axes.example.kwargs)))
    step = lambda x: x.nextafter(x * 2) if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    with torch.no_grad():
        exact, near = (floats(double(*args, **kwargs)) for args, kwargs in (inputs, tree_map(step, inputs)))
    return gap(near, exact)


def smallest(model: nn.Module, axes: AxisGraph) -> dict[str, Any]:
    """The network cut as far as it can be: runs, is the masked one, and is another function than the whole one."""
    result: dict[str, Any] = {}
    for marks in (MARKS, MARKS[:1]):
        plan = laws.smallest_plan(axes, marks)
        *_, result = compared(model, axes, [plan])
        if result.get("plans"):
            small, _ = apply(copy.deepcopy(model), axes, plan)
            wide, narrow = answers(model, axes), answers(small, axes)
            if [x.shape for x in wide] == [x.shape for x in narrow]:
                result["moved"] = gap(narrow, wide)
            result["parameters"] = sum(p.numel() for p in small.parameters())
            break
    return {"smallest": result | {"marks": "all" if marks is MARKS else "neutral"}}


def answers(model: nn.Module, axes: AxisGraph) -> list[Tensor]:
    """Every floating-point tensor that the network answers to the traced example."""
    with torch.no_grad():
        return floats(model.eval()(*axes.example.args, **axes.example.kwargs))


def saved(model: nn.Module, axes: AxisGraph, net: Net) -> dict[str, Any]:
    """Whether a cut network, written and read again, answers the same, bit for bit."""
    try:
        small, _ = apply(copy.deepcopy(model), axes, laws.random_plan(axes, torch.Generator().manual_seed(1)))
    except PlanError as error:
        return {"saved": f"not cut: {_line(error)}"}
    vision = Origin("torchvision", net.name, net.arguments, net.name) if net.kind != "transformers" else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            save(small, Path(folder) / "model", origin=vision)
            again = load(Path(folder) / "model")
        if experts := getattr(getattr(small, "config", None), "_experts_implementation", None):
            again.set_experts_implementation(experts)  # a choice of this process, not of the model
        same = zip(answers(small, axes), answers(again, axes), strict=True)
        return {"saved": "equal" if all(torch.equal(x, y) for x, y in same) else "differs"}
    except Exception as error:
        return {"saved": _line(error)}


def widened(model: nn.Module, axes: AxisGraph) -> dict[str, Any]:
    """All axes that can be widened, widened at once: distance from the original, evaluated and in training."""
    plan = laws.joint_growing_plan(axes, "zero_out")
    if not plan.changes:
        return {"widened": {"axes": 0}}
    *_, result = compared(model, axes, [plan])
    row = {
        "axes": len(plan.changes),
        "worst": result["worst"],
        "wrong": result["wrong"],
        "refusals": result["refusals"],
    }
    double = laws.in_double(model)
    for module in double.modules():
        for name, value in vars(module).items():
            if ("drop" in name and isinstance(value, float)) or name == "p":
                setattr(module, name, 0.0)
    try:
        both = []
        for net in (laws.shrunk(double, axes, plan)[0], double):
            torch.manual_seed(0)  # whole branches may be dropped by chance, in both nets the same ones
            both.append(laws.outputs(net.train(), axes))
        row["worst_in_training"] = laws.gap(*both)
        row["wrong"] += not row["worst_in_training"] <= RELATIVE_BOUND
    except Exception as error:  # a detector wants targets, a BatchNorm more than one value
        row["not_in_training"] = _line(error)
    return {"widened": row}


# --- tables ----------------------------------------------------------------------------------------------------------


GIVEN = ("it is a kernel's extent", "it is an output", "it is a dimension of the model's input", "it is a vocabulary")
"""Reasons that lie in the task and not in what can be cut."""


def page(rows: Mapping[str, Row]) -> str:
    """Totals, every network, and every miss with its reason."""
    parts = ["\n".join(table(TOTALS, totals([*rows.values()]))), *misses(rows.values())]
    for kind in KINDS:
        if rows_of_kind := [row for row in rows.values() if row.get("kind", row["key"].split("/")[0]) == kind]:
            parts.append("\n".join((f"### {kind}", "", *table(EACH, map(each, rows_of_kind)))))
    return "\n\n".join(parts)


TOTALS = (
    *("networks", "all", "traced", "least left, neutral", "every mark", "plans compared", "wrong", "refused"),
    *("widened", "wrong", "saved and loaded equal", "seconds to trace, median (most)"),
)


def totals(rows: list[Row]) -> Iterator[list[object]]:
    """One line per kind and one for all."""
    for kind in (*KINDS, ""):
        mine = [row for row in rows if kind in ("", row["key"].split("/")[0])]
        done = [row for row in mine if row.get("traced")]
        if not mine:
            continue
        plans = [row[what] for row in done for what in ("smallest", "random") if row.get(what)]
        seconds = [row["trace_s"] for row in done]
        yield [
            kind or "**all**",
            len(mine),
            len(done),
            *(_middle([row["left"][mark] for row in done]) for mark in ("neutral", "restated")),
            *(sum(plan.get(count, 0) for plan in plans) for count in ("plans", "wrong", "refused")),
            sum(bool(row.get("widened", {}).get("axes")) for row in done),
            sum(row.get("widened", {}).get("wrong", 0) for row in done),
            sum(row.get("saved") == "equal" for row in done),
            f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else "",
        ]


def _middle(shares: list[float]) -> str:
    return f"{median(shares):.1%} (worst {max(shares):.1%})" if shares else ""


EACH = (
    *("network", "traced", "s", "free / axes", "left: neutral", "+ competed", "+ folded", "+ restated"),
    *("plans", "wrong", "worst", "widened", "saved", "held most by, beside inputs, outputs, kernels"),
)


def each(row: Row) -> list[object]:
    """The line of a network."""
    name = row.get("name", row["key"].split("/")[-1])
    if not row.get("traced"):
        return [name, "no", row.get("trace_s", ""), *[""] * (len(EACH) - 4), short(row.get("error", ""))]
    plans = [row.get(what, {}) for what in ("smallest", "random")]
    wide, held = row.get("widened", {}), next((x for x in row["frozen"] if not x["reason"].startswith(GIVEN)), {})
    count, wrong, refused = (sum(plan.get(key, 0) for plan in plans) for key in ("plans", "wrong", "refused"))
    return [
        *(name, row["traced"], row["trace_s"], f"{row['free']} / {row['axes']}"),
        *(f"{row['left'][mark.value]:.1%}" for mark in MARKS),
        f"{count}" + (f" ({refused} refused)" if refused else ""),
        *(wrong, f"{max((plan.get('worst', 0.0) for plan in plans), default=0.0):.0e}"),
        f"{wide['axes']} axes, {wide['worst']:.0e}" if wide.get("axes") else "no axis",
        *(short(row.get("saved", "")), f"{held['share']:.0%}: {short(held['reason'])}" if held else ""),
    ]


def misses(rows: Iterable[Row]) -> list[str]:
    """What was not traced, was wrong, refused, or could not be saved, with the reason."""
    lines = []
    for row in rows:
        if row.get("error"):
            lines.append(f"* {row['key']}: {short(row['error'], 200)}")
        for what in ("smallest", "random"):
            result = row.get(what, {})
            for distance, noise in result.get("sensitive", ()):
                lines.append(
                    f"* {row['key']}: {what}: masked and shrunk differ by {distance:.1e}; the cut network's own answer "
                    f"moves by {noise:.1e} if its input moves by the last bit, so this decides nothing"
                )
            if result.get("wrong"):
                lines.append(f"* {row['key']}: **wrong**, {what}: {result['worst']:.1e}")
            lines += [f"* {row['key']}: {what} plan refused: {short(why, 200)}" for why in result.get("refusals", ())]
        if row.get("widened", {}).get("wrong"):
            lines.append(f"* {row['key']}: **wrong** when widened: {row['widened']}")
        if row.get("saved", "equal") != "equal":
            lines.append(f"* {row['key']}: not saved: {short(row['saved'], 200)}")
    return ["### Misses\n\n" + "\n".join(lines)] if lines else []


def short(text: str, most: int = 90) -> str:
    """A text in one line, cut to so many characters."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= most else text[: most - 1] + "…"


def main() -> None:
    """Measure what has no row yet, or show the tables."""
    limits = {"plans": 20, "seconds": 600.0, "gigabytes": 14.0, "jobs": 1, "again": False}
    args = arguments(__doc__, OUT, only="", match="", **limits)
    if args.show:
        print(page(by_key(args.out)))
        return
    chosen = {f"{net.kind}/{net.name}": net for net in nets(args.only, args.match)}
    if args.job:
        for row in measured(chosen[args.job], args.plans, args.seconds):
            tell(row)
        return

    def job(key: str) -> Row:
        command = again(key, "--plans", args.plans, "--seconds", args.seconds)
        return run(command, 2 * args.seconds, args.gigabytes)

    collect(chosen, job, args.out, args.jobs, args.again)


if __name__ == "__main__":
    main()
