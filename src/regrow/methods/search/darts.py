"""DARTS, first order: on each edge a softmax weighs the operations, and what weighs most at the end is kept.

Liu, Simonyan, Yang: DARTS, Differentiable Architecture Search (arXiv 1806.09055), with xi = 0, in our space, loop and
delivery. On an edge (the operations of one node that read the same source) operation i is scaled by

    exp α_i / (exp α_none + Σ exp α_j).

One half of the search's training part moves the weights, the other α, both in the same step; the validation part is
only watched. At the end each node keeps its two edges with the largest weight of an operation, and of each that
operation alone. If that costs more than the target, every axis then loses the same share of its filters; if less, it
stays as it is.

With ``edges`` each edge has a weight of its own beside it, softmax over β of the edges into its node, which scales its
operations and counts in the choice; with ``warm`` weights learn alone at first; with ``partial`` operations see and
change one channel of so many while they are weighed, and the rest goes by. These three are PC-DARTS (Xu et al., arXiv
1907.05737): ``partial=4``, ``edges=true``, ``warm=0.3`` and ``lr=2.9`` are its numbers. Channels are masked, not cut:
what is searched has the memory and the time of the whole, and what is kept has weights that did not learn.

Where we differ: every cell has an α of its own, unless ``shared``; there is no operation "none", only its logit;
BatchNorms are affine; and the rate of α is a share of the steps, equal to the authors' at their 50 epochs.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from regrow.allocation.edges import Edges, select_operations
from regrow.allocation.gates import GateMasks
from regrow.allocation.partial import partial_channels
from regrow.axis_tensor import AxisTensor
from regrow.candidates import candidates_in
from regrow.data.augment import shift_and_flip
from regrow.learner import Stand
from regrow.method import Measure
from regrow.methods.search.searcher import Searcher
from regrow.nets.cells import Cells
from regrow.plan import Plan
from regrow.surgery.parametrize import parametrize
from regrow.tasks import Examples

CITATION = (
    "Liu, Simonyan, Yang, DARTS: Differentiable Architecture Search (arXiv 1806.09055), first order; edges, warm, "
    "partial: Xu et al., PC-DARTS (arXiv 1907.05737)"
)


@dataclass(frozen=True)
class Settings:
    """How α is learned.

    Args:
        target: What the network may cost at the end.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        stages: The last part of the network; set by the run.
        shared: One α for all normal cells and one for all reducing ones, as the authors have it.
        lr: The rate of α times the number of steps; the authors' 3e-4 for 50 epochs of 391 steps is 5.9, and
            PC-DARTS's 6e-4 for 50 epochs of 98 steps 2.9.
        edges: Whether edges have weights of their own, β.
        warm: The share of the epochs, at the start, in which α and β do not learn; PC-DARTS's 15 of 50 are 0.3.
        partial: One channel of so many is worked on while operations are weighed; PC-DARTS's is 4. 1: all are.
        decay: Weight decay of α and β.
        clip: The network's gradients are clipped to this norm.
        augment: Whether pictures are moved and mirrored.
    """

    target: float = 0.0
    measure: str = "params"
    stages: tuple[int, ...] = ()
    shared: bool = False
    lr: float = 5.9
    edges: bool = False
    warm: float = 0.0
    partial: int = 1
    decay: float = 1e-3
    clip: float = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.warm < 1:
            raise ValueError(f"warm is a share of the epochs, from 0 to below 1; got {self.warm:g}")
        if self.partial < 1:
            raise ValueError(
                f"partial is a number of channels, at least 1, of which one is worked on; got {self.partial}"
            )
        Measure(self.measure)


def build(settings: Settings) -> "Darts":
    """The learner."""
    return Darts(settings=settings)


@dataclass
class Darts(Searcher):
    """See the module."""

    settings: Settings = field(default_factory=Settings)
    edges: Edges | None = field(default=None, repr=False)
    """Where operations lie."""
    held: Examples | None = field(default=None, repr=False)
    """What α learns from."""
    batches: list[Tensor] = field(default_factory=list, repr=False)
    """Which of them come together, the next ones first."""
    beside: list[RemovableHandle] = field(default_factory=list, repr=False)
    """What lets channels go by operations."""
    between: list[Tensor] = field(default_factory=list, repr=False)
    """The weights of the edges into each node, as they are in this pass."""

    def __post_init__(self) -> None:
        s = self.settings
        self.searched, self.ends, self.most, self.measure = ("filters",), s.stages[-1:], s.target, Measure(s.measure)

    @property
    def cuts(self) -> Collection[str]:
        """What goes in the end: operations that are not chosen, and then filters."""
        return ("operations", "filters")

    def rates(self, at: Stand) -> tuple[float, float]:
        """How fast α learns; thresholds do not."""
        return self.settings.lr / (at.epochs * at.steps or 1), 0.0

    def examples(self, at: Stand) -> Examples:
        """The half that weights learn from; the other is held out for α."""
        train = at.task.train
        n = len(train)
        order = torch.randperm(n, generator=at.drawn(12))
        own, self.held = (Examples(train.inputs[i], train.labels[i]) for i in order.split([n - n // 2, n // 2]))
        return own

    def begin(self, at: Stand) -> None:
        """All operations of an edge weigh about the same."""
        self.values["discrete"] = False
        super().begin(at)
        assert self.edges is not None
        many = self.edges.entries
        drawn = 1e-3 * torch.randn(many, generator=at.drawn(11))
        self.tensors["alpha"] = AxisTensor(drawn, (many,), self.rates(at)[0])
        if self.settings.edges:
            many = self.edges.betas
            drawn = 1e-3 * torch.randn(many, generator=at.drawn(14))
            self.tensors["beta"] = AxisTensor(drawn, (many,), self.rates(at)[0])

    def settle(self, at: Stand) -> None:
        """Where operations and filters lie now.

        Raises:
            ValueError: If there is nothing to choose from, or cells are needed and there are none.
        """
        if (self.settings.shared or self.settings.partial > 1) and not isinstance(at.model, Cells):
            raise ValueError("shared and partial are for networks of cells; this is none")
        names = at.model.alike() if self.settings.shared and isinstance(at.model, Cells) else {}
        self.edges = self.edges or Edges.of(at.model, names)
        if self.settings.partial > 1 and not self.values["discrete"] and not self.beside:
            self.beside = partial_channels(at.model, self.settings.partial, lambda: self.between)
        super().settle(at)

    def share(self) -> Tensor:
        """The weight of each operation, its edge's included, ``[operations]``."""
        assert self.edges is not None
        beta = self.tensors.get("beta")
        return self.edges.share(self.tensors["alpha"].values, None if beta is None else beta.values)

    def scales(self, at: Stand) -> dict[str, Tensor]:
        """What stands in for the scales of each node."""
        assert self.gates is not None
        sums = candidates_in(at.model)
        share = self.share() * self.gates.alive
        assert self.edges is not None
        beta = self.tensors["beta"].values if self.settings.edges else None
        edges = share.new_ones(len(self.edges.node)) if beta is None else self.edges.between(beta)
        self.between = [edges[self.edges.node == node] for node in range(len(sums))]
        parts = share.split([*map(len, sums.values())])
        return {f"{path}.scale".lstrip("."): part for path, part in zip(sums, parts, strict=True)}

    def standing(self, at: Stand) -> dict[str, Tensor]:
        """The scales, from which α learns nothing: this is the weights' half."""
        return self.answering(at, at.number)

    def answering(self, at: Stand, number: int) -> dict[str, Tensor]:
        """The same when it is evaluated."""
        with torch.no_grad():
            return self.scales(at)

    # A step.

    def mode(self, at: Stand) -> None:
        """A new epoch: what is held out comes in a new order, and lasts as long as the rest."""
        at.model.train()
        assert self.held is not None
        order = torch.randperm(len(self.held), generator=at.drawn(at.epoch, 13))
        self.batches = [*order.split(max(2, -(-len(order) // at.steps)))]
        if len(self.batches[-1]) == 1 < len(order):
            self.batches.pop()  # a BatchNorm cannot train on it

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """Cross-entropy."""
        inputs = shift_and_flip(batch.inputs) if self.settings.augment else batch.inputs
        return F.cross_entropy(self.asked(at, inputs), batch.labels)

    def gate(self, at: Stand) -> None:
        """The network's own gradients are clipped; α and β get theirs, of the half that is held out, and they stay."""
        nn.utils.clip_grad_norm_(at.parameters().values(), self.settings.clip)
        if at.epoch < self.settings.warm * at.epochs:
            return
        learned = [self.tensors[name].values for name in ("alpha", "beta") if name in self.tensors]
        buffers = [*at.model.buffers()]
        before = [one.clone() for one in buffers]
        assert self.held is not None
        part = self.batches.pop(0)
        self.batches.append(part)
        batch = Examples(self.held.inputs[part], self.held.labels[part])
        with parametrize(at.model, self.scales(at)):
            pulls = torch.autograd.grad(self.loss(at, batch), learned)
        for one, value in zip(buffers, before, strict=True):  # running statistics are the weights' half's alone
            one.copy_(value)
        for one, pull in zip(learned, pulls, strict=True):
            one.grad = pull + self.settings.decay * one.detach()

    # What is kept.

    def plan(self, at: Stand) -> Plan | None:
        """Nothing goes before the end."""
        if self.gates is None:  # a run was taken up again
            self.settle(at)
        return None

    def choice(self) -> Tensor:
        """The operations that would be kept now, ``[operations]`` bool."""
        assert self.edges is not None and self.gates is not None
        return select_operations(self.share().detach(), self.edges.edge, self.gates.node)

    def masks(self, at: Stand, flat: Tensor | None = None, learning: bool = False) -> GateMasks:
        """What stands now: every operation until the end."""
        self.now = found = super().masks(at, flat, learning)
        if self.values["discrete"]:
            self.now = found = replace(found, ops=found.ops * self.choice())
        return found

    def allowed(self, at: Stand) -> float:
        """What a commit may leave: nothing but what is chosen, and then the target."""
        return self.most if "left" in self.values else 0.0

    def kept(self) -> dict[str, float]:
        """The share of each level that stands, and of skips among what would be kept: near 1 a search collapsed."""
        assert self.gates is not None
        own = [path for path, here in zip(self.gates.ops, self.choice(), strict=True) if here]
        skips = sum(path.rpartition(".")[2].startswith("skip") for path in own)
        return super().kept() | {"skips": skips / max(1, len(own))}

    def final(self, at: Stand) -> Plan | None:
        """First all operations go that are not chosen; then filters, as far as the target asks for it.

        Raises:
            ValueError: If the target is below what can be reached.
        """
        if self.gates is None:  # a run was taken up again
            self.settle(at)
        if not self.values["discrete"]:
            self.values["discrete"] = True
            for handle in self.beside:
                handle.remove()
            plan = self.commit(at)
            self.values["left"] = self.size()
            if plan:
                return plan
        self.evenly()
        return super().final(at)

    def account(self, at: Stand) -> dict[str, Any]:
        """What the chosen operations cost with all their filters, and whether that is below the target already."""
        left = self.values.get("left")
        told = {} if left is None else {"discretised": left, "below": left <= self.most}
        return super().account(at) | told
