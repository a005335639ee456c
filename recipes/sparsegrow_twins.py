"""Does growing make a network forget? Twins from one checkpoint, one left as it is, the others grown, each in its way.

    python recipes/sparsegrow_twins.py --fashion FOLDER --seeds 5
    python recipes/sparsegrow_twins.py --show

SparseGrow (reconstructed) learns tasks up to the epoch before which it would grow in task ``--at``. From there every
twin sees the same batches through the rest of that task and all of the next one. Forgetting through growth is the
accuracy on the tasks before that the twin that did not grow has more: what an instant test cannot show, since most of
these ways of growing change no output at first.

Branches and layers that are added inherit Kronecker factors: as inputs those of the layer behind or beside them, as
outputs those of the layer before or beside them; what is left has the mean. *Directed* branches add nothing at first
and read directions of data that earlier tasks did not use, as SparseGrow's new units do.
``--at`` is the task, from 0, in which twins part.
"""

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from harness import Row, add, arguments, difference, rows, spread, table
from torch import Tensor, nn
from torch.nn.functional import normalize

from regrow.core.axes import AxisGraph
from regrow.core.axes.axis import AxisTensor
from regrow.core.change import Fill
from regrow.core.objectives import class_loss
from regrow.core.plan import Plan
from regrow.core.sources import Batch
from regrow.core.tasks import Task
from regrow.data.streams import load_idx, permuted_tasks, rotated_tasks, sample_task
from regrow.methods.continual.sparsegrow import Settings, build
from regrow.methods.continual.sparsegrow.state import SparseGrowState
from regrow.nets.vision import small
from regrow.protection.factors import Factors, read_inputs
from regrow.protection.growth import project_rows, weigh_new_units
from regrow.protection.guards import input_moments
from regrow.surgery.new_units import Entries, fit_new_units, new_units, split_entries
from regrow.tracing import trace
from regrow.tracing.capture import in_eval_mode
from regrow.training.continual import TaskSchedule, learn
from regrow.training.fit import FitOptions
from regrow.training.learner import Boundary, Context, Event, Learner, Stream, make_mask
from regrow.training.state import TrainState, axis_tensors, with_axis_tensors

OUT = Path(__file__).parent / "results" / "sparsegrow_twins.jsonl"
WIDTH = 100
STREAMS, RATE = ("permuted", "rotated"), 0.05
DIRECTED = "lateral branches, directed"
BRANCH = 15
"""Units of a lateral branch: as many parameters as two layers that are 16 units wider."""

ONCE = 1.2
"""A cap under which a net is widened once."""


Variant = Callable[[Learner[SparseGrowState], Settings], Learner[SparseGrowState]]
"""(SparseGrow, its settings) → a learner that grows in another way."""


def unchanged(learner: Learner[SparseGrowState], settings: Settings) -> Learner[SparseGrowState]:
    """SparseGrow as it is."""
    return learner


def after_growth(learner: Learner[SparseGrowState], react: Callable[..., SparseGrowState]) -> Learner[SparseGrowState]:
    """The learner with another reaction to a plan that was applied: (state, context, boundary) → state."""

    def boundary(state: SparseGrowState, context: Context, now: Boundary) -> SparseGrowState:
        return (react if now.event == Event.PLAN_APPLIED else learner.boundary)(state, context, now)

    return replace(learner, boundary=boundary)


def read_at_once(learner: Learner[SparseGrowState], settings: Settings) -> Learner[SparseGrowState]:
    """New units are read at once, through random weights: widening without care."""

    def react(state: SparseGrowState, context: Context, now: Boundary) -> SparseGrowState:
        unread = split_entries(context.model, context.axes, new_units(context.model, context.axes, now.plan))[1]
        state = learner.boundary(state, context, now)
        for entries in unread:
            whole = context.parameters()[entries.name].detach()
            part = entries.of(whole)
            entries.set(context.model, torch.randn(part.shape, generator=context.generator(9)) * whole.std())
        return learner.boundary(state, context, Boundary(Event.RESUME))

    return after_growth(learner, react)


def net2wider(learner: Learner[SparseGrowState], settings: Settings) -> Learner[SparseGrowState]:
    """New units are copies of old ones, which share their outgoing weights: Net2Wider (Chen et al., 2016)."""

    def plan(state: SparseGrowState, context: Context) -> tuple[Plan | None, SparseGrowState]:
        found, state = learner.plan(state, context)
        many = {key: change.grow for key, change in found.changes.items()} if found else {}
        return Plan.growing(context.axes, many, Fill("split", seed=settings.seed)) if many else None, state

    def react(state: SparseGrowState, context: Context, now: Boundary) -> SparseGrowState:
        weigh_new_units(state.factors, context)
        return learner.boundary(state, context, Boundary(Event.RESUME))

    return replace(after_growth(learner, react), plan=plan)


