"""The law masked = shrunk, on demand, for any network and plan."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.fx.node import map_arg
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from regrow.axes import AxisGraph, Decision, Dim, Example, Product, Sum
from regrow.plan import Plan, PlanError
from regrow.surgery.apply import apply, check
from regrow.surgery.carry import carry_out
from regrow.surgery.eager import replaced, zeroed
from regrow.tracing.branches import Recorded, located
from regrow.tracing.capture import capture, evaluating
from regrow.tracing.effects import Effects
from regrow.tracing.hollow import copy_model
from regrow.tracing.model_state import preserve_state
from regrow.tracing.readings import Readings, readings
from regrow.tracing.record import ORDERS, outputs
from regrow.tracing.walk import op_name

RELATIVE_BOUND = 1e-9

Decisions = tuple[Decision, ...] | None


@dataclass(frozen=True)
class Verification:
    """How far the cut network is from the masked one.

    Args:
        ok: Whether the float64 difference is within its bound.
        max_abs_diff: The largest difference of an output, in float64.
        bound: What it may be: 1e-9 of the largest output.
        float32_diff: The largest difference in the network's own precision.
        rounding: The largest difference between the masked network in its own precision and in float64.
        argmax_flips: Positions whose largest output changes in the network's own precision.
        positions: How many positions there are.
    """

    ok: bool
    max_abs_diff: float
    bound: float
    float32_diff: float
    rounding: float
    argmax_flips: int
    positions: int


def verify(model: nn.Module, axes: AxisGraph, plan: Plan, example: Example | None = None) -> Verification:
    """Compare the network cut by a plan with the same network masked by it.

    Masked means: at every operation that sums over an axis its dropped units count as 0 (or as the plan's means), at
    every one that compares as −∞; a norm that is restated runs over the kept units; what a dropped branch gives counts
    as 0, or as its input where that goes through. The masked network is computed by running the recorded operations one
    by one, without surgery. For axes that were declared (:func:`regrow.declare`) it is the whole network with 0 in each
    weight that reads dropped units, run as it is.

    Where data decide what a network does (which boxes overlap), both networks are given the decisions of the uncut one,
    so that their answers are of one form; then what the decisions are taken on is held against each other too: the
    scores and boxes of all anchors, not only of those that were found. If these agree, so do the decisions. Likewise
    the cut network sorts in the order of the masked one: equal scores (of anchors on the padding) lie in any order.

    Args:
        model: The traced model; it is left as it is.
        axes: Its axes.
        plan: What to keep.
        example: Another input than the traced one (same shapes).

    Returns:
        The differences and whether the law holds.

    Raises:
        PlanError: If the plan does not fit the model, or the model does not run as planned.
    """
    plan.check(axes)
    example = example or axes.example
    none = None if axes.decisions is None else ()
    ((_, exact_masked, exact_shrunk, decisions),) = _both(
        _widened(model, axes), axes, [plan], _in_double(example), double=True, decisions=none
    )
    ((_, masked, shrunk, _),) = _both(_copied(model), axes, [plan], example, double=False, decisions=decisions)
    difference, scale = _largest(exact_masked, exact_shrunk), _scale(exact_masked)
    own, rounding = _largest(masked, shrunk), _largest(masked, exact_masked)
    if not difference <= RELATIVE_BOUND * scale:
        apply(_copied(model), axes, plan)  # a plan that is refused is no wrong cut
    rows = [(a, b) for a, b in _pairs(masked, shrunk) if a.dim() > 1 and a.shape == b.shape]
    return Verification(
        ok=difference <= RELATIVE_BOUND * scale,
        max_abs_diff=difference,
        bound=RELATIVE_BOUND * scale,
        float32_diff=own,
        rounding=rounding,
        argmax_flips=sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in rows),
        positions=sum(a[..., 0].numel() for a, _ in rows),
    )


def distances(
    model: nn.Module, axes: AxisGraph, plans: Iterable[Plan], example: Example | None = None
) -> Iterator[tuple[Plan, float]]:
    """Compare for many plans what :func:`verify` compares for one, in float64 alone: the network is recorded once.

    d = max |masked − shrunk| / max |masked|

    Args:
        model: The traced model; it is left as it is.
        axes: Its axes.
        plans: Any number of plans, each for the model as it is.
        example: Another input than the traced one (same shapes).

    Yields:
        Each plan with its d; the law holds where d is at most 1e-9.

    Raises:
        PlanError: If a plan does not fit the model; those before it have been compared.

    >>> from regrow.tracing import trace
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> axes = trace(net, torch.ones(1, 4))
    >>> [d < 1e-9 for _, d in distances(net, axes, [Plan.keeping(axes, {"0.weight:0": range(n)}) for n in (3, 5)])]
    [True, True]
    """
    exact = _in_double(example or axes.example)
    none = None if axes.decisions is None else ()
    for plan, masked, shrunk, _ in _both(_widened(model, axes), axes, plans, exact, double=True, decisions=none):
        distance = _largest(masked, shrunk) / (_scale(masked) or 1.0)
        if not distance <= RELATIVE_BOUND:
            apply(_copied(model), axes, plan)  # a plan that is refused is no wrong cut
        yield plan, distance


@contextmanager
def _made_in_double(double: bool) -> Iterator[None]:
    """Have tensors that a network makes without saying in which precision be of float64, like all its others."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if double else before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Double(TorchFunctionMode):
    """Has every cast to a shorter float go to float64 instead, so that a network's own casts do not hide a fault."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_longer, args), tree_map(_longer, kwargs or {})
        return _EXACT.get(func, func)(*args, **kwargs)


def _grouped_product(x: Tensor, weight: Tensor, *, offs: Tensor, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Torch's grouped product, which has no kernel for float64: rows up to each offset times that group's matrix."""
    ends = offs.tolist()
    parts = [x[start:end] @ w for start, end, w in zip([0, *ends], ends, weight, strict=False)]
    return torch.cat([*parts, x.new_zeros(len(x) - (ends[-1] if ends else 0), weight.shape[-1])])


_EXACT: Mapping[Any, Any] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    **dict.fromkeys(
        (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)), _grouped_product
    ),
}


