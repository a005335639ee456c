"""Searching by masks: operations, filters and weights that do not stand are 0 while the network learns, then cut."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.allocation.commits import fit_to_budget, least, limit_removal, protect_cheapest, savings, select_removed
from regrow.allocation.gates import GateMasks, Gates, gates
from regrow.allocation.levels import counted_tensors
from regrow.allocation.timed import Prices
from regrow.amounts import short
from regrow.axis_tensor import AxisTensor
from regrow.candidates import Staged, candidates_in, single_in, tied_in
from regrow.evaluation.continual import share_right
from regrow.learner import Learner, Stand, flags
from regrow.method import Measure
from regrow.plan import Plan
from regrow.surgery import UndoStore, apply
from regrow.surgery.parametrize import parametrize, resize_axis_tensor
from regrow.tasks import Examples
from regrow.tracing.meta_copy import clone_model

LEVELS = ("operations", "filters", "weights")
THRESHOLDS = dict(zip(LEVELS, ("threshold ops", "threshold filters", "threshold weights"), strict=True))
"""Level → the tensor of its thresholds."""


@dataclass
class Searcher(Learner):
    """What a search by masks is made of; a method says how importances and thresholds learn, and when what goes.

    Its tensors: ``alpha`` of every operation, ``kappa KEY`` of the filters of every axis, ``threshold`` of ``ops``,
    ``filters`` (one per axis) and ``weights`` (one per operation, and one for the rest), and ``gone NAME``: entries of
    a weight that are 0 for good.
    """

    settings: Any = None
    undo: Any = field(default_factory=UndoStore)
    gates: Gates | None = field(default=None, repr=False)
    """What may go in the part of the network that runs now."""
    gone: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    """Weights that are 0 for good, ``[N]``."""
    now: GateMasks | None = field(default=None, repr=False)
    """What stands in this step."""

    searched: tuple[str, ...] = LEVELS
    ends: tuple[int, ...] = ()
    """The last part of the network that each stage runs; none: all of it, always."""
    most: float = 0.0
    """What the network may cost at the end."""
    measure: Measure = Measure.PARAMETERS
    learns: bool = True
    """Whether thresholds learn."""
    shrinks: bool = False
    """Whether what stands becomes less while it learns, so that each epoch leaves a network of a size of its own."""
    spares_bare: bool = True
    """Whether a commit spares operations that hold nothing but their scale, as it does others."""
    timed: Prices | None = None
    """What entries and operations take of a pass, where time is what it may cost."""

    @property
    def optimizer(self) -> str:
        """Adam: its steps do not depend on how steep a level is, so one rate suits all three."""
        return "adam"

    def rates(self, at: Stand) -> tuple[float, float]:
        """How fast α and κ learn, and thresholds."""
        return 0.02, 0.005

    def allowed(self, at: Stand) -> float:
        """What the part that runs may cost now; a commit leaves no less standing than that."""
        return self.most

    def joint(self, at: Stand) -> bool:
        """Whether importances learn in this epoch."""
        return True

    def check(self, at: Stand) -> None:
        """Refuse a search before it begins whose target no choice meets, or that chooses within what it chooses.

        Args:
            at: The whole network, and how many epochs there will be.

        Raises:
            ValueError: If there is one; names the least that can be left, or the candidates.
        """
        ops = [path for paths in candidates_in(at.model).values() for path in paths]
        for inner, outer in ((a, b) for a in ops for b in ops if a.startswith(f"{b}.")):
            raise ValueError(f"the candidate {inner} lies in another, {outer}: mark candidates on one level")
        if (left := least(self.upto(at, (self.ends or (-1,))[-1]), self.cuts)) > self.most:
            raise ValueError(
                f"a target of {self.most:g} {self.measure} is below what is left whatever goes, {left:g}: take a "
                "higher one, a smaller space, or more levels"
            )

    @property
    def cuts(self) -> Collection[str]:
        """The levels of which something may go."""
        return self.searched

    def begin(self, at: Stand) -> None:
        """Everything stands."""
        sums = candidates_in(at.model)
        ops, axes = [path for paths in sums.values() for path in paths], [axis.key for axis in at.axes.units()]
        self.values |= {"axes": axes, "stage": 0, "mu": 0.0, "history": [], "saved": dict.fromkeys(LEVELS, 0.0)}
        self.values |= {"dropped": [], "fallen": {}, "whole": self.whole(at), "loss": [0.0, 0.0]}
        self.tensors["alpha"] = AxisTensor(torch.zeros(len(ops)), (len(ops),), self.rates(at)[0])
        for name, n in (("ops", len(ops)), ("filters", len(axes)), ("weights", len(ops) + 1)):
            self.tensors[f"threshold {name}"] = AxisTensor(torch.zeros(n), (n,), self.rates(at)[1])
        self.settle(at)

    @property
    def last(self) -> int:
        """The part of the network up to which it runs; −1: all of it."""
        return self.ends[self.values["stage"]] if self.ends else -1

    def upto(self, at: Stand, last: int) -> Gates:
        """What may go in the network up to one of its parts; −1: in all of it."""
        staged = last >= 0
        tensors = counted_tensors(at.model, self.measure).items()
        parameters = {n: p for n, p in tensors if not staged or cast(Staged, at.model).within(n, last)}
        sums = candidates_in(at.model)
        return gates(
            at.axes,
            parameters,
            sums,
            self.values.get("axes") or [axis.key for axis in at.axes.units()],
            cast(Staged, at.model).needed() if staged else [*sums.values()],
            lambda path: not staged or cast(Staged, at.model).within(path, last),
            self.measure,
            tied_in(at.model),
            single_in(at.model),
            self.timed,
        )

    def whole(self, at: Stand) -> float:
        """What the network costs as it is, with nothing masked, and without classifiers of stages but the last."""
        found = self.upto(at, (self.ends or (-1,))[-1])
        return float(found.levels.size(found.alive.float(), torch.ones(found.levels.filters)))

    def settle(self, at: Stand) -> None:
        """Where units lie now; κ and flags of what a branch took along are forgotten, of what came back are new."""
        self.gates = self.upto(at, self.last)
        for name in [*self.tensors]:
            kind, _, rest = name.partition(" ")
            if (kind == "kappa" and rest not in at.axes.axes) or (kind == "gone" and rest not in at.axes.shapes):
                del self.tensors[name]
        for key, (_, size, _) in self.spans():
            if f"kappa {key}" not in self.tensors:
                self.tensors[f"kappa {key}"] = AxisTensor(torch.zeros(size), (key,), self.rates(at)[0])
        for name in self.gates.levels.weights:
            if f"gone {name}" not in self.tensors:
                self.tensors[f"gone {name}"] = flags(at, name)
        self.gone = torch.cat([self.tensors[f"gone {name}"].values.reshape(-1) for name in self.gates.levels.weights])
        self.masks(at)

    def evenly(self) -> None:
        """A filter counts by its place in its axis, so that every axis loses the same share of them."""
        for name, one in self.tensors.items():
            if name.startswith("kappa "):
                n = len(one.values)
                one.values = torch.logit((torch.arange(n, 0, -1) - 0.5) / n)

    def spans(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Key of each axis → the place of its first filter, how many it has, and how many it keeps at least."""
        assert self.gates is not None
        return zip(self.gates.levels.axes, self.gates.spans, strict=True)

    def masks(self, at: Stand, flat: Tensor | None = None, learning: bool = False) -> GateMasks:
        """What stands now."""
        found, searched = self.gates, self.searched
        assert found is not None
        flat = found.levels.flat(at.parameters()) if flat is None else flat

        def own(name: str) -> Tensor:
            values = self.tensors[name].values
            return values if learning and (self.learns or name.startswith(("alpha", "kappa"))) else values.detach()

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
        masks = self.masks(at, flat, learning)
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
        return cast(Staged, at.model).upto(inputs, self.last) if self.ends else at.logits(inputs)

    def size_now(self) -> Tensor:
        """What the part that runs costs under the masks that stand, with their gradients."""
        assert self.gates is not None and self.now is not None
        return self.gates.levels.size(self.now.ops, self.now.filters, self.now.weights)

    def size(self) -> float:
        """What the part that runs costs under the masks that stand."""
        with torch.no_grad():
            return float(self.size_now())

    def passed(self, at: Stand) -> None:
        """Accuracy on the held-out part, size, what it may be and what each level keeps, for the record."""
        assert self.gates is not None
        self.masks(at)
        with parametrize(at.model, self.answering(at, at.number)):
            right = share_right(at.model, at.task.test, ask=lambda x: self.asked(at, x))
        record = {"epoch": at.epoch + 1, "stage": self.values["stage"], "accuracy": right, "size": self.size()}
        self.values["history"].append(record | {"allowed": self.allowed(at), "mu": self.values["mu"]} | self.kept())

    def told(self, at: Stand) -> str:
        """The stage, and what the last epoch of it left: size of what it may be, accuracy, the share of each level."""
        stage, words = self.values["stage"], [at.task.name]
        words += [f"stage {stage + 1}"] * (len(self.ends) > 1)
        last = (self.values["history"] or [{"stage": None}])[-1]
        if last["stage"] == stage:
            most = f" of {short(last['allowed'])}" if last["allowed"] else ""
            words += [f"{short(last['size'])}{most} {self.measure}", f"validation {last['accuracy']:.2f}"]
            words += [f"{level} {last[level]:.0%}" for level in LEVELS if level in self.searched]
        return ", ".join(words)

    def kept(self) -> dict[str, float]:
        """The share of each level that stands, in the part that runs."""
        assert self.gates is not None and self.now is not None
        here = self.gates.runs
        found = {"operations": float(self.now.ops[here].mean()) if bool(here.any()) else 1.0}
        found["filters"] = float(self.now.filters.mean()) if self.gates.levels.filters else 1.0
        weights = self.now.weights
        found["weights"] = 1.0 if weights is None else float(weights.mean())
        return found

    def account(self, at: Stand) -> dict[str, Any]:
        """What the part that runs costs, and what it was to cost."""
        return {"measure": str(self.measure), "asked": self.most, "size": self.size()}

    def due(self, at: Stand) -> GateMasks:
        """By what masks a commit goes now."""
        return self.masks(at)

    def commit(self, at: Stand, masks: GateMasks | None = None) -> Plan | None:
        """What does not stand now, or under masks, goes."""
        assert self.gates is not None
        with torch.no_grad():
            masks = limit_removal(self.gates, masks or self.due(at), self.allowed(at), self.spares_bare)
            masks = protect_cheapest(self.upto(at, (self.ends or (-1,))[-1]), masks, self.most, self.cuts)
            drop, keep = select_removed(self.gates, masks, at.axes)
            saved = savings(self.gates, masks)
            if masks.over is not None:
                for name, below in self.gates.levels.apart(masks.over < 0).items():
                    self.tensors[f"gone {name}"].values.logical_or_(below)
        for key, units in keep.items():
            lost = [int(one) for i, one in enumerate(at.axes[key].ids) if i not in units]
            self.values["fallen"].setdefault(key, []).extend(lost)
        self.values["saved"]["weights"], self.values["going"] = saved["weights"], saved["operations"]
        self.values["dropped"] += drop
        origin = {"method": "search", "epoch": at.epoch}
        if drop:
            return Plan.dropping(at.axes, drop, keep, origin=origin)
        self.settle(at)
        return Plan.keeping(at.axes, keep, origin=origin) if keep else None

    def grown(self, at: Stand, plan: Plan) -> None:
        """A plan was carried out: everything has another place, and the ledger follows what the network costs now."""
        before, saved = self.values["whole"], self.values["saved"]
        self.values["whole"] = now = self.whole(at)
        operations = before - now if plan.back else self.values.pop("going", 0.0)
        saved["operations"] += operations
        saved["filters"] += before - now - operations
        self.settle(at)

    def slopes(self, at: Stand, batch: Examples) -> Tensor:
        """∂ loss / ∂ what stands in the place of each weight, ``[N]``.

        A network in evaluation recomputes nothing, so it sees an eighth of the examples at a time.

        Args:
            at: The network.
            batch: What the loss is of.
        """
        assert self.gates is not None
        levels, stood = self.gates.levels, dict(self.answering(at, at.number))
        learned = {name: stood[name].detach().requires_grad_() for name in levels.weights}
        total = torch.zeros(len(levels.reads))
        at.model.eval()
        for piece in torch.arange(len(batch)).split(max(1, len(batch) // 8)):
            with parametrize(at.model, stood | learned):
                logits = self.asked(at, batch.inputs[piece])
                loss = F.cross_entropy(logits, batch.labels[piece], reduction="sum") / len(batch)
                found = torch.autograd.grad(loss, [*learned.values()], allow_unused=True, materialize_grads=True)
            total = total + levels.flat(dict(zip(learned, found, strict=True)))
        return total

    def pulls(self, at: Stand, lost: Mapping[str, Sequence[int]], batch: Examples) -> list[tuple[float, str, int]]:
        """How strongly the loss pulls at filters that were cut: |∂ loss / ∂ g|, g = 0 the scale of what is read of one.

        A copy of the network has them all back at this scale, so it answers as the network does when a stage begins:
        with thresholds at 0.

        Args:
            at: The network.
            lost: Key of an axis → the birth numbers of filters that the undo store has.
            batch: What the loss is of.

        Returns:
            Of each filter its pull, its axis and its birth number.
        """
        plan = Plan.restoring(at.axes, lost)
        model, axes = apply(clone_model(at.model), at.axes, plan, undo=copy.copy(self.undo))
        there, probe = replace(at, model=model, axes=axes), copy.copy(self)
        probe.values = copy.deepcopy(self.values)
        probe.tensors = {name: resize_axis_tensor(one, at.axes, plan) for name, one in self.tensors.items()}
        for name in THRESHOLDS.values():
            probe.tensors[name].values = torch.zeros_like(probe.tensors[name].values)
        probe.settle(there)
        places = {key: [axes[key].ids.index(one) for one in ids] for key, ids in lost.items()}
        for key, own in places.items():
            probe.tensors[f"kappa {key}"].values[own] = -50.0
        slopes = probe.slopes(there, batch)
        assert probe.gates is not None
        levels = probe.gates.levels
        each = slopes * levels.flat(there.parameters()).detach()
        pull = each.new_zeros(levels.filters + 1).index_add(0, levels.reads, each).abs().tolist()
        base = {key: first for key, (first, _, _) in probe.spans()}
        return [
            (pull[base[key] + i], key, one)
            for key, ids in lost.items()
            for i, one in zip(places[key], ids, strict=True)
        ]

    def final(self, at: Stand) -> Plan | None:
        """The last commit, with as much more left out, least important first, as the target asks for.

        Raises:
            ValueError: If the target is below what can be reached.
        """
        if self.gates is None:  # a run was taken up again
            self.settle(at)
        assert self.gates is not None
        with torch.no_grad():
            masks, flat = self.due(at), self.gates.levels.flat(at.parameters())
            relative = self.gates.levels.relative(flat, self.gates.levels.standing(masks.ops, masks.filters))
            ops, filters, weights = fit_to_budget(self.gates, masks, relative, self.most)
            self.gone |= weights
            masks = replace(self.masks(at), ops=ops, filters=filters)
        plan = self.commit(at, masks)
        for name in THRESHOLDS.values():  # what is left stands
            self.tensors[name].values.data.zero_()
        self.masks(at)
        return plan or self.alone(at)

    def alone(self, at: Stand) -> Plan | None:
        """Where one operation is to be left, all go but the most important one."""
        assert self.gates is not None and self.now is not None
        singles, found, alpha = single_in(at.model), self.gates, self.tensors["alpha"].values.detach()
        number, ops = {path: i for i, path in enumerate(found.ops)}, self.now.ops.detach().clone()
        for paths in singles:
            own = [number[path] for path in paths if found.alive[number[path]]]
            best = max(own, key=lambda i: float(alpha[found.tied[i]]))
            ops[[i for i in own if i != best]] = 0.0
        return self.without(at, ops) if singles else None

    def without(self, at: Stand, ops: Tensor) -> Plan | None:
        """Operations that stand go where a mask, ``[operations]``, leaves them out; so answers change."""
        assert self.gates is not None and self.now is not None
        masks = replace(self.now, ops=ops)
        drop, _ = select_removed(self.gates, masks, at.axes)
        if not drop:
            return None
        self.values["going"] = savings(self.gates, masks)["operations"]
        self.values["dropped"] += drop
        return Plan.dropping(at.axes, drop, {}, origin={"method": "search", "epoch": at.epoch, "stood": True})
