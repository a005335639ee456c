"""SparseGrow: continual learning with a network that is widened late in a task.

Zhao, Saxena, Cao, Liu, Song: SparseGrow (arXiv 2408.10566). **Reconstructed**: the paper's body was not available. Its
abstracts name the parts (data-driven sparse layer expansion late in a task, initialised on data; sparse training by
learned thresholds; freezing by gradient gating); their form follows the public code of its predecessor AdaptCL
(arXiv 2207.11005) and of Dynamic Sparse Training. What neither settles is a setting, and its default is ours. The
strongest baseline is Kronecker-factored Laplace (Ritter et al., NeurIPS 2018): see docs/reproductions/sparsegrow.md.

A task, for weights W with thresholds t and the entries M that earlier tasks own:

1. train on  loss + α Σ exp(−t), with W ∘ [|W| ≥ t or M] in the place of W; every step passes the gate;
2. in the last ``late`` of its epochs widen every hidden axis that is short of what is free by ``width`` of its first
   size: newborn units read a ``density`` of their inputs, turned (among these) away from what old tasks fed their layer
   and scaled to the spread of the old units on the data at hand, with the sign with which they answer it; nothing reads
   them yet; their penalty is ``young`` times as much;
3. at its end set what is below its threshold to 0, own what is left, begin t anew.

The default gate ``kronecker`` multiplies a layer's step Δ by  (1 + s A ⊗ (B + d))⁻¹,  with A the second moments of its
inputs in earlier tasks and B those of the gradients of its outputs. It is the preconditioner of Natural Continual
Learning (Kao et al., NeurIPS 2021) with the Kronecker factors of Ritter et al., but without their pull to the
parameters of earlier tasks; the damping d is ours. No examples are stored, directions that old tasks did not read stay
free, and widening adds such directions. The other gates act on single entries; ``hard`` restores protected entries
after each step. Parameters that no gate covers, as scales and shifts of norms, are frozen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.growth import growth, hidden, makers
from regrow.allocation.thresholds import over, thresholded
from regrow.axes import Axis
from regrow.axis_tensor import AxisTensor
from regrow.data import reservoir
from regrow.learner import Learner, Stand, along, flags, norms_stay
from regrow.plan import Fill, Plan
from regrow.scoring import memory
from regrow.scoring.factors import Gate, joined, part
from regrow.sources import Batch
from regrow.surgery import fitted
from regrow.surgery.fill import newborn, sides, thinned
from regrow.tasks import Examples, among

CITATION = "Zhao et al., SparseGrow (arXiv 2408.10566); reconstructed; gate: Kao et al. (2021), Ritter et al. (2018)"


@dataclass(frozen=True)
class Settings:
    """What the abstracts leave open.

    Args:
        grow: ``always``: once in every task, wherever anything is no longer free; ``short``: where what is free runs
            short; ``never``: not.
        late: The last share of a task's epochs, at the start of which it grows.
        short: An axis grows if a smaller share of the weights that make it (``kronecker``: and read it) is free.
        width: How much it grows by, as a share of its first size.
        multiple: Numbers of newborn units are multiples of this.
        cap: How many times its first parameters the network may have.
        density: The share of their inputs that newborn units read at birth.
        fit: Whether newborn units are scaled to the spread of the old ones, on data.
        threshold: ``dst``: one per unit, learning from the loss; ``adaptcl``: one per layer, moved by the penalty
            alone; ``none``: nothing is left out.
        alpha: Strength of the penalty Σ exp(−t).
        young: How many times as strong it is for newborn units, where they have thresholds of their own.
        gate: ``kronecker``: a layer moves little in directions that old tasks read and used; ``hard``: owned entries
            do not move; ``block``: nor do free ones that old hidden units read; ``soft``: all move, less the more they
            mattered; ``none``.
        strength: Of the gate ``kronecker``.
        damping: How much a hidden unit counts under it that old tasks did not use, as a share of the mean: moved freely
            it would wake on what they read.
        loud: Behind a norm that rescales each group of units (GroupNorm) newborn ones are heard on old inputs, and what
            reads them counts under it: this share of the mean.
        samples: Examples of each task that it looks at.
        every: The gate works on what so many steps changed together, which costs a fraction of its time.
        silent: Under that gate, newborn units are turned away from what old tasks fed their layer.
        norms: Running statistics of BatchNorm in later tasks: ``update`` or ``freeze``.
        memory: How many examples of earlier tasks are kept and learned along; the paper's abstracts name none.
        relief: With a memory, where classes come one after the other, the gate is this much as strong and leaves the
            output layer alone: old classes must give way to new ones, and the memory says how far. 1: no relief.
        own: There, examples at hand are told apart among the classes of their task only (ER-ACE, arXiv 2104.05025).
        lr: Learning rate of the thresholds.
        seed: Of newborn units.
    """

    grow: str = "always"
    late: float = 0.3
    short: float = 0.3
    width: float = 0.125
    multiple: int = 8
    cap: float = 1.5
    density: float = 0.5
    fit: bool = True
    threshold: str = "dst"
    alpha: float = 1e-4
    young: float = 10.0
    gate: str = "kronecker"
    strength: float = 15.0
    damping: float = 0.1
    loud: float = 0.1
    samples: int = 2000
    every: int = 4
    silent: bool = True
    norms: str = "update"
    memory: int = 0
    relief: float = 0.01
    own: bool = True
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}; got {getattr(self, name)!r}")
        for name in ("late", "short", "width", "density", "relief"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1; got {getattr(self, name):g}")
        if self.cap < 1:
            raise ValueError(f"cap is a factor on the first parameters, at least 1; got {self.cap:g}")
        at_least = {"multiple": 1, "samples": 1, "every": 1, "memory": 0, "strength": 0, "damping": 0, "loud": 0}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}; got {getattr(self, name):g}")


_CHOICES = {
    "grow": ("short", "always", "never"),
    "threshold": ("dst", "adaptcl", "none"),
    "gate": ("kronecker", "hard", "block", "soft", "none"),
    "norms": ("update", "freeze"),
}


def build(settings: Settings) -> "SparseGrow":
    """The learner."""
    return SparseGrow(settings=settings)


@dataclass
class SparseGrow(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)
    still: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    """What does not move in this task: name of a parameter → (which entries, their values)."""
    gates: dict[str, Gate] = field(default_factory=dict, repr=False)
    """What moves little in some directions: name of a weight → its gate."""
    last: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Name of such a weight → the layer before the next step."""

    def begin(self, at: Stand) -> None:
        """Nothing is owned at first; later tasks begin with what may not move."""
        if at.number == 0:
            self.values["base"] = at.axes.sizes()
            for name in at.parameters():
                self.tensors[f"owned {name}"] = flags(at, name)
            for name in at.weights if self.settings.threshold != "none" else ():
                self.tensors[f"threshold {name}"] = self._fresh(at, name)
        self._settle(at)

    def _fresh(self, at: Stand, name: str) -> AxisTensor:
        units = at.axes.shapes[name][:1] if self.settings.threshold == "dst" else ()
        many = at.parameters()[name].shape[: len(units)]
        return AxisTensor(torch.zeros(many), units, self.settings.lr)

    def mode(self, at: Stand) -> None:
        """As usual; running statistics stay in later tasks where that is asked."""
        super().mode(at)
        if self.settings.norms == "freeze" and at.number:
            norms_stay(at.model)

    def standing(self, at: Stand) -> dict[str, Tensor]:
        """W ∘ [|W| ≥ t or owned] in the place of W."""
        parameters, found = at.parameters(), {}
        for name in at.weights if self.settings.threshold != "none" else ():
            weight, threshold, owned = parameters[name], self._threshold(name), self._owned(name)
            if self.settings.threshold == "dst":
                found[name] = thresholded(weight, threshold, owned)
            else:  # as in AdaptCL's code: what is left out is gone at once, and the loss does not move the threshold
                with torch.no_grad():
                    weight.mul_((over(weight, threshold) >= 0) | owned)
        return found

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """The loss + α Σ exp(−t), more for newborn units; and that on examples of the memory, if there is one."""
        own = at.own if self.settings.own and self._relieved(at) else None
        loss = F.cross_entropy(among(at.logits(batch.inputs), own), batch.labels)
        if size := self.settings.memory:
            if held := reservoir.recall(self, at, size, len(batch), "inputs", "labels"):
                loss = loss + F.cross_entropy(at.remembered(*held), held[1])
            if not at.epoch:
                reservoir.offer(self, at, size, inputs=batch.inputs, labels=batch.labels)
        for name in at.weights if self.settings.threshold != "none" else ():
            each = torch.exp(-self._threshold(name))
            if each.dim() and (old := self.tensors.get(f"old {name}")) is not None:
                each = each * torch.where(old.values, 1.0, self.settings.young)
            loss = loss + self.settings.alpha * each.sum()
        return loss

    def gate(self, at: Stand) -> None:
        """What is owned gets no gradient; what mattered gets less under a soft gate."""
        if self.settings.gate == "none" or not at.number:
            return
        parameters = at.parameters()
        for name, (held, _) in self.still.items():
            if (gradient := parameters[name].grad) is not None:
                gradient.masked_fill_(held, 0.0)
        for name, one in self.tensors.items():
            kind, _, name = name.partition(" ")
            if kind == "importance" and (gradient := parameters[name].grad) is not None:
                gradient.mul_(1 - one.values)

    def stepped(self, at: Stand) -> None:
        """Put back what momentum and decay moved of what is owned, or let through what the gate lets through."""
        parameters = at.parameters()
        self.values["steps"] = self.values.get("steps", 0) + 1
        if self.gates and self.values["steps"] % self.settings.every == 0:
            self._let_through(at)
        with torch.no_grad():
            for name, (held, value) in self.still.items():
                torch.where(held, value, parameters[name], out=parameters[name])

    def passed(self, at: Stand) -> None:
        """What has not been through the gate yet goes through it; thresholds and what they leave are noted."""
        self._let_through(at)
        for name in at.weights if self.settings.threshold != "none" else ():
            threshold = self._threshold(name).detach()
            kept = (over(at.parameters()[name].detach(), threshold) >= 0) | self._owned(name)
            told = {"threshold": float(threshold.mean()), "density": float(kept.double().mean())}
            self.values.setdefault("kept", {})[name] = {what: round(value, 6) for what, value in told.items()}

    def _let_through(self, at: Stand) -> None:
        parameters = at.parameters()
        for name, gate in self.gates.items():
            before = self.last[name]
            let = before + gate.through(joined(at.model, name) - before)
            with torch.no_grad():
                for which, value in part(at.model, name, let).items():
                    parameters[which].copy_(value)
            self.last[name] = joined(at.model, name)

    def plan(self, at: Stand) -> Plan | None:
        """At the start of the late phase: widen where free weights run short."""
        if not self.still and not self.gates:  # a run was taken up again
            self._settle(at)
        self._rescue(at)
        first = at.epochs - max(1, round(self.settings.late * at.epochs))
        if self.settings.grow == "never" or at.epoch != first:
            return None
        free = {axis: self._free(axis, at) for axis in hidden(at.axes)}
        limit = 1.0 if self.settings.grow == "always" else self.settings.short
        short = sorted((axis for axis in free if free[axis] < limit), key=lambda axis: free[axis])
        s = self.settings
        wanted = growth(at.axes, short, self.values["base"], share=s.width, multiple=s.multiple, cap=s.cap)
        if not wanted:
            return None
        for name in at.weights:
            units = at.axes.shapes[name][:1]
            many = at.parameters()[name].shape[0]
            self.tensors[f"old {name}"] = AxisTensor(torch.ones(many, dtype=torch.bool), units)
        return Plan.growing(at.axes, wanted, Fill("zero_out", seed=s.seed), origin={"method": "sparsegrow"})

    def grown(self, at: Stand, plan: Plan) -> None:
        """Thin newborn units out, turn them away from old tasks, and give them the spread of the old ones."""
        unread = sides(at.model, at.axes, newborn(at.model, at.axes, plan))[1]
        thinned(at.model, at.axes, plan, self.settings.density, at.drawn(2))
        memory.born(at, self.tensors, self.settings.loud)
        self._settle(at)
        if self.settings.silent:
            old = {name[4:]: one.values for name, one in self.tensors.items() if name.startswith("old ")}
            memory.turned(at, self.gates, old)
            for entries in unread:
                entries.set(at.model, torch.zeros_like(entries.of(at.parameters()[entries.name].detach())))
        if self.settings.fit:
            batches = [Batch((one.inputs,)) for one in at.task.train.batches(256, seed=at.drawn(3).initial_seed())][:4]
            with self._masked(at):
                fitted(at.model, at.axes, plan, batches)
        self._settle(at)

    def end(self, at: Stand) -> None:
        """Set what is below its threshold to 0, own the rest, begin thresholds anew."""
        parameters = at.parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                owned = self._owned(name)
                if f"threshold {name}" in self.tensors:
                    kept = (over(parameter, self._threshold(name)) >= 0) | owned
                    parameter.mul_(kept)
                    self._threshold(name).zero_()
                new = parameter != 0 if name in at.weights else torch.ones_like(owned)
                if at.classes is not None and name in at.head:
                    new[len(at.classes) :] = False  # rows of classes to come stay free
                    new[: len(at.classes)] &= at.classes.view(-1, *[1] * (new.dim() - 1))
                owned |= new
        if self.settings.gate == "soft":
            self._weigh(at)
        if self.settings.gate == "kronecker":
            memory.remember(at, self.tensors, self.settings.samples)
        self.tensors = {name: one for name, one in self.tensors.items() if not name.startswith("old ")}
        self.still.clear()
        self.gates.clear()

    def account(self, at: Stand) -> dict[str, dict[str, float]]:
        """Per weight the share that tasks own, and under the Kronecker gate what was open when the task began.

        Besides, its mean threshold and the share above it (or owned) at the end, before thresholds began anew.
        """
        owned = {name: round(float(self._owned(name).double().mean()), 4) for name in at.weights}
        return {"owned": owned, "free": dict(self.values.get("free", {})), "kept": dict(self.values.get("kept", {}))}

    def _weigh(self, at: Stand) -> None:
        """How much each entry mattered to the task: |tanh| of its standardised gradient, the most over all tasks."""
        sums = {name: torch.zeros_like(p) for name, p in at.parameters().items()}
        at.model.eval()
        for batch in at.task.train.batches(256):
            at.model.zero_grad(set_to_none=True)
            Learner.loss(self, at, batch).backward()
            for name, parameter in at.parameters().items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
        at.model.train()
        at.model.zero_grad(set_to_none=True)
        for name, total in sums.items():
            now = ((total - total.mean()) / total.std().clamp_min(1e-12)).tanh().abs() if total.numel() > 1 else total
            before = self.tensors.get(f"importance {name}")
            self.tensors[f"importance {name}"] = along(at, name, now if before is None else before.values.maximum(now))

    def _relieved(self, at: Stand) -> bool:
        """Whether a memory speaks for classes that came before."""
        return bool(self.settings.memory) and at.classes is not None

    def _settle(self, at: Stand) -> None:
        """Note what must not move in this task, and its value."""
        self.still.clear()
        self.gates.clear()
        if not at.number or self.settings.gate in ("none", "soft"):
            return
        relief = self.settings.relief if self._relieved(at) else 1.0
        alone = at.head if relief < 1 else ()
        if self.settings.gate == "kronecker":
            self.gates = memory.gates(
                at, self.tensors, self.settings.strength * relief, at.number, self.settings.damping
            )
            self.gates = {name: gate for name, gate in self.gates.items() if name not in alone}
            self.last = {name: joined(at.model, name) for name in self.gates}
            self.values["free"] = {name: round(gate.free, 4) for name, gate in self.gates.items()}
        gated = {which for name in self.gates for which in part(at.model, name, self.last[name])}
        for name, parameter in at.parameters().items():
            if name in gated or name in alone:
                continue
            held = self._owned(name)
            if self.settings.gate == "block" and name in at.weights and name not in at.head:
                held = held | held.flatten(1).any(1).view(-1, *[1] * (held.dim() - 1))
            if bool(held.any()):
                self.still[name] = held, parameter.detach().clone()

    def _rescue(self, at: Stand) -> None:
        """A layer of which next to nothing is left begins again at 0."""
        for name in at.weights if self.settings.threshold != "none" else ():
            kept = (over(at.parameters()[name].detach(), self._threshold(name)) >= 0) | self._owned(name)
            if float(kept.double().mean()) <= 0.01:
                with torch.no_grad():
                    self._threshold(name).zero_()

    def _free(self, axis: Axis, at: Stand) -> float:
        """The share of what an axis's weights could become that is open: to be moved, or else to be owned."""
        if self.settings.gate == "kronecker":
            near = [self.gates[slot.name].free for slot in axis.slots if slot.name in self.gates]
            return min(near, default=1.0)
        used = []
        for name in makers(axis, at.axes):
            weight, owned = at.parameters()[name].detach(), self._owned(name)
            above = over(weight, self._threshold(name)) >= 0 if self.settings.threshold != "none" else weight != 0
            used.append(((above & (weight != 0)) | owned).double().mean())
        return 1 - float(torch.stack(used).mean())

    @contextmanager
    def _masked(self, at: Stand) -> Iterator[None]:
        """Weights below their thresholds at 0 for a while."""
        held = {}
        with torch.no_grad():
            for name in at.weights if self.settings.threshold != "none" else ():
                weight = at.parameters()[name]
                kept = (over(weight, self._threshold(name)) >= 0) | self._owned(name)
                held[name] = kept, weight.clone()
                weight.mul_(kept)
        yield
        with torch.no_grad():
            for name, (kept, value) in held.items():
                weight = at.parameters()[name]
                torch.where(kept, weight, value, out=weight)

    def _owned(self, name: str) -> Tensor:
        return self.tensors[f"owned {name}"].values

    def _threshold(self, name: str) -> Tensor:
        return self.tensors[f"threshold {name}"].values
