"""The divergence of a network without some of its modules, in forward passes that begin where it differs."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf, isfinite

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.allocation.cost import cost_of
from regrow.allocation.ranked import BudgetError, uniform
from regrow.core.axes import AxisGraph
from regrow.core.axes.operations import Branch, lies_in
from regrow.core.errors import RefusedError
from regrow.core.scores import Scores
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import join_batches
from regrow.evaluation.forward import evaluating
from regrow.methods.pruning.depth.modules import Settings, least_cost, score_neurons
from regrow.methods.pruning.depth.replay import Outputs, Predictions, Replay
from regrow.methods.pruning.pruner import NOT_FINITE, PruningTask, without_modules
from regrow.scoring.compensate import constant_inputs
from regrow.scoring.weights import readers
from regrow.store.errors import StoreError
from regrow.store.tensors import read_header, write_tensors
from regrow.surgery.gate import gate_inputs, gates_of
from regrow.tracing.branches import insert_placeholders, set_modules
from regrow.training.checkpoint import FORMAT

POSITIONS = 2048
"""The most positions that run at a time: their logits are in memory."""
MEMORY = 2**30
"""The most bytes of outputs of blocks that are cached."""
SECONDS = 30.0
"""The longest time between two checkpoints, in seconds."""


@dataclass(frozen=True)
class DepthStep:
    """A module in the order of removals, the divergence once it is dropped, and what is left of the measure."""

    module: str
    divergence: float
    left: float


@dataclass(eq=False)
class _DivergenceJournal:
    """Divergences by what was dropped, in the checkpoint: an interrupted search reads them again."""

    task: PruningTask
    values: dict[str, float] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        path = self.task.checkpoint
        if path is not None and path.is_file():
            try:
                header = read_header(path, FORMAT)
                self.values = {str(key): float(value) for key, value in header["divergences"].items()}
            except (StoreError, KeyError, TypeError, ValueError, AttributeError):
                self.values = {}

    def take(self, key: str, make: Callable[[], float]) -> float:
        """Return the recorded divergence, or else a new one; infinite if it is NaN."""
        if key not in self.values:
            try:
                value = make()
            except KeyboardInterrupt:
                self.write()
                raise
            self.values[key] = value if isfinite(value) else inf
            if time.monotonic() - self.written > SECONDS:
                self.write()
        return self.values[key]

    def write(self) -> None:
        """Write the divergences to the checkpoint."""
        if self.task.checkpoint is not None:
            write_tensors(self.task.checkpoint, {}, {**self.task.header(), "divergences": self.values}, FORMAT)
        self.written = time.monotonic()


def first_batches(source: Source, tokens: int) -> tuple[list[Batch], list[Batch]]:
    """Return the first batches of a source, with at most some tokens, and the next ones, with at most twice as many.

    Each part has at least one batch, as far as there are any; the source is not read further than that.

    >>> import torch
    >>> first, others = first_batches(Source("news", [Batch((torch.zeros(3, 1),)) for _ in range(9)]), 7)
    >>> len(first), len(others)
    (2, 4)
    """
    first: list[Batch] = []
    others: list[Batch] = []
    part, left = first, tokens
    for batch in source:
        if part and batch.size > left:
            if part is others:
                break
            part, left = others, 2 * tokens
        part.append(batch)
        left -= batch.size
    return first, others


class DepthSearch:
    """The measurements on the network that the choice of modules needs."""

    def __init__(self, s: Settings, task: PruningTask, modules: Mapping[str, Branch]) -> None:
        self.s, self.task, self.modules = s, task, modules
        self.journal = _DivergenceJournal(task)
        self.short: list[str] = []  # the sources without further batches
        near: list[Batch] = []
        held_out: list[Batch] = []
        for source in task.evidence.data.values():
            first, others = first_batches(source, s.tokens)
            most = max(1, POSITIONS * len(first) // max(1, sum(batch.size for batch in first)))
            near += join_batches(replace(source, batches=first), most)
            held_out += join_batches(replace(source, batches=others or first), most)
            if not others:
                self.short.append(source.name)
        with evaluating(task.model):
            self.replay = Replay(task.model, near[0])
            self.near, self.held_out = map(self._with_predictions, (near, held_out))
        self.cached: tuple[tuple[str, ...], list[Outputs]] = (), []

    def _with_predictions(self, batches: Iterable[Batch]) -> list[tuple[Batch, Predictions]]:
        result = [(one, Predictions.of(self.replay.run(one))) for one in batches]
        if not all(bool(dense.chances.isfinite().all()) for _, dense in result):
            raise RefusedError(NOT_FINITE)
        return result

    def _rest(self, dropped: Sequence[str]) -> AxisGraph:
        return self.task.axes.without(self.modules[path] for path in dropped)

    def _left(self, dropped: Sequence[str]) -> int:
        """Return what is left of the measure without some modules, in whole steps."""
        return cost_of(self._rest(dropped), self.task.budget).total

    def path(self) -> list[DepthStep]:
        """Return the modules in the order in which they are dropped, as far as the budget takes them.

        The next one is that whose absence raises the divergence least per unit of what the budget counts.
        """
        whole = cost_of(self.task.axes, self.task.budget).total
        limit = self.task.budget.limit(whole)
        saved = {path: max(1, whole - self._left([path])) for path in self.modules}
        dropped: list[str] = []
        result: list[DepthStep] = []
        now, left, measured = 0.0, whole, dict.fromkeys(self.modules, -1)
        rises = dict.fromkeys(self.modules, -inf)  # not yet measured
        while left > limit:
            finite = [one for one, rise in rises.items() if rise < inf]
            fits = [one for one in finite if left - saved[one] >= limit]
            enough = not fits and least_cost(self.s, self._rest(dropped), self.task.units, self.task.budget) <= limit
            if enough and (finite or dropped):
                break
            if not finite:
                raise RefusedError(NOT_FINITE)
            fits = fits or finite
            best = min(fits, key=lambda one: rises[one] / saved[one])
            if measured[best] != len(dropped) and not (self.s.search == "one_shot" and measured[best] == 0):
                self.task.progress(whole - left, whole - limit, f"measuring without {best}")
                rises[best] = self._divergence(dropped, best) - now
                measured[best] = len(dropped)
                continue
            dropped.append(best)
            now, left = now + rises.pop(best), self._left(dropped)
            result.append(DepthStep(best, now, left / whole))
        return result

    def counts(self, path: Sequence[DepthStep]) -> dict[int, float]:
        """Return number of dropped modules → divergence on held-out windows, with neurons cut to the budget.

        Five numbers from none to all are measured, and then those halfway from the best one to its neighbours.
        """
        scores = score_neurons(self.s, self.task)
        result: dict[int, float] = {}
        measured = False
        wanted = {round(i * len(path) / 4) for i in range(5)}
        while wanted:
            for number in sorted(wanted):
                self.task.progress(number, len(path) + 1, "judging numbers of modules")
                loss = self._filled([one.module for one in path[:number]], scores)
                measured |= loss is not None
                result[number] = inf if loss is None else loss
            best, order = min(result, key=lambda number: (result[number], number)), sorted(result)
            beside = [one for one in order if one < best][-1:] + [one for one in order if one > best][:1]
            wanted = {(best + one) // 2 for one in beside} - result.keys()
        finite = {number: loss for number, loss in sorted(result.items()) if loss < inf}
        if measured and not finite:
            raise RefusedError(NOT_FINITE)
        return finite

    def _filled(self, dropped: Sequence[str], scores: Scores) -> float | None:
        """Return the divergence without some modules, with neurons cut to the budget; ``None`` if those are too few."""
        model, (rest, budget) = self.task.model, without_modules(self.task.axes, self.task.budget, dropped)
        values = {key: value for key, value in scores.values.items() if key in rest.axes}
        try:
            kept = uniform(rest, values, budget, minimum=self.s.minimum)
        except BudgetError:
            return None
        cut = {key: units for key, units in kept.items() if len(units) < rest[key].size}
        moments = self.task.evidence.pooled(gradients=False).moments if self.s.compensate else {}
        reads = {reader.weight for reader in readers(rest, [rest[key] for key in cut])}
        fills = constant_inputs(model, {one: moments[one] for one in reads & moments.keys()})
        gates = gates_of(rest, cut)

        def measure() -> float:
            with (
                evaluating(model),
                _without(model, [self.modules[one] for one in dropped]),
                gate_inputs(model, rest, gates, fills),
            ):
                return _mean([(w.size, dense.divergence(self.replay.run(w))) for w, dense in self.held_out])

        limit = budget.limit(cost_of(rest, budget).total)
        return self.journal.take(f"neurons to {limit}: {' '.join(sorted(dropped))}", measure)

    def _divergence(self, dropped: Sequence[str], other: str) -> float:
        """Return the divergence without some modules and another one; passes begin at the block of that one."""

        def measure() -> float:
            model = self.task.model
            with evaluating(model), _without(model, [self.modules[one] for one in dropped]):
                if self.cached[0] != tuple(dropped) or not self.cached[1]:
                    self.cached = tuple(dropped), self._record()
                losses, first = [], self._block(other)
                with _without(model, [self.modules[other]]):
                    for (w, dense), outputs in zip(self.near, self.cached[1], strict=True):
                        losses.append((w.size, dense.divergence(self.replay.run(w, outputs, first))))
            return _mean(losses)

        return self.journal.take(" ".join(sorted([*dropped, other])), measure)

    def _record(self) -> list[Outputs]:
        """Return the outputs of the blocks on each window, as far as memory allows; empty beyond that."""
        result: list[Outputs] = []
        room = MEMORY
        for window, _ in self.near:
            outputs = self.replay.record(window)[1] if room > 0 and self.replay.blocks else ()
            room -= sum(leaf.nbytes for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
            result.append(outputs if room > 0 else ())
        return result

    def _block(self, module: str) -> int:
        """Return the number of the block of the stack in which a module lies; 0 if it lies in none."""
        stack = self.replay.stack
        return int(module.removeprefix(f"{stack}.").split(".")[0]) if stack and lies_in(module, stack) else 0


def _mean(losses: Sequence[tuple[int, float]]) -> float:
    return sum(size * loss for size, loss in losses) / sum(size for size, _ in losses)


@contextmanager
def _without(model: nn.Module, dropped: Iterable[Branch]) -> Iterator[None]:
    """Context manager in which placeholders are in the place of modules."""
    modules = insert_placeholders(model, {path: one for branch in dropped for path, one in branch.placeholders.items()})
    try:
        yield
    finally:
        set_modules(model, modules)
