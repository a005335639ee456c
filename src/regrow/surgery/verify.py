"""The law masked = shrunk, on demand, for any network and plan."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from regrow.axes import AxisGraph, Dim, Example, Product, Sum
from regrow.plan import Plan
from regrow.surgery.apply import apply
from regrow.tracing.capture import evaluating
from regrow.tracing.readings import Readings, readings
from regrow.tracing.walk import op_name

RELATIVE_BOUND = 1e-9


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
    every one that compares as −∞; a norm that is restated runs over the kept units. The masked network is computed by
    running the recorded operations one by one, without surgery.

    Args:
        model: The traced model; it is left as it is.
        axes: Its axes.
        plan: What to keep.
        example: Another input than the traced one (same shapes).

    Returns:
        The differences and whether the law holds.

    Raises:
        PlanError: If the plan does not fit the model.
    """
    plan.check(axes)
    example = example or axes.example
    ((_, exact_masked, exact_shrunk),) = _both(_widened(model, axes), axes, [plan], _in_double(example), double=True)
    ((_, masked, shrunk),) = _both(_copied(model), axes, [plan], example, double=False)
    difference, scale = _largest(exact_masked, exact_shrunk), _scale(exact_masked)
    own, rounding = _largest(masked, shrunk), _largest(masked, exact_masked)
    flips = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(masked, shrunk, strict=True) if a.dim() > 1)
    return Verification(
        ok=difference <= RELATIVE_BOUND * scale,
        max_abs_diff=difference,
        bound=RELATIVE_BOUND * scale,
        float32_diff=own,
        rounding=rounding,
        argmax_flips=flips,
        positions=sum(a[..., 0].numel() for a in masked if a.dim() > 1),
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
    for plan, masked, shrunk in _both(_widened(model, axes), axes, plans, exact, double=True):
        yield plan, _largest(masked, shrunk) / (_scale(masked) or 1.0)


class _Double(TorchFunctionMode):
    """Has every cast to a shorter float go to float64 instead, so that a network's own casts do not hide a fault."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_longer, args), tree_map(_longer, kwargs or {})
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        return func(*args, **kwargs)


def _longer(value: Any) -> Any:
    return torch.float64 if value in (torch.float32, torch.float16, torch.bfloat16) else value


def _widened(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """A copy in float64; norms that take the epsilon of their precision keep that of the model's."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach().double() if tensor.is_floating_point() else tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    wide = copy.deepcopy(model, memo)
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def _copied(model: nn.Module) -> nn.Module:
    """A copy that shares the numbers: a cut makes new tensors and leaves the old ones alone."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.detach()
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(model, memo)


def _in_double(example: Example) -> Example:
    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Example(tree_map(wide, example.args), tree_map(wide, dict(example.kwargs)))


def _run(model: nn.Module, example: Example, double: bool) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        if not double:
            return _outputs(model(*example.args, **example.kwargs))
        with _Double():
            return _outputs(model(*example.args, **example.kwargs))


def _outputs(value: Any) -> list[Tensor]:
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _largest(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return max((float((x.double() - y.double()).abs().max()) for x, y in pairs if x.numel()), default=0.0)


def _scale(answer: list[Tensor]) -> float:
    return max((float(x.abs().max()) for x in answer if x.numel()), default=0.0)


def _both(
    model: nn.Module, axes: AxisGraph, plans: Iterable[Plan], example: Example, double: bool
) -> Iterator[tuple[Plan, list[Tensor], list[Tensor]]]:
    """Each plan with what the masked network answers and what the cut one does; one recording serves all."""
    recorded = readings(model, axes, example)
    for plan in plans:
        plan.check(axes)
        with torch.no_grad():
            masked = _outputs(_Masked(recorded, plan, double).run(*recorded.inputs))
        yield plan, masked, _run(apply(_copied(model), axes, plan)[0], example, double)


class _Masked(Interpreter):
    """Runs the recorded operations with dropped units replaced wherever they are read."""

    def __init__(self, recorded: Readings, plan: Plan, double: bool) -> None:
        super().__init__(recorded.module)
        self.keep = {key: change.keep for key, change in plan.changes.items()}
        self.sizes, self.means, self.double = recorded.sizes, plan.means, double
        self.reads: dict[Node, list] = {}
        for reading in recorded.readings:
            mask = kept_mask(reading.dim, self.sizes, self.keep)
            if not bool(mask.all()):
                self.reads.setdefault(reading.node, []).append((reading, mask))

    def run_node(self, n: Node) -> Any:
        if self.double and op_name(n).startswith("_assert"):
            return None  # it asserts the precision that was recorded
        reads = self.reads.get(n, [])
        restated = [(reading, mask) for reading, mask in reads if reading.fill is None]
        if restated:
            return self._restated(n, *restated[0])
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple, dict]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        if self.double:
            args, kwargs = tree_map(_longer, args), tree_map(_longer, kwargs)
        for reading, mask in self.reads.get(n, []):
            if reading.fill is not None:
                place = list(n.args).index(reading.operand)
                args = (*args[:place], self._replaced(args[place], reading, mask), *args[place + 1 :])
        return args, kwargs

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
