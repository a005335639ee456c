"""Search by trials: every granularity proposes equal savings, each proposal is tried, and held-out loss decides (ours).

The first epochs train all weights. Before each of the others, the network loses its share of what is too large: every
searched granularity proposes what it can spare, in the order of

    saliency / saved cost,   saliency = E[(∂ loss / ∂ g)²] g² / 2,

the Fisher information of the scale g of an operation's output, of a filter where it is read, or of a weight itself.
Labels are drawn from the network's predictions, so gradients of examples are independent, and those of a few examples
together estimate that of one. Each proposal is trained for ``trial_steps`` as a mask, and its loss is measured on
validation examples; the coarsest proposal within one standard error of the best, paired, is cut. The weights are those
before the trials again. After the last cut the network is at its target; filters that were cut return where there is
room.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from regrow.allocation.gates import GateMasks
from regrow.allocation.levels import check_levels
from regrow.allocation.proposals import Saliency, choose_proposal, propose_removals
from regrow.core.amounts import Measure
from regrow.core.candidates import candidate_paths, exclusive_sets
from regrow.core.objectives import CLASSIFICATION
from regrow.core.sources import logits_in
from regrow.core.tasks import Examples, run_network
from regrow.methods.search import Commit, Search, commit
from regrow.methods.search.space import SearchSpace, SearchState, scale_operations
from regrow.scoring.gradients import evaluation_mode
from regrow.settings.constraints import Fraction, OneOf, Positive, Range, check_constraints
from regrow.surgery.gate import parametrize
from regrow.training.learner import Context, Replacements, Step, Stream, task_loss

CITATION = "ours; saliency after Theis et al. (arXiv 1801.05787)"
EXAMPLES = 512  # the most training examples from which saliency is estimated
PART = 8  # examples whose gradients are taken together, and whose losses are averaged


@dataclass(frozen=True)
class Settings:
    """Settings of the search by trials.

    Args:
        target: The largest allowed size of the found network, in units of ``measure``.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        levels: The granularities that make proposals; ``weights`` only with ``measure=nonzero``.
        stages: The last part of the network that is used; set by the run.
        warm: The fraction of the epochs that train weights alone, before the first cut.
        trial_steps: The number of training steps of each proposal; 0: it is judged as it is.
        decide: Which proposal is cut: the ``coarsest`` within one standard error of the lowest loss, the ``lowest``, or
            one at ``random``, without trials.
        clip: The largest norm of the gradient of the network's own parameters; larger ones are scaled down to it.
        augment: Whether images are shifted and mirrored at random.
        seed: Seed of everything random.
    """

    target: float = 0.0
    measure: str = "params"
    levels: tuple[str, ...] = ("operations", "filters")
    stages: tuple[int, ...] = ()
    warm: Fraction = 0.5
    trial_steps: Annotated[int, Range(0)] = 11
    decide: Annotated[str, OneOf("coarsest", "lowest", "random")] = "coarsest"
    clip: Positive = 5.0
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_constraints(self)
        check_levels(self.levels, Measure(self.measure))


class Trials(Search):
    """The search by trials: proposals of equal savings, short training of each, and a decision by held-out loss."""

    restores = True
    learns_masks = False

    def __init__(self, s: Settings) -> None:
        super().__init__(s, SearchSpace(s.target, Measure(s.measure), s.levels, s.stages[-1:]))
        self.s = s
        self.mask_bytes = 56 if "weights" in s.levels else 24  # with the weights and moments outside of a trial

    def check_epochs(self, epochs: int) -> None:
        """Raise ValueError if no epoch is left to train in after the last cut."""
        if epochs <= round(self.s.warm * epochs):
            raise ValueError(
                f"{epochs} epochs leave none after the first {self.s.warm:.0%}, which train weights alone, so nothing "
                "could be cut; use more --epochs, or a smaller --set warm"
            )

    def allowed_size(self, state: SearchState, context: Context, target: float) -> float:
        """Return 0: what a proposal masks is removed, whatever the size."""
        return 0.0

    def goal(self, state: SearchState, context: Context) -> float:
        """Return the size after the next cut: from the initial size to the target, log-linearly over the cuts."""
        first = round(self.s.warm * context.epochs)
        progress = (context.epoch - first + 1) / (context.epochs - first)
        return float(state.start * (self.s.target / state.start) ** progress)

    def plan(self, state: SearchState, context: Context) -> Commit:
        """Hook ``plan``: once the first epochs are over, the proposal that the trials decide for."""
        if context.epoch == context.epochs:
            return self.finalize(state, context, self.s.target)
        if context.epoch < round(self.s.warm * context.epochs):
            return None, state
        is_last = context.epoch == context.epochs - 1
        if state.turn > context.epoch:  # the cut before this epoch is done
            return commit.plan_refill(self, state, context, self.s.target) if is_last else (None, state)
        if not state.start:
            if exclusive_sets(context.model):
                state = self._rank(state, measure_saliency(self, state, context))
                plan, state = commit.plan_single_choice(self, state, context)
                if plan:
                    return plan, state
            state = replace(state, start=self.size(state, context))
        state = replace(state, turn=context.epoch + 1)
        goal, size = self.goal(state, context), self.size(state, context)
        if size > goal:
            return self._cut(state, context, goal)
        return commit.plan_refill(self, state, context, goal) if is_last else (None, state)

    def _cut(self, state: SearchState, context: Context, goal: float) -> Commit:
        """Return the plan of the proposal that is decided for, and the new state."""
        saliency, masks = measure_saliency(self, state, context), self.masks(state, context)
        layout, searched, least = state.layout, self.s.levels, min(goal, commit.FULL * self.s.target)
        proposals = propose_removals(layout, masks, saliency, searched, goal, least)
        if not proposals:
            return None, state
        chosen, losses = next(iter(proposals)), dict[str, Tensor]()
        if self.s.decide == "random":
            draw = torch.randint(len(proposals), (1,), generator=context.generator(context.epoch, Stream.RESET))
            chosen = [*proposals][int(draw)]
        elif len(proposals) > 1:
            with self.around_trial(state, context):
                losses = {name: try_masks(self, state, context, mask) for name, mask in proposals.items()}
            chosen = choose_proposal(losses)
            if self.s.decide == "lowest":
                chosen = min(losses, key=lambda name: float(losses[name].mean()))
        sizes = {name: float(layout.levels.size(m.ops, m.filters, m.weights)) for name, m in proposals.items()}
        means = {name: float(values.mean()) for name, values in losses.items()}
        context.log("trial", epoch=context.epoch, chosen=chosen, goal=goal, sizes=sizes, losses=means)
        plan, state = commit.plan_masked_cut(self, state, context, proposals[chosen], self.s.target)
        return plan and replace(plan, origin={**plan.origin, "stood": True}), state  # what goes was not masked before

    def _rank(self, state: SearchState, saliency: Saliency) -> SearchState:
        """Return the state with α in the order of operations' saliency."""
        ranks = saliency.operations.argsort().argsort().to(state.alpha.values)
        return replace(state, alpha=replace(state.alpha, values=torch.logit((ranks + 0.5) / max(1, len(ranks)))))

    def finalize(self, state: SearchState, context: Context, target: float) -> Commit:
        """Return the plan that removes what exceeds the target, if a cut could not, or restores what fits into it."""
        if self.size(state, context) <= target:
            return commit.plan_refill(self, state, context, target)
        return commit.plan_fit(self, state, context, target)