def align_new_units(model: nn.Module, axes: AxisGraph, plan: Plan, batches: list[Batch]) -> None:
    """Turn the weights of new units such that the loss has a large gradient in their zero weights.

    With zero outgoing weights, G = ∂L/∂W_out depends on the incoming weights w of a new unit. A step of the power
    method turns w halfway to ∂‖G‖²/∂w, these directions made orthogonal to one another; it takes two ordinary backward
    passes, the second with W_out moved a little along G. New units also get the spread of the old ones.
    """
    drawn, zero = split_entries(model, axes, new_units(model, axes, plan))
    fit_new_units(model, axes, plan, batches)
    gradients = sum_gradients(model, zero, batches)
    for key in {entries.axis for entries in gradients}:
        steps = {entries: gradient for entries, gradient in gradients.items() if entries.axis == key}
        size = max(root_mean_square(model.get_parameter(entries.name)) for entries in steps)
        largest = max(map(root_mean_square, steps.values()))
        for entries, gradient in steps.items():
            entries.set(model, gradient * (1e-3 * (size or 1.0) / largest))
    directions = sum_gradients(model, drawn, batches)
    for entries in zero:
        entries.set(model, torch.zeros(()))
    for entries, direction in directions.items():
        now = entries.of(model.get_parameter(entries.name).detach()).movedim(entries.dim, 0)
        rows, old = (x.double().flatten(1) for x in (direction.movedim(entries.dim, 0), now))
        left, _, right = torch.linalg.svd(normalize(rows), full_matrices=False)
        turned = normalize(normalize(old) + normalize(left @ right)) * old.norm(dim=1, keepdim=True)
        turned = torch.where(rows.any(1, keepdim=True), turned, old)
        entries.set(model, turned.reshape(now.shape).movedim(0, entries.dim))
    for entries in zero:  # some new units of one axis are made by those of another
        entries.set(model, torch.zeros(()))
    fit_new_units(model, axes, plan, batches)


def root_mean_square(tensor: Tensor) -> float:
    """The root of the mean of squares."""
    return float(tensor.detach().double().square().mean().sqrt())


def sum_gradients(model: nn.Module, entries: list[Entries], batches: list[Batch]) -> dict[Entries, Tensor]:
    """The gradient of the cross entropy, summed over the batches, in entries of parameters."""
    parameters = {part.name: model.get_parameter(part.name) for part in entries}
    total: dict[Entries, Tensor] = {}
    for batch in batches:
        with in_eval_mode(model), torch.enable_grad():
            value = class_loss(batch.run(model), batch.labels)
            gradients = torch.autograd.grad(value, [*parameters.values()], materialize_grads=True)
        whole = dict(zip(parameters, gradients, strict=True))
        for part in entries:
            gradient = part.of(whole[part.name]).float()
            total[part] = total[part] + gradient if part in total else gradient
    return total


def gradmax(learner: Learner[SparseGrowState], settings: Settings) -> Learner[SparseGrowState]:
    """New units are turned to where the gradient of the loss is largest: GradMax (Evci et al., arXiv 2201.05125)."""

    def react(state: SparseGrowState, context: Context, now: Boundary) -> SparseGrowState:
        batches = [Batch((one.inputs,), labels=one.labels) for one in context.task.train.batches(256)]
        align_new_units(context.model, context.axes, now.plan, batches[:4])
        weigh_new_units(state.factors, context)
        return learner.boundary(state, context, Boundary(Event.RESUME))

    return after_growth(learner, react)


class Lateral(nn.Module):
    """A layer and a drawn branch beside it, added up."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.old = old
        self.branch = nn.Sequential(nn.Linear(old.in_features, BRANCH), nn.ReLU(), nn.Linear(BRANCH, old.out_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in]`` → ``[N, out]``."""
        return self.old(x) + self.branch(x)


def lateral(model: nn.Sequential) -> tuple[nn.Sequential, Callable[[str], str]]:
    """A branch beside both hidden layers."""
    found = nn.Sequential(
        *(Lateral(layer) if i in (1, 3) and isinstance(layer, nn.Linear) else layer for i, layer in enumerate(model))
    )
    return found, lambda name: name.replace("1.", "1.old.").replace("3.", "3.old.")


def deeper(identity: bool) -> Callable[[nn.Sequential], tuple[nn.Sequential, Callable[[str], str]]]:
    """One more hidden layer before the last: one that changes nothing, or a drawn one."""

    def grow(model: nn.Sequential) -> tuple[nn.Sequential, Callable[[str], str]]:
        new = nn.Linear(WIDTH, WIDTH)
        if identity:
            with torch.no_grad():
                new.weight.copy_(torch.eye(WIDTH))
                new.bias.zero_()
        *before, head = model
        return nn.Sequential(*before, new, nn.ReLU(), head), lambda name: name.replace("5.", "7.")

    return grow


