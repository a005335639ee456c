"""MGAS (MG-DARTS): operations, filters and weights of one network searched together, in the memory there is.

Liu, Saxena, Cao, Zhao, Ruan: MGAS / MG-DARTS (arXiv 2310.15074). **Reconstructed**: from the abstract and the authors'
public code (lxy12357/MG_DARTS), whose faults are not followed. The abstract names the parts: a learned discretisation
per level, stages over growing prefixes, re-evaluation that prunes and regrows. What neither settles is a setting, and
its default is ours.

With a = σ(α) of an operation, b = σ(κ) of a filter, r = |w| / mean |w| of a weight, and thresholds t of each level,

    operation · 2a [a ≥ t],   what reads a filter · 2b [b ≥ t],   w · [r ≥ t]      ([·] with DST's surrogate)

stand in the place of the network's own numbers while all of it, thresholds included, learns

    cross-entropy + μ (size / allowed − 1) + λ (Σ log(1 + N a / Σ a) + Σ exp(−t));

size counts what all three masks leave, and less and less is allowed until the target. Under ``dual`` μ follows the
excess (ours) and λ stays; under ``feedback`` μ is 0 and λ follows the authors' controller; under ``ratios`` each level
is told its share (a control). Filters are those of an axis, so what is masked can always be cut.

Every other epoch what is masked is cut out of the network. A stage runs the network up to one of its classifiers; when
the next one begins, thresholds start anew and a share of the operations dropped since comes back, by the authors' draw.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.commits import controlled, cut, excess, savings, threshold_for
from regrow.allocation.gates import Gates, Masks, gates
from regrow.allocation.regrowth import drawn
from regrow.candidates import Staged, candidates_in
from regrow.data.augment import moved
from regrow.evaluation.continual import share_right
from regrow.learner import Along, Learner, Stand, flags
from regrow.method import Measure
from regrow.plan import Plan
from regrow.surgery import Attic
from regrow.surgery.stand_in import standing_in
from regrow.tasks import Examples

CITATION = (
    "Liu et al., MG-DARTS / MGAS (arXiv 2310.15074); reconstructed from its abstract and the authors' public code"
)

LEVELS = ("operations", "filters", "weights")


@dataclass(frozen=True)
class Settings:
    """What is searched, to which size, and how.

    Args:
        target: What the network may cost at the end.
        measure: ``params``, ``macs`` or ``bytes``; weights that are 0 cost nothing.
        levels: Which levels are searched.
        stages: The last part of the network that each stage runs, ascending, the whole last; none: one stage.
        share: What a stage but the last leaves of what it found.
        warm: Epochs at the start of a stage in which weights alone learn.
        every: A commit comes every so many epochs of the rest.
        controller: ``dual``, ``feedback`` or ``ratios``.
        ratios: Under ``ratios``: the share of each level that stays, in the order of ``levels``.
        gain: How fast μ follows the excess, per step.
        press: λ; under ``feedback`` where it starts.
        regrow: The share of a stage's dropped operations that comes back.
        regrow_filters: The share of its cut filters that comes back, the most important at their cut first.
        regrow_weights: The share of its weights set to 0 that is let back, by the size of their gradient.
        revive: ``old``: operations come back with what they held; ``fresh``: drawn anew, as the authors do.
        lr: Of α and κ.
        lr_threshold: Of thresholds.
        clip: Most norm of the gradient of the network's own parameters.
        augment: Whether pictures are moved and mirrored.
        seed: Of everything drawn.
    """

    target: float = 0.0
    measure: str = "params"
    levels: tuple[str, ...] = LEVELS
    stages: tuple[int, ...] = ()
    share: float = 0.5
    warm: int = 2
    every: int = 2
    controller: str = "dual"
    ratios: tuple[float, ...] = ()
    gain: float = 0.1
    press: float = 0.0
    regrow: float = 0.2
    regrow_filters: float = 0.0
    regrow_weights: float = 0.0
    revive: str = "fresh"
    lr: float = 0.02
    lr_threshold: float = 0.005
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
        if self.revive not in ("old", "fresh"):
            raise ValueError(f"revive is old or fresh; got {self.revive!r}")
        if list(self.stages) != sorted({*self.stages}):
            raise ValueError(f"stages end at parts in ascending order; got {self.stages}")
        Measure(self.measure)


def build(settings: Settings) -> "Mgas":
    """The learner."""
    return Mgas(settings=settings)


@dataclass
class Mgas(Learner):
    """See the module."""

    settings: Settings = field(default_factory=Settings)
    attic: Any = field(default_factory=Attic)
    gates: Gates | None = field(default=None, repr=False)
    """What may go in the part of the network that runs now."""
    gone: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    """Weights that are 0 for good, ``[N]``."""
    now: Masks | None = field(default=None, repr=False)
    """What stands in this step."""
    over: float = 0.0
    """By what share the part that runs is too large in this step."""
    seen: int = 0
    """Examples of this epoch so far."""

    @property
    def optimizer(self) -> str:
        """Adam: its steps do not depend on how steep a level is, so one rate suits all three."""
        return "adam"

    # Stages.

    @property
    def last(self) -> int:
        """The part of the network up to which it runs; −1: all of it."""
        return self.settings.stages[self.values["stage"]] if self.settings.stages else -1

    def span(self, epochs: int, stage: int) -> tuple[int, int]:
        """The first epoch of a stage, and of the next."""
        n = max(1, len(self.settings.stages))
        return round(stage * epochs / n), round((stage + 1) * epochs / n)

    def joint(self, at: Stand) -> bool:
        """Whether masks learn in this epoch."""
        return at.epoch >= self.span(at.epochs, self.values["stage"])[0] + self.settings.warm

    def progress(self, at: Stand) -> float:
        """How much of a stage's cutting is to be done by now, from 0 to 1; the last fifth of its epochs is rest."""
        first, end = self.span(at.epochs, self.values["stage"])
        learning = max(1, end - first - self.settings.warm)
        done = at.epoch - first - self.settings.warm + self.seen / len(at.task.train)
        return min(1.0, max(0.0, done / (0.8 * learning)))

    def allowed(self, at: Stand) -> float:
        """What the part that runs may cost now: evenly in logarithms from what it did to the stage's goal."""
        return float(self.values["start"] * (self.values["goal"] / self.values["start"]) ** self.progress(at))

    def begin(self, at: Stand) -> None:
        """Everything is kept."""
        sums = candidates_in(at.model)
        ops, axes = [path for paths in sums.values() for path in paths], [axis.key for axis in at.axes.units()]
        self.values |= {"axes": axes, "stage": 0, "mu": 0.0, "lambda": self.settings.press, "step": 1e-5, "cap": 100.0}
        self.values |= {"done": {}, "history": [], "saved": dict.fromkeys(LEVELS, 0.0), "dropped": [], "fallen": {}}
        self.tensors["alpha"] = Along(torch.zeros(len(ops)), (len(ops),), self.settings.lr)
        self.tensors["drift"] = Along(torch.zeros(len(ops)), (len(ops),))
        for name, n in (("ops", len(ops)), ("filters", len(axes)), ("weights", len(ops) + 1)):
            self.tensors[f"threshold {name}"] = Along(torch.zeros(n), (n,), self.settings.lr_threshold)
        self._settle(at)
        self._start(at, 0)

    def _start(self, at: Stand, stage: int) -> None:
        """A stage begins: thresholds anew, and its goal."""
        self.values |= {"stage": stage, "mu": 0.0, "dropped": [], "fallen": {}, "step": 1e-5}
        self.values |= {"lambda": self.settings.press, "cap": 100.0}
        for name in ("ops", "filters", "weights"):
            self.tensors[f"threshold {name}"].values.data.zero_()
        self._settle(at)
        self.values["start"] = self._size()
        final = stage == max(1, len(self.settings.stages)) - 1
        self.values["goal"] = self.settings.target if final else self.settings.share * self.values["start"]

    def _settle(self, at: Stand) -> None:
        """Where units lie now; κ and flags of what a branch took along are forgotten, of what came back are new."""
        staged = bool(self.settings.stages)
        parameters = {n: p for n, p in at.parameters().items() if not staged or _parts(at).within(n, self.last)}
        sums = candidates_in(at.model)
        self.gates = gates(
            at.axes,
            parameters,
            sums,
            self.values["axes"],
            _parts(at).needed() if staged else [*sums.values()],
            lambda path: not staged or _parts(at).within(path, self.last),
            Measure(self.settings.measure),
        )
        for name in [*self.tensors]:
            kind, _, rest = name.partition(" ")
            if (kind == "kappa" and rest not in at.axes.axes) or (kind == "gone" and rest not in at.axes.shapes):
                del self.tensors[name]
        for key, (_, size, _) in self._spans():
            if f"kappa {key}" not in self.tensors:
                self.tensors[f"kappa {key}"] = Along(torch.zeros(size), (key,), self.settings.lr)
        for name in self.gates.levels.weights:
            if f"gone {name}" not in self.tensors:
                self.tensors[f"gone {name}"] = flags(at, name)
        self.gone = torch.cat([self.tensors[f"gone {name}"].values.reshape(-1) for name in self.gates.levels.weights])
        self._masks(at)

    # A step.

    def mode(self, at: Stand) -> None:
        """A new epoch: no example of it has been seen."""
        self.seen = 0
        at.model.train()

    def _masks(self, at: Stand, flat: Tensor | None = None, learning: bool = False) -> Masks:
        """What stands now."""
        found, learned, searched = self.gates, self.settings.controller != "ratios", self.settings.levels
        assert found is not None
        flat = found.levels.flat(at.parameters()) if flat is None else flat

        def own(name: str) -> Tensor:
            values = self.tensors[name].values
            return values if learning and (learned or not name.startswith("threshold")) else values.detach()

        kappa = [own(f"kappa {key}") for key in found.levels.axes]
        self.now = found.masks(
            (own("alpha"), own("threshold ops")) if "operations" in searched else None,
            (torch.cat(kappa), own("threshold filters")) if "filters" in searched and kappa else None,
            (flat, self.gone, own("threshold weights")) if "weights" in searched else None,
        )
        return self.now

    def _standing(self, at: Stand, learning: bool) -> dict[str, Tensor]:
        assert self.gates is not None
        parameters, found = at.parameters(), self.gates.levels
        flat = found.flat(parameters)
        masks = self._masks(at, flat, learning)
        stood = found.apart(found.masked(flat, masks.filter_scale, masks.over))
        start = 0
        for path, paths in candidates_in(at.model).items():
            name = f"{path}.scale".lstrip(".")
            stood[name] = parameters[name] * masks.op_scale[start : start + len(paths)]
            start += len(paths)
        return stood

    def standing(self, at: Stand) -> Mapping[str, Tensor]:
        """The network's numbers under the masks."""
        return self._standing(at, self.joint(at))

    def answering(self, at: Stand, number: int) -> Mapping[str, Tensor]:
        """The same when it is evaluated."""
        with torch.no_grad():
            return self._standing(at, False)

    def asked(self, at: Stand, inputs: Tensor) -> Tensor:
        """The logits of the classifier at which the stage ends."""
        found: Tensor = _parts(at).upto(inputs, self.last) if self.settings.stages else at.logits(inputs)
        return found

    def loss(self, at: Stand, batch: Examples) -> Tensor:
        """Cross-entropy, and what size and the authors' regulariser add."""
        self.seen += len(batch)
        inputs = moved(batch.inputs) if self.settings.augment else batch.inputs
        loss = plain = F.cross_entropy(self.asked(at, inputs), batch.labels)
        if not self.joint(at) or self.settings.controller == "ratios":
            return loss
        assert self.gates is not None and self.now is not None
        if self.settings.controller == "dual":
            over = self._size_now() / self.allowed(at) - 1
            self.over = float(over.detach())
            loss = loss + self.values["mu"] * over
        if self.values["lambda"]:
            own = [self.tensors[f"threshold {name}"].values for name in ("ops", "filters", "weights")]
            pressure = self.gates.pressure(self.now, self.tensors["alpha"].values, (own[0], own[1], own[2]))
            self.values["loss"] = [float(plain.detach()), float(self.values["lambda"] * pressure.detach())]
            loss = loss + self.values["lambda"] * pressure
        return loss

    def _size_now(self) -> Tensor:
        """What the part that runs costs under the masks that stand, with their gradients."""
        assert self.gates is not None and self.now is not None
        return self.gates.levels.size(self.now.ops, self.now.filters, self.now.weights)

    def _size(self) -> float:
        with torch.no_grad():
            return float(self._size_now())

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
        if self.joint(at) and self.settings.controller == "dual":
            self.values["mu"] = max(0.0, self.values["mu"] + self.settings.gain * self.over)

    def passed(self, at: Stand) -> None:
        """Accuracy on the held-out part, size and what each level keeps, for the record."""
        assert self.gates is not None
        self._masks(at)
        with standing_in(at.model, self.answering(at, at.number)):
            right = share_right(at.model, at.task.test, ask=lambda x: self.asked(at, x))
        record = {"epoch": at.epoch + 1, "stage": self.values["stage"], "accuracy": right, "size": self._size()}
        self.values["history"].append(record | {"mu": self.values["mu"], **self.kept()})

    def kept(self) -> dict[str, float]:
        """The share of each level that stands, in the part that runs."""
        assert self.gates is not None and self.now is not None
        here = self.gates.runs
        found = {"operations": float(self.now.ops[here].mean()) if bool(here.any()) else 1.0}
        found["filters"] = float(self.now.filters.mean()) if self.gates.levels.filters else 1.0
        weights = self.now.weights
        found["weights"] = 1.0 if weights is None else float(weights.mean())
        return found

    # Commits.

    def plan(self, at: Stand) -> Plan | None:
        """What is cut and brought back before this epoch: at every second one of a stage, and when the next begins."""
        if self.gates is None:  # a run was taken up again
            self._settle(at)
        stage = self.values["stage"]
        end = self.span(at.epochs, stage)[1]
        epochs = at.epoch - self.span(at.epochs, stage)[0] - self.settings.warm
        if self.values["done"].get("epoch") != at.epoch:
            self.values["done"] = {"epoch": at.epoch, "tried": []}
        tried = self.values["done"]["tried"]
        steps = [("commit", self.commit)] if epochs > 0 and epochs % self.settings.every == 0 else []
        if at.epoch == end:
            steps = [("commit", self.commit), ("revive", self.revival), ("restore", self.restoring)]
        for name, step in steps:
            if name not in tried:
                tried.append(name)
                if plan := step(at):
                    return plan
        if at.epoch == end and end < at.epochs:
            self._start(at, stage + 1)
        return None

    def commit(self, at: Stand) -> Plan | None:
        """What does not stand now goes."""
        assert self.gates is not None
        with torch.no_grad():
            if self.settings.controller == "ratios":
                self._told(at)
            masks = self._masks(at)
            drop, keep = cut(self.gates, masks, at.axes)
            saved = savings(self.gates, masks)
            if masks.over is not None:
                for name, below in self.gates.levels.apart(masks.over < 0).items():
                    self.tensors[f"gone {name}"].values.logical_or_(below)
        for key, units in keep.items():
            share, ids = self.tensors[f"kappa {key}"].values.detach().sigmoid(), at.axes[key].ids
            lost = {str(ids[i]): float(share[i]) for i in range(len(ids)) if i not in units}
            self.values["fallen"].setdefault(key, {}).update(lost)
        before = self.values["saved"]
        self.values["saved"] = saved | {level: before[level] + saved[level] for level in ("operations", "filters")}
        self.values["dropped"] += drop
        if self.settings.controller == "feedback":
            self.values |= controlled(self.values, len(drop))
        origin = {"method": "mgas", "epoch": at.epoch}
        if drop:
            return Plan.dropping(at.axes, drop, keep, origin=origin)
        self._settle(at)
        return Plan.keeping(at.axes, keep, origin=origin) if keep else None

    def _told(self, at: Stand) -> None:
        """Set thresholds so that each level keeps the share that it is told to keep by now."""
        assert self.gates is not None
        found, done = self.gates, self.progress(at)
        shares = {level: r**done for level, r in zip(self.settings.levels, self.settings.ratios, strict=True)}
        kappa = [self.tensors[f"kappa {key}"].values for key in found.levels.axes]
        relative = found.levels.relative(found.levels.flat(at.parameters()))
        born = sum(at.axes[key].born for key in found.levels.axes)
        alpha = self.tensors["alpha"].values.sigmoid()[found.alive & found.runs]
        told = {"ops": ("operations", alpha, int(found.runs.sum()))}
        told |= {
            "filters": ("filters", torch.cat(kappa).sigmoid(), born),
            "weights": ("weights", relative, len(relative)),
        }
        for name, (level, values, whole) in told.items():
            self.tensors[f"threshold {name}"].values.data.fill_(threshold_for(shares.get(level, 1.0), values, whole))

    def revival(self, at: Stand) -> Plan | None:
        """A share of the operations that the stage dropped comes back."""
        assert self.gates is not None
        many, found = int(self.settings.regrow * len(self.values["dropped"])), self.gates
        dead = [p for p, a, r in zip(found.ops, found.alive, found.runs, strict=True) if r and not a]
        alive = [p for p, a, r in zip(found.ops, found.alive, found.runs, strict=True) if r and a]
        drift = dict(zip(found.ops, self.tensors["drift"].values.abs().tolist(), strict=True))
        share = dict(zip(found.ops, self.tensors["alpha"].values.detach().sigmoid().tolist(), strict=True))
        back = drawn(dead, alive, drift, share, many, at.drawn(at.epoch, 7)) if dead else []
        return Plan(back=tuple(back), origin={"method": "mgas", "epoch": at.epoch}) if back else None

    def restoring(self, at: Stand) -> Plan | None:
        """A share of the filters that the stage cut comes back, and of the weights that it set to 0."""
        self._let_back(at)
        fallen = [
            (share, key, int(one))
            for key, lost in self.values["fallen"].items()
            if key in at.axes.axes and key in self.attic.gone
            for one, share in lost.items()
            if int(one) in self.attic.gone[key]
        ]
        back: dict[str, list[int]] = {}
        for _, key, one in sorted(fallen, reverse=True)[: int(self.settings.regrow_filters * len(fallen))]:
            back.setdefault(key, []).append(one)
        return Plan.restoring(at.axes, back, origin={"method": "mgas", "epoch": at.epoch}) if back else None

    def _let_back(self, at: Stand) -> None:
        """Weights that are 0 for good, and whose gradient is greatest, may stand again."""
        assert self.gates is not None
        if not (many := int(self.settings.regrow_weights * int(self.gone.sum()))):
            return
        batch = next(at.task.train.batches(256, seed=at.drawn(at.epoch, 8).initial_seed()))
        at.model.zero_grad(set_to_none=True)
        with standing_in(at.model, self._standing(at, False)):
            F.cross_entropy(self.asked(at, batch.inputs), batch.labels).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in at.parameters().items()}
        pull = torch.where(self.gone, self.gates.levels.flat(grads).abs(), -1.0)
        at.model.zero_grad(set_to_none=True)
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
        self._settle(at)

    # The end.

    def final(self, at: Stand) -> Plan | None:
        """The last commit, with as much more left out, least important first, as the target asks for.

        Raises:
            ValueError: If the target is below what can be reached.
        """
        assert self.gates is not None
        with torch.no_grad():
            relative = self.gates.levels.relative(self.gates.levels.flat(at.parameters()))
            ops, filters, weights = excess(self.gates, self._masks(at), relative, self.settings.target)
            self.tensors["alpha"].values.data[ops] = -50.0
            places = {base + i: (key, i) for key, (base, n, _) in self._spans() for i in range(n)}
            for key, i in (places[one] for one in filters):
                self.tensors[f"kappa {key}"].values.data[i] = -50.0
            self.gone |= weights
        return self.commit(at)

    def _spans(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        assert self.gates is not None
        return zip(self.gates.levels.axes, self.gates.spans, strict=True)

    def baked(self, at: Stand) -> None:
        """Write what stands into the network's parameters: from now on it is a plain network."""
        values = self.answering(at, at.number)
        with torch.no_grad():
            for name, parameter in at.parameters().items():
                if name in values:
                    parameter.copy_(values[name])


def _parts(at: Stand) -> Staged:
    return cast(Staged, at.model)
