"""Run a masked network and its cut copy as a whole, where they have no blocks that could be compared.

These are networks in which data decide which operations run, declared axes, and plans that drop branches.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Decision, Example
from regrow.core.plan import Plan, PlanError
from regrow.surgery.carry import carry_out
from regrow.surgery.eager import mask_units, replace_parameters
from regrow.surgery.runner import Answers, Runner, floats, loader, masking
from regrow.tracing.capture import capture, evaluating
from regrow.tracing.meta_copy import copy_model
from regrow.tracing.model_state import preserve_state
from regrow.tracing.precision import CastsToDouble, example_in_double, made_in_double
from regrow.tracing.readings import Readings, readings

Decisions = tuple[Decision, ...] | None


def run_whole_pair(
    model: nn.Module,
    axes: AxisGraph,
    plan: Plan,
    example: Example,
    double: bool,
    decisions: Decisions,
    carried: Callable[[nn.Module, AxisGraph, Plan], tuple[nn.Module, AxisGraph]] = carry_out,
) -> tuple[Answers, Answers, Decisions]:
    """Run the masked network and its cut copy; return the outputs of both, and their data-dependent decisions."""
    widened = _widened(model, axes) if double else shallow_copy(model)
    example = example_in_double(example) if double else example
    whole = mask_units(widened, axes, plan) if axes.declared else widened
    taken, masked, orders = decisions, [], []
    if axes.recorded == "not":
        masked = _run(whole, example, double, None)
    else:
        # With zeros in the weights of declared axes, the network needs a recording of its own.
        recorded = _recorded(whole, axes, example, double, decisions)
        declared = {slot.name for key in axes.declared if key in plan.changes for slot in axes[key].consumers()}
        means = {name: row for name, row in plan.means.items() if name not in declared}
        keep = {key: change.keep for key, change in plan.changes.items()}
        mask = masking(
            recorded.capture, recorded.reads, recorded.sizes, keep, means, recorded.compared, plan.drop.values()
        )
        runner = Runner(recorded.capture, recorded.given, loader(whole), double, mask)
        runner.run_until()
        taken, masked, orders = recorded.decisions, runner.answers, runner.orders
    cut, _ = carried(shallow_copy(widened), axes, plan)
    try:
        shrunk = _run(cut, example, double, taken, orders)
    except Exception as error:
        raise PlanError(f"the plan cannot be carried out: the network does not run: {error}") from error
    return masked, shrunk, taken


def _widened(model: nn.Module, axes: AxisGraph) -> nn.Module:
    """Return a copy in float64; norms that take the epsilon of their precision keep that of the model's precision."""
    wide = copy_model(model, lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    for fold in axes.folds:
        path, _, name = fold.epsilon.partition(":")
        if name and getattr(wide.get_submodule(path), name) is None:
            setattr(wide.get_submodule(path), name, fold.value)
    return wide


def shallow_copy(model: nn.Module) -> nn.Module:
    """Return a copy that shares the parameters' values: a cut makes new tensors and leaves the old ones unchanged."""
    return replace_parameters(model, {})


def _run(
    model: nn.Module, example: Example, double: bool, decisions: Decisions, orders: Iterable[Tensor] = ()
) -> Answers:
    outside = preserve_state(model, outside=True)
    with outside, made_in_double(double), CastsToDouble() if double else nullcontext():
        if decisions is not None:
            return [*capture(model, example, decisions, orders).values]
        with evaluating(model), torch.no_grad():
            return floats(model(*example.args, **example.kwargs))


def _recorded(model: nn.Module, axes: AxisGraph, example: Example, double: bool, decisions: Decisions) -> Readings:
    with made_in_double(double), CastsToDouble() if double and decisions is not None else nullcontext():
        return readings(model, axes, example, decisions)