WIDE: dict[str, tuple[Settings, Variant]] = {
    "not grown": (Settings(grow="never"), unchanged),
    "layer expansion, SparseGrow": (Settings(cap=ONCE), unchanged),
    "layer expansion, not silent": (Settings(directions="random", cap=ONCE), unchanged),
    "layer expansion, Net2Wider": (Settings(cap=ONCE), net2wider),
    "layer expansion, GradMax": (Settings(cap=ONCE), gradmax),
    "layer expansion, drawn and read at once": (Settings(directions="random", density=1.0, cap=ONCE), read_at_once),
}
OTHER: dict[str, Callable[[nn.Sequential], tuple[nn.Sequential, Callable[[str], str]]]] = {
    "lateral branches": lateral,
    DIRECTED: lateral,
    "in depth, identity at first": deeper(identity=True),
    "in depth, drawn": deeper(identity=False),
}


def reshaped(
    twin: str, model: nn.Module, state: TrainState[SparseGrowState], settings: Settings, tasks: list[Task]
) -> tuple[nn.Module, AxisGraph, TrainState[SparseGrowState]]:
    """A twin that has grown otherwise than in width; learner and optimizer remember by the new names."""
    assert isinstance(model, nn.Sequential)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model, renamed = OTHER[twin](model)
    axes = trace(model, tasks[0].train.inputs[:2])
    context = Context(model, axes, tasks[state.number], state.number)

    def moved(name: str) -> str:
        return " ".join(renamed(part) if "." in part else part for part in name.split(" "))

    tensors = {moved(name): one for name, one in axis_tensors(state.learner).items()}
    for name in context.parameters():
        tensors.setdefault(f"owned {name}", make_mask(context, name))
    for name in context.weights:
        zeros = torch.zeros(len(context.parameters()[name]))
        tensors.setdefault(f"threshold {name}", AxisTensor(zeros, axes.shapes[name][:1], settings.lr))
    inherit_factors(tensors, context, twin)
    moments = {moved(name): one for name, one in state.moments.items()}
    return model, axes, replace(state, learner=with_axis_tensors(state.learner, tensors), moments=moments)


def inherit_factors(tensors: dict[str, AxisTensor], context: Context, twin: str) -> None:
    """Give new layers the factors of their neighbours, and their present parameters as anchors, in place."""
    parents = {"5": ("7", "3")} if twin in ("in depth, identity at first", "in depth, drawn") else {}
    for layer in ("1", "3"):
        if twin in ("lateral branches", DIRECTED):
            parents |= {f"{layer}.branch.0": (f"{layer}.old", ""), f"{layer}.branch.2": ("", f"{layer}.old")}
    for name, (inputs, outputs) in parents.items():
        weight = context.parameters()[f"{name}.weight"]
        own, dims = {"inputs": weight.shape[1:] * 2, "bias": weight.shape[1:]}, context.axes.shapes[f"{name}.weight"]
        for part, shape in {**own, "outputs": weight.shape[:1] * 2}.items():
            parent = tensors.get(f"factors {outputs if part == 'outputs' else inputs}.weight {part}")
            values = torch.zeros(shape) if parent is None else parent.values.clone()
            axis = dims[0] if part == "outputs" else dims[1]
            tensors[f"factors {name}.weight {part}"] = AxisTensor(values, (axis,) * values.dim())
    factors = {key.removeprefix("factors "): one for key, one in tensors.items() if key.startswith("factors ")}
    if twin == DIRECTED:
        direct_branches(context, factors)
    for name, parameter in context.parameters().items():
        anchor = AxisTensor(parameter.detach().clone(), context.axes.shapes[name])
        tensors.setdefault(f"anchor {name}", anchor)
    weigh_new_units(factors, context, surrogate=True)


@torch.no_grad()
def direct_branches(context: Context, factors: Factors) -> None:
    """Make lateral branches add nothing at first and read (1 + s A)⁻¹ (x − x′), as spread as the layer beside them."""
    train, random = context.task.train, context.generator(Stream.CALIBRATION)
    examples = train.take(torch.randperm(len(train), generator=random)[:256])
    names = [name for name in context.parameters() if name.endswith("branch.0.weight")]
    for name, parameter in context.parameters().items():
        if "branch.2" in name:
            parameter.zero_()
    for name, inputs in read_inputs(context.model, examples, names).items():
        lateral = context.model.get_submodule(name.removesuffix(".branch.0.weight"))
        first, second = torch.randint(len(inputs), (2, BRANCH), generator=random)
        rows, moments = inputs[first] - inputs[second], input_moments(factors, name, context.number)
        rows = project_rows(moments, rows, torch.ones_like(rows, dtype=torch.bool), Settings().strength)
        own, old = (inputs[:, :-1] @ weight.T for weight in (rows[:, :-1], lateral.old.weight))
        rows *= (old.std(0).median() / own.std(0))[:, None]
        lateral.branch[0].weight.copy_(rows[:, :-1])
        lateral.branch[0].bias.copy_(rows[:, -1])