def _longer(value: Any) -> Any:
    short = isinstance(value, torch.dtype) and value in (torch.float32, torch.float16, torch.bfloat16)
    return torch.float64 if short else value


def _widened(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """A copy in float64; norms that take the epsilon of their precision keep that of the model's."""
    wide = copy_model(model, lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def _copied(model: nn.Module) -> nn.Module:
    """A copy that shares the numbers: a cut makes new tensors and leaves the old ones alone."""
    return replaced(model, {})


def _in_double(example: Example) -> Example:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Example(tree_map(wide, example.args), tree_map(wide, dict(example.kwargs)))


def _run(
    model: nn.Module, example: Example, double: bool, decisions: Decisions, orders: Iterable[Tensor] = ()
) -> list[Tensor | None]:
    outside = preserve_state(model, outside=True)
    with outside, _made_in_double(double), _Double() if double else nullcontext():
        if decisions is not None:
            return [*capture(model, example, decisions, orders).values]
        with evaluating(model), torch.no_grad():
            return _floats(model(*example.args, **example.kwargs))


def _floats(value: Any) -> list[Tensor | None]:
    return [leaf for leaf in outputs(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _pairs(a: list[Tensor | None], b: list[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(a, b, strict=False)  # what gives another number of answers is told by their distance
    return [(x, y) for x, y in pairs if x is not None and y is not None and x.numel()]


def _largest(a: list[Tensor | None], b: list[Tensor | None]) -> float:
    if len(a) != len(b):
        return inf
    return max((_gap(x.double(), y.double()) for x, y in _pairs(a, b)), default=0.0)


def _gap(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return inf
    gap = (x - y).abs().masked_fill(x == y, 0.0)  # infinities are equal too
    return float(gap.masked_fill(gap.isnan(), inf).max())


def _scale(answer: list[Tensor | None]) -> float:
    finite = [x[x.isfinite()].abs() for x in answer if x is not None]
    return max((float(x.max()) for x in finite if x.numel()), default=0.0)


def _own(value: Any) -> Any:
    """What operations in place may change, copied; no forward pass changes parameters."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def _both(
    model: nn.Module, axes: AxisGraph, plans: Iterable[Plan], example: Example, double: bool, decisions: Decisions
) -> Iterator[tuple[Plan, list[Tensor | None], list[Tensor | None], Decisions]]:
    """Each plan with what the masked network answers, what the cut one does, and what data decided in both.

    One recording serves all plans.
    """
    recorded = None if axes.declared else _recorded(model, axes, example, double, decisions)
    for plan in plans:
        check(model, axes, plan)
        whole = zeroed(model, axes, plan) if axes.declared else model
        if axes.declared and axes.recorded != "not":  # what the zeros make of the rest is another recording
            recorded = _recorded(whole, axes, example, double, decisions)
        if recorded is None:
            taken, masked, orders = decisions, _run(whole, example, double, None), []
        else:
            runner = _masked(recorded, axes, plan, double)
            taken, masked, orders = recorded.decisions, runner.answers, runner.orders
        carried = apply if plan.drop or plan.back else carry_out
        cut, _ = carried(_copied(model), axes, plan)
        try:
            shrunk = _run(cut, example, double, taken, orders)
        except Exception as error:
            raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error
        yield plan, masked, shrunk, taken


def _recorded(model: nn.Module, axes: AxisGraph, example: Example, double: bool, decisions: Decisions) -> Readings:
    with _made_in_double(double), _Double() if double and decisions is not None else nullcontext():
        return readings(model, axes, example, decisions)


def _masked(recorded: Readings, axes: AxisGraph, plan: Plan, double: bool) -> "_Masked":
    """The recorded network after it has run with the dropped units of traced axes masked."""
    declared = {slot.name for key in axes.declared if key in plan.changes for slot in axes[key].consumers()}
    runner = _Masked(recorded, plan, double, {n: means for n, means in plan.means.items() if n not in declared})
    # Operations in place may change what they are given.
    inputs = [x.clone() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x for x in recorded.inputs]
    with torch.no_grad(), _made_in_double(double):
        runner.answers = [*_floats(runner.run(*inputs)), *runner.judged]
    return runner


class _Masked(Interpreter):
    """Runs the recorded operations with dropped units replaced wherever they are read."""

    def __init__(self, recorded: Readings, plan: Plan, double: bool, means: Mapping[str, Mapping[int, float]]) -> None:
        super().__init__(recorded.capture.module, garbage_collect_values=not plan.drop)
        self.keep = {key: change.keep for key, change in plan.changes.items()}
        self.sizes, self.means, self.double = recorded.sizes, means, double
        self.judged: list[Tensor | None] = []
        self.answers: list[Tensor | None] = []
        self.orders: list[Tensor] = []
        self.replaced = located(Recorded(Effects(recorded.capture)), plan.drop.values()) if plan.drop else {}
        self.judges: dict[Node, list[tuple[Node, bool]]] = {}
        for node, operand, dims in recorded.judged:
            whole = all(bool(kept_mask(dim, self.sizes, self.keep).all()) for dim in dims)
            self.judges.setdefault(node, []).append((operand, whole))
        self.reads: dict[Node, list] = {}
        for reading in recorded.readings:
            mask = kept_mask(reading.dim, self.sizes, self.keep)
            if not bool(mask.all()):
                self.reads.setdefault(reading.node, []).append((reading, mask))

    def run_node(self, n: Node) -> Any:
        if self.double and op_name(n).startswith("_assert"):
            return None  # it asserts the precision that was recorded
        for operand, whole in self.judges.get(n, []):
            self.judged.append(self.env[operand].clone() if whole else None)  # a cut makes the others another form
        reads = self.reads.get(n, [])
        if n in self.replaced:
            source = self.replaced[n]
            return torch.zeros_like(super().run_node(n)) if source is None else self.env[source].clone()
        restated = [(reading, mask) for reading, mask in reads if reading.fill is None]
        out = self._restated(n, *restated[0]) if restated else super().run_node(n)
        if n.target in ORDERS:
            self.orders.append(out if isinstance(out, Tensor) else out[1])
        return out

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        values = {one: self.env[one] for one in n.all_input_nodes}
        for reading, mask in self.reads.get(n, []):
            if reading.fill is not None:
                values[reading.operand] = self._replaced(values[reading.operand], reading, mask)
        args, kwargs = map_arg((n.args, n.kwargs), values.__getitem__)
        return (tree_map(_longer, args), tree_map(_longer, kwargs)) if self.double else (args, kwargs)

    def _replaced(self, value: Tensor, reading: Any, mask: Tensor) -> Tensor:
        shape = [1] * value.dim()
        shape[reading.axis] = -1
        fill = torch.full((len(mask),), reading.fill, dtype=value.dtype)
        for position, mean in self.means.get(reading.weight, {}).items():
            fill[position] = mean
        return torch.where(mask.view(shape).to(value.device), value, fill.view(shape).to(value.device))

    def _restated(self, n: Node, reading: Any, mask: Tensor) -> Any:
        """Run a norm over the kept units alone and put the result back among zeros."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, index = args[0], mask.nonzero().flatten()
        part = x.index_select(reading.axis, index)
        rest = [a.index_select(0, index) if isinstance(a, Tensor) and a.dim() == 1 else a for a in args[1:]]
        if isinstance(rest[0], list | tuple):
            rest[0] = [len(index)]
        else:
            rest[0] = int(kept_mask(reading.groups, self.sizes, self.keep).sum())
        out = n.target(part, *rest, **kwargs)  # type: ignore[operator]
        return torch.zeros_like(x, dtype=out.dtype).index_copy(reading.axis, index, out)


def kept_mask(dim: Dim, sizes: Mapping[str, int], keep: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Which entries of a dimension stay (bool), for the kept units of each axis."""
    match dim:
        case int():
            return torch.ones(dim, dtype=torch.bool)
        case str():
            mask = torch.zeros(sizes[dim], dtype=torch.bool)
            mask[list(keep.get(dim, range(sizes[dim])))] = True
            return mask
        case Product(parts):
            mask = torch.ones(1, dtype=torch.bool)
            for part in parts:
                mask = (mask[:, None] & kept_mask(part, sizes, keep)[None, :]).flatten()
            return mask
        case Sum(parts):
            return torch.cat([kept_mask(part, sizes, keep) for part in parts])