build = Trials


def mask_parameters(context: Context, state: SearchState, masks: GateMasks) -> Replacements:
    """Return the parameters under masks."""
    parameters, levels = context.parameters(), state.layout.levels
    flat = None if masks.over is None and not levels.entrywise else levels.flat(parameters)
    values = levels.replace_weights(parameters, flat, masks.filter_scale, masks.over)
    return Replacements(scale_operations(context, state, values, masks.op_scale), masks)


def measure_saliency(search: Trials, state: SearchState, context: Context) -> Saliency:
    """Return the saliency of all units: the mean of g² (∂ loss / ∂ g)² / 2 over examples, g being a unit's scale."""
    s, layout = search.s, state.layout
    levels, nodes = layout.levels, candidate_paths(context.model)
    parameters = context.parameters()
    scales = [f"{path}.scale".lstrip(".") for path in nodes]
    blocks = [[name for name in block.scales if name in parameters] for block in layout.blocks.values()]
    with torch.no_grad():
        values = {name: value.detach() for name, value in search.parametrize(state, context).values.items()}
    names = dict.fromkeys((*levels.weights, *scales, *(name for part in blocks for name in part)))
    learned = {name: values.get(name, parameters[name].detach()).requires_grad_() for name in names}
    device = context.device
    ops = torch.zeros(len(layout.ops), device=device)
    filters = torch.zeros(levels.filters + 1, device=device)
    weights = torch.zeros(levels.entries, device=device) if "weights" in s.levels else None
    generator = context.generator(context.epoch, Stream.GRADIENT_EXAMPLES)
    examples = next(context.task.train.batches(EXAMPLES, seed=generator.initial_seed()))
    for indices in torch.arange(len(examples)).split(PART):
        batch = examples.take(indices).to(device)
        with evaluation_mode(context.model), parametrize(context.model, {**values, **learned}):
            loss = len(indices) * _sampled_loss(context, batch, generator)
            found = torch.autograd.grad(loss, [*learned.values()], allow_unused=True, materialize_grads=True)
        products = {name: g * v.detach() for (name, v), g in zip(learned.items(), found, strict=True)}
        if len(ops):
            none = ops.new_zeros(1)
            of_blocks = [sum((products[name].sum() for name in part), none) for part in blocks]
            gates = torch.cat([*(products[name] for name in scales), *of_blocks])
            ops += torch.zeros_like(ops).index_add(0, layout.tied, gates)[layout.tied].square()
        filters += _sum_by_filter(state, products).square()
        if weights is not None:
            weights += levels.flat(products).square()
    n = 2 * len(examples)
    return Saliency(ops / n, filters[:-1] / n, None if weights is None else weights / n)


