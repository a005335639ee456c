"""MGAS (MG-DARTS): operations, filters and weights of one network searched together, in the memory there is.

Liu, Saxena, Cao, Zhao, Ruan: MGAS / MG-DARTS (arXiv 2310.15074). **Reconstructed**: from the abstract and the authors'
public code (lxy12357/MG_DARTS), whose faults are not followed. The abstract names the parts: a learned discretisation
per level, stages over growing prefixes, re-evaluation that prunes and regrows. What neither settles is a setting with a
default of ours. A search of operations alone (``levels=operations``) is as good: see docs/reproductions/mgas.md.

With a = σ(α) of an operation, b = σ(κ) of a filter, r = |w| / mean |w| of a weight, and thresholds t of each level,

    operation · 2a [a ≥ t],   what reads a filter · 2b [b ≥ t],   w · [r ≥ t]      ([·] with DST's surrogate)

stand in the place of the network's own numbers while all of it, thresholds included, learns

    cross-entropy + μ ((size + lifted) / allowed − 1) + λ (Σ log(1 + N a / Σ a) + Σ exp(−t));

size counts what the masks leave, and less and less is allowed until the target. Under ``dual`` μ follows the
excess (ours), lifted is what operations that stand lack of ``floor`` (ours), and λ stays, without its second sum, since
μ raises thresholds; nodes that end with one operation anyway are in neither. Under ``feedback`` μ is 0 and λ follows
the authors' controller; under ``ratios`` each level is told its share (a control). Filters are those of an axis, so
what is masked can always be cut.

Every other epoch what is masked is cut out of the network. A stage runs the network up to one of its classifiers; when
the next one begins, thresholds start anew and a share of the operations dropped since comes back, by the authors' draw.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.commits import threshold_for, update_controller
from regrow.allocation.gates import GateMasks
from regrow.allocation.levels import check_levels
from regrow.allocation.regrowth import sample_operations
from regrow.axis_tensor import AxisTensor
from regrow.data.augment import shift_and_flip
from regrow.learner import Stand
from regrow.method import Measure
from regrow.methods.search.searcher import LEVELS, THRESHOLDS, Searcher
from regrow.plan import Plan
from regrow.tasks import Examples

CITATION = "Liu et al., MG-DARTS / MGAS (arXiv 2310.15074); reconstructed from abstract and authors' code"


@dataclass(frozen=True)
class Settings:
    """What is searched, to which size, and how.

    Args:
        target: What the network may cost at the end.
        measure: ``params``, ``nonzero``, ``macs``, ``bytes`` or ``ms``.
        levels: Which levels are searched; weights under ``nonzero`` alone, as no other measure spares those that are 0.
        stages: The last part of the network that each stage runs, ascending, the whole last; none: one stage.
        share: What a stage but the last leaves of what it found.
        warm: Epochs at the start of a stage in which weights alone learn.
        every: A commit comes every so many epochs of the rest.
        controller: ``dual``, ``feedback`` or ``ratios``.
        ratios: Under ``ratios``: the share of each level that stays, in the order of ``levels``.
        gain: How fast μ follows the excess: where it would be after the joint epochs of a stage at an excess of 1.
        press: Under ``dual``, λ: it leaves fewer operations per node.
        floor: Under ``dual``, what an operation counts at least in what μ presses on, as a share of what those of its
            node that hold more than a scale cost in the mean (ours). Idle where time counts: a pool takes some.
        reprune: Whether a stage prunes further what earlier stages kept; if not, still the weights that lie in none of
            their operations, and what is above the target at the very end.
        regrow: The share of a stage's dropped operations that comes back.
        regrow_filters: The share of its cut filters that comes back, by the size of the gradient of their scale.
        regrow_weights: The share of its weights set to 0 that is let back, by the size of their gradient.
        revive: ``old``: operations come back with what they held; ``fresh``: drawn anew, as the authors do.
        lr: Of α and κ: how far they could go in the joint epochs of a stage.
        lr_threshold: Of thresholds: how far they could go.
        pace: Under ``dual``, by what that is multiplied for filters, where a node may keep several operations (ours):
            below 1, operations give up more, and what is left of them is wider.
        clip: Most norm of the gradient of the network's own parameters.
        augment: Whether pictures are moved and mirrored.
        seed: Of everything drawn.
    """

    target: float = 0.0
    measure: str = "nonzero"
    levels: tuple[str, ...] = LEVELS
    stages: tuple[int, ...] = ()
    share: float = 0.5
    warm: int = 2
    every: int = 2
    controller: str = "dual"
    ratios: tuple[float, ...] = ()
    gain: float = 40.0
    press: float = 0.05
    floor: float = 1.0
    reprune: bool = True
    regrow: float = 0.2
    regrow_filters: float = 0.0
    regrow_weights: float = 0.0
    revive: str = "fresh"
    lr: float = 8.0
    lr_threshold: float = 2.0
    pace: float = 0.25
    clip: float = 5.0
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.levels or not set(self.levels) <= set(LEVELS):
            raise ValueError(f"levels are some of {', '.join(LEVELS)}; got {', '.join(self.levels) or 'none'}")
        if self.controller not in ("dual", "feedback", "ratios"):
            raise ValueError(f"controller is dual, feedback or ratios; got {self.controller!r}")
        if self.controller == "ratios" and len(self.ratios) != len(self.levels):
            raise ValueError(f"ratios has one share per level, {len(self.levels)}; got {len(self.ratios)}")
        if self.controller == "ratios" and not self.reprune:
            raise ValueError("under ratios each level is told its share of everything, so reprune=false means nothing")
        if self.every < 1 or self.warm < 0:
            raise ValueError(f"every is at least 1 and warm at least 0; got every={self.every}, warm={self.warm}")
        for name in ("share", "regrow", "regrow_filters", "regrow_weights"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1; got {getattr(self, name):g}")
        for name in ("gain", "press", "floor", "lr", "lr_threshold", "pace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is 0 or more; got {getattr(self, name):g}")
        for name, off in (("press", 0), ("floor", 0), ("pace", 1)):
            if self.controller != "dual" and getattr(self, name) not in (off, getattr(Settings, name)):
                raise ValueError(f"{name} is of controller=dual; under {self.controller} it means nothing")
        if self.clip <= 0:
            raise ValueError(f"clip is a norm above 0; got {self.clip:g}")
        if self.revive not in ("old", "fresh"):
            raise ValueError(f"revive is old or fresh; got {self.revive!r}")
        if list(self.stages) != sorted({*self.stages}):
            raise ValueError(f"stages end at parts in ascending order; got {self.stages}")
        check_levels(self.levels, Measure(self.measure))


def build(settings: Settings) -> "Mgas":
    """The learner."""
    return Mgas(settings=settings)


@dataclass
class Mgas(Searcher):
    """See the module."""

    settings: Settings = field(default_factory=Settings)
    thins: bool = True
    """Whether nodes are pressed towards few operations."""
    over: float = 0.0
    """By what share the part that runs is too large in this step."""
    seen: int = 0
    """Examples of this epoch so far."""
    earlier: tuple[int, Tensor, Tensor] | None = field(default=None, repr=False)
    """A stage, and the operations and axes of the stages before it."""

    def __post_init__(self) -> None:
        s = self.settings
        self.searched, self.ends, self.most, self.measure = s.levels, s.stages, s.target, Measure(s.measure)
        self.learns, self.shrinks = s.controller != "ratios", True
        self.thins = s.controller == "dual" and "operations" in s.levels
        self.spares_bare = not (self.thins and s.floor)

    # Stages.

    def span(self, epochs: int, stage: int) -> tuple[int, int]:
        """The first epoch of a stage, and of the next."""
        n = max(1, len(self.settings.stages))
        return round(stage * epochs / n), round((stage + 1) * epochs / n)

    def check(self, at: Stand) -> None:
        """Besides, refuse a stage in which masks would not learn: the target would be met by trimming alone.

        Raises:
            ValueError: If there is one; says how many epochs all stages need.
        """
        n = max(1, len(self.ends))
        if n == 1 and not self.settings.reprune:
            raise ValueError("reprune=false is of a search in several stages, and this one has one: take --stages 2")
        spans = [self.span(at.epochs, stage) for stage in range(n)]
        if any(end - first <= self.settings.warm for first, end in spans):
            raise ValueError(
                f"{at.epochs} epochs leave a stage of {n} no epoch to learn masks in, since the first "
                f"{self.settings.warm} of each stage train weights alone; use --epochs "
                f"{n * (self.settings.warm + 1)} or more, fewer --stages, or a smaller --set warm"
            )
        super().check(at)

    def joint(self, at: Stand) -> bool:
        """Whether masks learn in this epoch."""
        return at.epoch >= self.span(at.epochs, self.values["stage"])[0] + self.settings.warm

    def paced(self, at: Stand) -> int:
        """The steps of a stage in which masks learn: rates are shares of them, so a short search is no other one."""
        return max(1, (at.epochs // max(1, len(self.ends)) - self.settings.warm) * at.steps)

    def rates(self, at: Stand) -> tuple[float, float]:
        """How fast α and κ learn, and thresholds."""
        return self.settings.lr / self.paced(at), self.settings.lr_threshold / self.paced(at)

    def progress(self, at: Stand) -> float:
        """How much of a stage's cutting is to be done by now, from 0 to 1; the last fifth of its epochs is rest."""
        first, end = self.span(at.epochs, self.values["stage"])
        learning = max(1, end - first - self.settings.warm)
        done = at.epoch - first - self.settings.warm + self.seen / len(at.task.train)
        return min(1.0, max(0.0, done / (0.8 * learning)))

    def allowed(self, at: Stand) -> float:
        """What the part that runs may cost now: evenly in logarithms from what it did to the stage's goal."""
        if self.settings.controller == "ratios" and at.epoch < at.epochs:
            return 0.0  # what each level is told goes, whatever that leaves
        if self.settings.controller == "feedback":
            return float(self.values["goal"])  # it knows no schedule
        return float(self.values["start"] * (self.values["goal"] / self.values["start"]) ** self.progress(at))

    def begin(self, at: Stand) -> None:
        """Everything is kept."""
        super().begin(at)
        self.earlier = None
        assert self.gates is not None
        if self.thins and not bool(self.gates.single.all()):
            self.tensors[THRESHOLDS["filters"]].lr = self.settings.pace * self.rates(at)[1]
        self.tensors["drift"] = AxisTensor(torch.zeros_like(self.tensors["alpha"].values), self.tensors["alpha"].dims)
        self._start(at, 0)

    def _start(self, at: Stand, stage: int) -> None:
        """A stage begins: thresholds anew, and its goal."""
        self.values |= {"stage": stage, "mu": 0.0, "dropped": [], "fallen": {}, "step": 1e-5}
        self.values |= {"lambda": self.settings.press if self.thins else 0.0, "cap": 100.0}
        for name in THRESHOLDS.values():
            self.tensors[name].values.data.zero_()
        self.settle(at)
        self.values["start"] = self.size()
        final = stage == max(1, len(self.settings.stages)) - 1
        self.values["goal"] = self.settings.target if final else self.settings.share * self.values["start"]

    # A step.

    def mode(self, at: Stand) -> None:
        """A new epoch: no example of it has been seen."""
        self.seen, self.values["loss"] = 0, [0.0, 0.0]
        at.model.train()

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """Cross-entropy, and what size and the authors' regulariser add."""
        self.seen += len(batch)
        inputs = shift_and_flip(batch.inputs) if self.settings.augment else batch.inputs
        loss = plain = F.cross_entropy(self.asked(at, inputs), batch.labels)
        if not self.joint(at) or self.settings.controller == "ratios":
            return loss
        assert self.gates is not None and self.now is not None
        if self.settings.controller == "dual":
            over = self.size_now() / self.allowed(at) - 1
            self.over = float(over.detach())
            loss = loss + self.values["mu"] * (over + self._lifted() / self.allowed(at))
        if self.values["lambda"]:
            among = ~self.gates.single if self.thins else torch.ones_like(self.gates.single)
            pressure = self.gates.operation_regularizer(self.now, self.tensors["alpha"].values, among)
            if not self.thins:  # μ is what raises thresholds otherwise
                ops, filters, weights = (self.tensors[name].values for name in THRESHOLDS.values())
                pressure = pressure + self.gates.threshold_regularizer(self.now, (ops, filters, weights))
            pressed = self.values["lambda"] * pressure
            before = self.values["loss"]
            self.values["loss"] = [before[0] + float(plain.detach()), before[1] + float(pressed.detach())]
            loss = loss + pressed
        return loss

    def _lifted(self) -> Tensor:
        """By how much operations that stand cost less than the floor, with the gradients of their masks."""
        assert self.gates is not None and self.now is not None
        if not (self.thins and self.settings.floor) or self.gates.levels.timed:
            return torch.zeros(())
        prices, floor = self.gates.prices(), self.settings.floor * self.gates.typical()
        here = self.gates.alive & self.gates.runs & ~self.gates.single
        return (self.now.ops * here * (floor - prices).clamp_min(0)).sum()

    def gate(self, at: Stand) -> None:
        """The network's own gradients are clipped; how far each α is pulled is remembered."""
        nn.utils.clip_grad_norm_(at.parameters().values(), self.settings.clip)
        if (pull := self.tensors["alpha"].values.grad) is not None:
            self.tensors["drift"].values.mul_(0.9).add_(pull)

    def stepped(self, at: Stand) -> None:
        """Thresholds stay where they can be met; μ follows the excess."""
        with torch.no_grad():
            self.tensors["threshold ops"].values.clamp_(0, 0.99)
            self.tensors["threshold filters"].values.clamp_(0, 0.99)
            self.tensors["threshold weights"].values.clamp_(0, 2)
            if self.values["stage"] and not self.settings.reprune:
                self._spare(at)
        if self.joint(at) and self.settings.controller == "dual":
            self.values["mu"] = max(0.0, self.values["mu"] + self.settings.gain / self.paced(at) * self.over)

    def _spare(self, at: Stand) -> None:
        """What earlier stages kept of operations, of filters, and of weights in operations falls below nothing."""
        stage = self.values["stage"]
        if self.earlier is None or self.earlier[0] != stage:
            found = self.upto(at, self.ends[stage - 1])
            self.earlier = stage, found.runs, found.axis.unique()
        _, ops, axes = self.earlier
        self.tensors["threshold ops"].values[ops] = 0.0
        self.tensors["threshold weights"].values[:-1][ops] = 0.0
        self.tensors["threshold filters"].values[axes] = 0.0

    # Commits.

    def plans(self, at: Stand) -> Iterator[Plan]:
        """What is cut and brought back before this epoch: at every second one of a stage, and when the next begins."""
        self.seen = 0
        if self.gates is None:  # a run was taken up again
            self.settle(at)
        stage = self.values["stage"]
        first, end = self.span(at.epochs, stage)
        epochs = at.epoch - first - self.settings.warm
        steps = (self.commit, self.revival, self.restoring) if at.epoch == end else (self.commit,)
        if at.epoch == end or (epochs > 0 and epochs % self.settings.every == 0):
            for step in steps:
                if plan := step(at):
                    yield plan
        if at.epoch == end < at.epochs:
            self._start(at, stage + 1)

    def commit(self, at: Stand, masks: GateMasks | None = None) -> Plan | None:
        """What does not stand now goes, and λ follows how much that is."""
        before = len(self.values["dropped"])
        plan = super().commit(at, masks)
        if self.settings.controller == "feedback":
            self.values |= update_controller(self.values, len(self.values["dropped"]) - before)
        return plan

    def due(self, at: Stand) -> GateMasks:
        """What stands; under ratios, by thresholds at which each level keeps the share that it is told to by now."""
        if self.settings.controller != "ratios":
            return super().due(at)
        assert self.gates is not None
        found, done = self.gates, self.progress(at)
        shares = {level: r**done for level, r in zip(self.settings.levels, self.settings.ratios, strict=True)}
        kappa = torch.cat([self.tensors[f"kappa {key}"].values.detach() for key in found.levels.axes])
        born = sum(at.axes[key].born for key in found.levels.axes)
        alpha = self.tensors["alpha"].values.detach()[found.alive & found.runs]

        def tell(name: str, level: str, values: Tensor, whole: int) -> None:
            self.tensors[f"threshold {name}"].values.data.fill_(threshold_for(shares.get(level, 1.0), values, whole))

        tell("ops", "operations", alpha.sigmoid(), int(found.runs.sum()))
        tell("filters", "filters", kappa.sigmoid(), born)
        masks, flat = self.masks(at), found.levels.flat(at.parameters())
        relative = found.levels.relative(flat, found.levels.standing(masks.ops, masks.filters))
        tell("weights", "weights", relative.masked_fill(self.gone, 0.0), len(relative))
        return super().due(at)

    def revival(self, at: Stand) -> Plan | None:
        """A share of the operations that the stage dropped comes back."""
        assert self.gates is not None
        many, found = int(self.settings.regrow * len(self.values["dropped"])), self.gates
        dead = [p for p, a, r in zip(found.ops, found.alive, found.runs, strict=True) if r and not a]
        alive = [p for p, a, r in zip(found.ops, found.alive, found.runs, strict=True) if r and a]
        drift = dict(zip(found.ops, self.tensors["drift"].values.abs().tolist(), strict=True))
        share = dict(zip(found.ops, self.tensors["alpha"].values.detach().sigmoid().tolist(), strict=True))
        back = sample_operations(dead, alive, drift, share, many, at.drawn(at.epoch, 7)) if dead else []
        return Plan(back=tuple(back), origin={"method": "mgas", "epoch": at.epoch}) if back else None

    def restoring(self, at: Stand) -> Plan | None:
        """Of the filters that the stage cut, and the weights that are 0, a share comes back: what the loss pulls at."""
        self._let_back(at)
        there = {key: self.undo.restorable.get(key, ()) for key, _ in self.spans()}
        cut = {key: [one for one in ids if one in there.get(key, ())] for key, ids in self.values["fallen"].items()}
        lost = {key: ids for key, ids in cut.items() if ids}
        if not (many := int(self.settings.regrow_filters * sum(map(len, lost.values())))):
            return None
        back: dict[str, list[int]] = {}
        for _, key, one in sorted(self.pulls(at, lost, self._some(at)), reverse=True)[:many]:
            back.setdefault(key, []).append(one)
        return Plan.restoring(at.axes, back, origin={"method": "mgas", "epoch": at.epoch})

    def _some(self, at: Stand) -> Examples:
        """As many examples as a step has: more may be more than the memory holds."""
        many, seed = -(-len(at.task.train) // at.steps), at.drawn(at.epoch, 8).initial_seed()
        return next(at.task.train.batches(many, seed=seed))

    def _let_back(self, at: Stand) -> None:
        """Weights that are 0 for good, and whose gradient is greatest, may stand again."""
        assert self.gates is not None
        if not (many := int(self.settings.regrow_weights * int(self.gone.sum()))):
            return
        slopes = self.slopes(at, self._some(at))
        assert self.now is not None
        scale = torch.cat([self.now.filter_scale, torch.ones(1)])[self.gates.levels.reads]
        pull = torch.where(self.gone, (slopes * scale).abs(), -1.0)
        self.gone[pull.topk(many).indices] = False
        for name, own in self.gates.levels.apart(self.gone).items():
            self.tensors[f"gone {name}"].values.copy_(own)

    def grown(self, at: Stand, plan: Plan) -> None:
        """A plan was carried out: what came back begins as it is told to, and everything has another place."""
        if self.settings.revive == "fresh":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(at.drawn(at.epoch, 9).initial_seed() % 2**63)
                for path in plan.back:
                    for module in at.model.get_submodule(path).modules():
                        if callable(reset := getattr(module, "reset_parameters", None)):
                            reset()
        super().grown(at, plan)