def twins(tasks: list[Task], at: int, seed: int, names: Collection[str] = (*WIDE, *OTHER)) -> list[dict[str, Any]]:
    """A row per twin of ``names``."""
    model, _ = small(f"mlp:{WIDTH}-{WIDTH}", tasks[0].train.inputs.shape[1:], 10, seed)
    axes, settings = trace(model, tasks[0].train.inputs[:2]), Settings(grow="never", seed=seed)
    schedule, held = TaskSchedule(seed=seed, lr=RATE), []
    late = schedule.epochs - max(1, round(settings.late_phase * schedule.epochs))

    class EnoughError(Exception):
        """Training is where it would grow."""

    def look(state: TrainState[SparseGrowState], context: Context) -> None:
        if (state.number, state.epoch) == (at, late):
            held.append((copy.deepcopy(context.model), context.axes, copy.deepcopy(state)))
            raise EnoughError

    tasks = tasks[: at + 2]
    with contextlib.suppress(EnoughError):
        learn(model, axes, tasks, build(settings), schedule, options=FitOptions(checkpoint=look))
    (start,) = held
    found = []
    for twin in names:
        own, axes, state = copy.deepcopy(start[0]), start[1], copy.deepcopy(start[2])
        settings, variant = WIDE.get(twin, (Settings(grow="never"), unchanged))
        if twin in OTHER:
            own, axes, state = reshaped(twin, own, state, settings, tasks)
        matrix = learn(own, axes, tasks, variant(build(settings), settings), schedule, state=state).state.rows
        row = {"twin": twin, "old_then": fmean(matrix[at][:at]), "old_later": fmean(matrix[at + 1][:at])}
        row |= {"task": matrix[at][at], "next": matrix[at + 1][at + 1]}
        found.append(row | {"parameters": sum(p.numel() for p in own.parameters())})
    return found


def main() -> None:
    """Run what is missing, or show what is there."""
    args = arguments(__doc__, OUT, fashion=Path, seeds=5, at=5)
    torch.set_num_threads(1)
    there = rows(args.out)
    if args.show:
        print("\n".join(shown(there)))
        return
    if args.fashion is None:
        raise SystemExit("--fashion FOLDER is needed: where the four files of Fashion-MNIST are")
    for seed in range(args.seeds):
        for kind in STREAMS:
            told = {"stream": kind, "lr": RATE, "seed": seed, "at": args.at}
            known = {row["twin"] for row in there if told.items() <= row.items()}
            if not (missing := [name for name in (*WIDE, *OTHER) if name not in known]):
                continue
            base = sample_task(load_idx(args.fashion, "fashion"), 5000, 2000, seed)
            tasks = permuted_tasks(base, 10, seed) if kind == "permuted" else rotated_tasks(base, 10)
            for row in twins(tasks, args.at, seed, missing):
                print(add(args.out, told | row), flush=True)


def shown(there: list[Row]) -> Iterator[str]:
    """The tables in Markdown: points of accuracy on the tasks before that the twin which did not grow has more."""
    names = ("twin", "lost on old tasks, end of the task", "lost, end of the next", "paired")
    names += ("accuracy, the task", "accuracy, the next", "parameters")
    for kind in STREAMS:
        own = [row for row in there if row["stream"] == kind]
        rest = {row["seed"]: row for row in own if row["twin"] == "not grown"}
        yield f"\n{kind}, {len(rest)} seeds\n"
        yield from table(names, lines(own, rest))


def lines(own: list[Row], rest: dict[int, Row]) -> Iterator[list[str]]:
    """A line per twin."""
    for twin in dict.fromkeys(row["twin"] for row in own):
        mine = [row for row in own if row["twin"] == twin]
        gaps = [[rest[row["seed"]][key] - row[key] for row in mine] for key in ("old_then", "old_later")]
        pairs = [(rest[row["seed"]]["old_later"], row["old_later"]) for row in mine]
        told = difference(pairs).partition(" ")[2] if twin != "not grown" else ""
        learned = [[row[key] for row in mine] for key in ("task", "next")]
        parameters = f"{fmean(row['parameters'] for row in mine):,.0f}"
        yield [twin, *map(spread, gaps), told.strip("()"), *map(spread, learned), parameters]


if __name__ == "__main__":
    main()