def _sum_by_filter(state: SearchState, products: dict[str, Tensor]) -> Tensor:
    """Return the sum of ``products`` over the entries that read each filter, ``[filters + 1]``; the last reads none."""
    levels = state.layout.levels
    total = next(iter(products.values())).new_zeros(levels.filters + 1)
    for name, tensor in zip(levels.weights, levels.maskable_layouts, strict=True):
        if tensor.reads:
            dim, line = tensor.reads
            others = [d for d in range(len(tensor.shape)) if d != dim]
            total.index_add_(0, line, products[name].sum(others) if others else products[name])
    return total


def _sampled_loss(context: Context, batch: Examples, generator: torch.Generator) -> Tensor:
    """Return the mean loss of a batch, of classes with labels that are drawn from the network's predictions."""
    if context.objective is CLASSIFICATION:
        logits = context.logits(batch.inputs)
        if logits.dim() == 2:
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            return torch.nn.functional.cross_entropy(logits, drawn.to(logits.device))
    return task_loss(None, context, Step(0, batch)).value


@contextmanager
def _unchanged(context: Context) -> Iterator[None]:
    """Context manager after which parameters, buffers, gradients, modes and the random state are as before."""
    tensors = [*context.model.parameters(), *context.model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    modes = [(module, module.training) for module in context.model.modules()]
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
                    tensor.grad = None
            for module, mode in modes:
                module.training = mode


def try_masks(search: Trials, state: SearchState, context: Context, masks: GateMasks) -> Tensor:
    """Train the network under masks for a few steps, and return its validation losses, a mean per part, ``[parts]``.

    The network is as before afterwards.
    """
    with _unchanged(context):
        torch.manual_seed(context.generator(context.epoch, Stream.STEPS).initial_seed() % 2**63)
        if search.s.trial_steps:
            _train(search, state, context, masks)
        context.model.eval()
        losses, size = list[Tensor](), PART * max(1, _step_size(context) // PART)
        with torch.no_grad(), parametrize(context.model, mask_parameters(context, state, masks).values):
            for batch in context.task.test.batches(size):
                output = run_network(context.model, batch.inputs, context.device)
                labels = batch.labels.to(context.device)
                if context.objective is CLASSIFICATION:
                    pairs = zip(logits_in(output).split(PART), labels.split(PART), strict=True)
                    losses += [context.objective.loss(one, own).double().cpu() for one, own in pairs]
                else:  # whose outputs may be of any form
                    losses.append(context.objective.loss(output, labels).double().cpu())
    return torch.stack(losses)


def _step_size(context: Context) -> int:
    """Return the number of examples per training step."""
    return -(-len(context.task.train) // context.steps)  # rounded up


def _train(search: Trials, state: SearchState, context: Context, masks: GateMasks) -> None:
    """Take the steps of a trial, with an optimizer of its own."""
    assert context.make_optimizer is not None  # plans before the last epoch are made while training
    parameters = [p for p in context.model.parameters() if p.requires_grad]
    optimizer = context.make_optimizer([{"params": parameters}])
    taken, turn = 0, 0
    context.model.train()
    while taken < search.s.trial_steps:
        seed = context.generator(context.epoch, Stream.TRIALS, turn).initial_seed()
        turn += 1
        for batch in context.task.train.batches(_step_size(context), seed=seed):
            if taken == search.s.trial_steps:
                break
            taken += 1
            optimizer.zero_grad(set_to_none=True)
            with parametrize(context.model, mask_parameters(context, state, masks).values):
                search.compute_loss(context, batch.to(context.device)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, search.s.clip)
            optimizer.step()
