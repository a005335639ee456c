"""New units under protection: where they point, how important they are to earlier tasks, and their anchor."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import GroupNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from regrow.allocation.widening import growable_axes, plan_growth
from regrow.core.axes import axes_in
from regrow.core.axes.axis import AxisTensor, size_of
from regrow.core.plan import Fill, Plan
from regrow.core.tasks import pack_batch
from regrow.protection.factors import (
    Factors,
    diagonal_of,
    layer_parameters,
    layers_of,
    read_inputs,
    read_surrogates,
)
from regrow.protection.guards import input_moments, side_by_side, write_rows
from regrow.surgery import fit_new_units
from regrow.surgery.layout import resize_axis_tensor
from regrow.surgery.new_units import new_units, split_entries
from regrow.training.learner import Boundary, Context, Stream

ORIGIN = {"method": "growth"}
SURROGATES = 2000  # inputs that are drawn in the place of those of earlier tasks
RIDGE = 1e-3  # of a least-squares map, relative to the mean square of its inputs
IMPORTANCE = 0.1  # of new units to earlier tasks, as a fraction of the mean, where their inputs' moments are estimated


@dataclass(frozen=True)
class Growth:
    """When layers are widened, by how much, and where new units point.

    Args:
        when: ``never``; ``start``: when a task begins, after the first; ``late``: for the last 30 % of its epochs.
        width: The number of new units of an axis, as a fraction of its initial size.
        multiple: Numbers of new units are multiples of this.
        cap: The largest allowed size of the network, as a multiple of its initial parameters.
        directions: As of :func:`direct_new_units`.
        strength: The strength at which new units are projected.
        seed: Seed of the new units' weights.
    """

    when: str
    width: float
    multiple: int
    cap: float
    directions: str
    strength: float
    seed: int

    def plan(self, context: Context, base: Mapping[str, int]) -> Plan | None:
        """Return the plan that widens all hidden axes if growth is due; ``base``: axis key → its initial size."""
        late = context.epochs - max(1, round(0.3 * context.epochs))
        due = {"start": 0, "late": late}.get(self.when, -1)
        if context.plans_applied or not context.number or context.epoch != due:
            return None
        axes = context.axes
        added = plan_growth(axes, growable_axes(axes), base, share=self.width, multiple=self.multiple, cap=self.cap)
        return Plan.growing(axes, added, Fill("zero_out", seed=self.seed), origin=ORIGIN) if added else None


NO_GROWTH = Growth("never", 0.0, 1, 1.0, "random", 0.0, 0)


def weigh_new_units(
    factors: Factors, context: Context, *, share: float = 0.1, importance: float = 1.0, surrogate: bool = False
) -> None:
    """Give new units an importance in the factors of earlier tasks, in place, so that guards protect their weights.

    As outputs of their layer (the diagonal of B) they get the mean of the others. Hidden units that were inactive in
    all earlier tasks get it too; network outputs do not: a class that no task has had is free. As inputs of the layers
    behind (A), they get moments that are estimated on surrogate inputs (:func:`~.factors.read_surrogates`), if there
    are any: then ``importance`` times the mean of B is enough. Else, behind a norm that rescales groups of units
    (GroupNorm), they get ``share`` of the mean: they are active there.
    """
    modules = dict(context.model.named_modules())
    norms = {path for path, module in modules.items() if isinstance(module, GroupNorm | _InstanceNorm)}
    rescaled = {
        axis.key for axis in context.axes.units() if any(slot.name.rpartition(".")[0] in norms for slot in axis.slots)
    }
    generator = context.generator(Stream.CALIBRATION)
    rows = read_surrogates(factors, context, SURROGATES, generator) if surrogate else {}
    for name in layers_of(factors):
        diagonal = diagonal_of(factors[f"{name} outputs"].values)
        new = diagonal == 0
        if name not in context.head:
            diagonal[new] = (importance if rows else 1.0) * (diagonal[~new].mean() if not bool(new.all()) else 1.0)
        if (bias := factors.get(f"{name} bias")) is None:
            continue
        count = bias.values.numel()
        inputs = factors[f"{name} inputs"].values.view(count, count)
        unread = inputs.diagonal() == 0
        if name in rows and bool(unread.any()):
            moments = input_moments(factors, name, context.number)
            estimate_moments(moments, rows[name], unread, context.number)
            inputs.copy_(moments[:-1, :-1])
            bias.values.view(-1).copy_(moments[:-1, -1])
        elif rescaled & set(axes_in(context.axes.shapes[name][1])) and not bool(unread.all()):
            inputs.diagonal()[unread] = share * inputs.diagonal()[~unread].mean()


def estimate_moments(moments: Tensor, rows: Tensor, new: Tensor, tasks: int) -> None:
    """Set A of new inputs of a layer, in place: as linear functions of the old ones, and the rest as on ``rows``.

    A_new,old = Cᵀ A_old and A_new = Cᵀ A_old C + tasks · E[r rᵀ], with C the least-squares map from the old inputs of
    ``rows``, ``[count, n + 1]``, to the new ones, and r what it leaves. ``moments``: A, ``[n + 1, n + 1]``, summed over
    ``tasks``; ``new``: ``[n]`` bool. Source: ours.
    """
    old, added = torch.cat([~new, new.new_ones(1)]).nonzero()[:, 0], new.nonzero()[:, 0]
    known, values = rows[:, old].double(), rows[:, added].double()
    products = known.T @ known
    products.diagonal().add_(RIDGE * products.diagonal().mean())
    linear = torch.linalg.solve(products, known.T @ values)
    left = values - known @ linear
    cross = moments[old[:, None], old].double() @ linear
    moments[old[:, None], added], moments[added[:, None], old] = cross.to(moments), cross.T.to(moments)
    moments[added[:, None], added] = (linear.T @ cross + tasks / len(rows) * left.T @ left).to(moments)


def direct_new_units(factors: Factors, context: Context, plan: Plan, directions: str, strength: float) -> None:
    """Point the input weights of new units of ``plan`` to where they disturb earlier tasks little, in place.

    ``random``: as they are; ``projected``: away from the inputs that earlier tasks gave their layer, (1 + s A)⁻¹ w with
    s = ``strength``; ``data``: the same from differences x − x′ of inputs in the present task. A unit keeps the inputs
    that it does not read, and its outgoing weights are 0.
    """
    if directions == "random":
        return
    incoming, outgoing = split_entries(context.model, context.axes, new_units(context.model, context.axes, plan))
    layers, own = set(layers_of(factors)), context.parameters()
    incoming = [entries for entries in incoming if entries.name in layers and entries.dim == 0]
    generator = context.generator(Stream.CALIBRATION)
    inputs = {}
    if directions == "data":
        train = context.task.train
        examples = train.take(torch.randperm(len(train), generator=generator)[:256])
        inputs = read_inputs(context.model, examples, [entries.name for entries in incoming])
    for entries in incoming:
        where, parameters = list(entries.where), [own[name] for name in layer_parameters(own, entries.name)]
        moments = input_moments(factors, entries.name, context.number if len(parameters) > 1 else 0)
        now = side_by_side(parameters)
        now = torch.cat([now, now.new_zeros(len(now), len(moments) - now.shape[1])], 1)  # a layer without a bias
        reads = now[where] != 0
        if entries.name in inputs:
            pairs = torch.randint(len(inputs[entries.name]), (2, len(where)), generator=generator).to(now.device)
            pairs[1] += pairs[0] == pairs[1]  # no input beside itself
            first, second = (inputs[entries.name][part % len(inputs[entries.name])] for part in pairs)
            change = (first - second) * reads
            now[where] = torch.where(change.any(1, keepdim=True), change, now[where])  # equal inputs have none
        now[where] = project_rows(moments, now[where], reads, strength)
        write_rows(parameters, now)
    for entries in outgoing:
        parameter = context.model.get_parameter(entries.name).detach()
        entries.set(context.model, torch.zeros_like(entries.of(parameter)))


def project_rows(moments: Tensor, rows: Tensor, reads: Tensor, strength: float) -> Tensor:
    """Return rows, ``[units, n + 1]``, projected away from inputs that earlier tasks used: (1 + s A)⁻¹ · row.

    A row has a unit's weights and its bias; ``moments`` is A, or its diagonal. The inverse is over the inputs that the
    unit reads, ``[units, n + 1]`` bool, and the bias; other entries are 0.
    """
    if moments.dim() == 1:
        return reads * rows / (1 + strength * moments)
    scaled, reads, result = (strength * moments).double(), reads.clone(), torch.zeros_like(rows)
    scaled.diagonal().add_(1)
    reads[:, -1] = True
    patterns, which = reads.unique(dim=0, return_inverse=True)
    for i, read in enumerate(patterns):
        own, columns = (which == i).nonzero(), read.nonzero()[:, 0]
        solved = torch.linalg.solve(scaled[columns][:, columns], rows[own, columns].double().T)
        result[own, columns] = solved.T.to(rows)
    return result


def fit_to_task(context: Context, plan: Plan) -> None:
    """Scale new units of ``plan`` to the spread of the old ones on examples of the present task, in place."""
    examples = context.task.train.batches(256, seed=context.generator(Stream.CALIBRATION).initial_seed())
    batches = [pack_batch(batch.inputs) for _, batch in zip(range(4), examples, strict=False)]
    fit_new_units(context.model, context.axes, plan, batches)


def extend_anchor(anchor: Mapping[str, AxisTensor], context: Context, boundary: Boundary) -> dict[str, AxisTensor]:
    """Return the anchor after a plan, with the present values of parameters where the plan added entries."""
    result = dict(anchor)
    for name, tensor in anchor.items():
        if boundary.plan is None or boundary.before is None:
            break
        axes = boundary.before.axes
        shape = [size_of(dim, axes.sizes()) for dim in tensor.dims]
        ones = torch.ones(shape, dtype=torch.bool, device=tensor.values.device)
        old: Tensor = resize_axis_tensor(AxisTensor(ones, tensor.dims), axes, boundary.plan).values
        now = context.model.get_parameter(name).detach()
        result[name] = replace(tensor, values=torch.where(old, tensor.values, now))
    return result
