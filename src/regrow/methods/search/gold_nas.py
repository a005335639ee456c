"""GOLD-NAS-like: operations alone are searched, and go a few at a time under a pressure that grows until enough do.

Bi et al., GOLD-NAS: Gradual, One-Level, Differentiable (arXiv 2007.03331). **Reconstructed** from notes on the authors'
code; neither that nor the paper was at hand. With a = σ(α) of an operation, and over
the N operations that flow into its node, α and weights learn from the same examples

    cross-entropy + λ Σ (1 + μ cost / mean cost) log(1 + N a / Σ a).

After each epoch all operations go whose share a / Σ a is at most ``low``, and of those whose share is at most ``high``
the ``each`` lowest. Where fewer went than that, λ grows, by steps that double; where twice as many did, it is halved.
One that is the last of its node, or of what reads an input of its cell, stays, and those decided together count as one.

Ours: operations go until the target is met and no further, and then nothing presses; ``each`` follows from how many
epochs there are; what is above the target at the end is left out by the size of α; rates are shares of the steps; and
the seven operations of our space are searched, not the authors' two.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.commits import least, update_controller
from regrow.allocation.gates import GateMasks
from regrow.candidates import candidates_in
from regrow.data.augment import shift_and_flip
from regrow.learner import Stand
from regrow.method import Measure
from regrow.methods.search.searcher import Searcher
from regrow.plan import Plan
from regrow.tasks import Examples

CITATION = "Bi et al., GOLD-NAS: Gradual, One-Level, Differentiable (arXiv 2007.03331); reconstructed"


@dataclass(frozen=True)
class Settings:
    """How operations go.

    Args:
        target: What the network may cost at the end.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        stages: The last part of the network; set by the run.
        warm: Epochs at the start in which weights alone learn.
        low: Every operation goes whose share of its node is at most this.
        high: None goes whose share is above this.
        each: Of those between, so many go after an epoch; the authors' is 4. 0: as many as would be all of them
            by the last epoch.
        price: μ, how much more the pressure is on an operation that costs more.
        lr: Of α: how far it could go in all epochs.
        clip: The network's gradients are clipped to this norm.
        augment: Whether pictures are moved and mirrored.
    """

    target: float = 0.0
    measure: str = "params"
    stages: tuple[int, ...] = ()
    warm: int = 2
    low: float = 0.01
    high: float = 0.05
    each: int = 0
    price: float = 1.0
    lr: float = 8.0
    clip: float = 5.0
    augment: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"low and high are shares of a node, low not above high; got {self.low:g} and {self.high:g}"
            )
        for name in ("warm", "each", "price", "lr"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more; got {getattr(self, name):g}")
        if self.clip <= 0:
            raise ValueError(f"clip is a norm above 0; got {self.clip:g}")
        Measure(self.measure)


def build(settings: Settings) -> "GoldNas":
    """The learner."""
    return GoldNas(settings=settings)


@dataclass
class GoldNas(Searcher):
    """See the module."""

    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        s = self.settings
        self.searched, self.ends, self.most, self.measure = ("operations",), s.stages[-1:], s.target, Measure(s.measure)
        self.learns, self.shrinks = False, True

    def check(self, at: Stand) -> None:
        """Besides, refuse a search in which nothing goes by its rules, or of a network with nothing to choose from.

        Raises:
            ValueError: If it is one; says how many epochs it needs, or what to mark.
        """
        if not candidates_in(at.model):
            raise ValueError("GOLD-NAS searches operations, and this network has no candidates: mark some")
        if at.epochs < (warm := self.settings.warm) + 2:
            raise ValueError(
                f"in {at.epochs} epochs nothing goes: the first {warm} are for weights alone, and what goes does after "
                f"each of the others but the last: take --epochs {warm + 2} or more, or a smaller warm"
            )
        super().check(at)

    def joint(self, at: Stand) -> bool:
        """Whether α learns in this epoch."""
        return at.epoch >= self.settings.warm

    def rates(self, at: Stand) -> tuple[float, float]:
        """How fast α learns; thresholds do not."""
        return self.settings.lr / max(1, (at.epochs - self.settings.warm) * at.steps), 0.0

    def begin(self, at: Stand) -> None:
        """Nothing presses."""
        super().begin(at)
        self.values |= {"lambda": 0.0, "step": 1e-5, "cap": 100.0}

    def masks(self, at: Stand, flat: Tensor | None = None, learning: bool = False) -> GateMasks:
        """What stands now: every operation until it goes (or α is below −13.8). No threshold is there to learn from."""
        found = super().masks(at, flat, learning)
        assert self.gates is not None
        alpha = self.tensors["alpha"].values
        share = (alpha if learning else alpha.detach()).sigmoid().index_select(0, self.gates.tied)
        self.now = replace(found, ops=found.ops.detach(), op_scale=2 * share * found.ops.detach())
        return self.now

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """Cross-entropy, and the pressure on operations."""
        inputs = shift_and_flip(batch.inputs) if self.settings.augment else batch.inputs
        loss = plain = F.cross_entropy(self.asked(at, inputs), batch.labels)
        if self.joint(at) and self.values["lambda"]:
            assert self.gates is not None and self.now is not None
            stands, share, many = self.gates.shares(self.now, self.tensors["alpha"].values)
            cost = self.gates.prices()[stands]
            weight = 1 + self.settings.price * cost / cost.mean().clamp_min(1e-12)
            pressed = self.values["lambda"] * (weight * torch.log1p(many * share)).sum()
            before = self.values["loss"]
            self.values["loss"] = [before[0] + float(plain.detach()), before[1] + float(pressed.detach())]
            loss = loss + pressed
        return loss

    def gate(self, at: Stand) -> None:
        """The network's own gradients are clipped."""
        nn.utils.clip_grad_norm_(at.parameters().values(), self.settings.clip)

    def mode(self, at: Stand) -> None:
        """A new epoch."""
        self.values["loss"] = [0.0, 0.0]
        at.model.train()

    def plan(self, at: Stand) -> Plan | None:
        """After each epoch in which α learned, but the last: what goes."""
        if self.gates is None:  # a run was taken up again
            self.settle(at)
        if at.epoch <= self.settings.warm:
            return None
        if self.size() <= self.most:
            self.values["lambda"] = 0.0
            return None
        assert self.gates is not None
        each = self.settings.each or -(-len(self.gates.tied.unique()) // (at.epochs - self.settings.warm - 1))
        left, many = self._left(each)
        self.values |= update_controller(self.values, many, few=each, many=2 * each, factor=2)
        return self.without(at, left)

    def _left(self, each: int) -> tuple[Tensor, int]:
        """Which operations stay, and how many decisions that took."""
        assert self.gates is not None and self.now is not None
        found, left, size = self.gates, self.now.ops.clone(), self.size()
        with torch.no_grad():
            stands, share, _ = found.shares(self.now, self.tensors["alpha"].values)
        prices, many, reachable = found.prices(), 0, least(found, self.cuts) <= self.most
        places = stands.nonzero()[:, 0].tolist()
        for own, i in sorted(zip(share.tolist(), places, strict=True)):
            low = own <= self.settings.low
            if size <= self.most or own > self.settings.high or not (low or each):
                break
            together = found.together(i)
            if found.tied[i] == i and all(bool(found.open(0, left)[j]) for j in together.nonzero()[:, 0]):
                less = left.masked_fill(together, 0.0)
                rest = replace(found, alive=found.alive & (less > 0))
                if reachable and least(rest, self.cuts) > self.most:  # the target will need it
                    continue
                size -= float(prices[together].sum())
                left = less
                each, many = each - (not low), many + 1
        return left, many
