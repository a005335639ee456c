"""The progress of a refit: the data in batches, the layers, the sums of the present one, and what is solved."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.sources import Batch
from regrow.core.turns import StopRunError
from regrow.data.batch_streams import concatenate_batches, form_of, is_joinable
from regrow.methods.recovery import ChangedTensors, RecoveryTask
from regrow.methods.recovery.solve import RidgeCandidates, Sums
from regrow.surgery.compensate import bias_of

# The fewest elements of inputs (tokens of text) that run together, unless there are fewer in all; and into how many
# batches the data are divided at most.
MIN_ELEMENTS, MAX_BATCHES = 2048, 16
_OWN = ("_parameters", "_buffers", "_modules")  # the attributes of a module that hold its parts


@dataclass(frozen=True)
class FitBatch:
    """Text or images that run through the networks together, and the parts of the data that they belong to."""

    batch: Batch  # the inputs
    # For each part in the batch, in order: (number of the part, number of examples up to its end).
    parts: tuple[tuple[int, int], ...]


def merge_batches(
    parts: Sequence[Sequence[Batch]], max_batches: int = MAX_BATCHES, min_elements: int = MIN_ELEMENTS
) -> list[FitBatch]:
    """Return batches, without labels, joined into at most ``max_batches`` of at least ``min_elements`` elements each.

    ``parts``: the batches of each part of the data, such as a source; elements are those of the first input, such as
    tokens. One batch may hold the end of one part and the beginning of the next. Batches that cannot be joined stay
    alone; with ``max_batches=1``, for a network that keeps tensors of a forward pass in its modules, raise ValueError
    then.

    >>> text = [Batch((torch.zeros(1, 4),))] * 3
    >>> [batch.parts for batch in merge_batches([text, text[:1]], min_elements=8)]
    [((0, 2),), ((0, 1), (1, 2))]
    """
    pieces = [(part, replace(batch, labels=None)) for part, batches in enumerate(parts) for batch in batches]
    check_lengths([batch for _, batch in pieces])
    elements = sum(_first_input(batch).numel() for _, batch in pieces)
    min_elements = max(min_elements, -(-elements // max_batches))
    groups: list[list[tuple[int, Batch]]] = []
    size, last_form, last_joins = 0, list[Any](), False
    for part, batch in pieces:
        form, joins = form_of(batch), is_joinable(batch)
        if size >= min_elements or not joins or not last_joins or form != last_form:
            groups.append([])
            size, last_form, last_joins = 0, form, joins
        groups[-1].append((part, batch))
        size += _first_input(batch).numel()
    if max_batches == 1 < len(groups):
        raise ValueError(
            f"this network keeps tensors in its modules, so that all data must run in one batch, and {len(groups)} of "
            "these cannot be joined; give batches with the same arguments, or recover by distil"
        )
    result = []
    for group in groups:
        examples, ends = 0, dict[int, int]()
        for part, batch in group:
            examples += len(_first_input(batch))
            ends[part] = examples
        result.append(FitBatch(concatenate_batches([batch for _, batch in group]), tuple(ends.items())))
    return result


def _first_input(batch: Batch) -> Tensor:
    """Return the first input of a batch that is a tensor with dimensions; without one, a tensor of a single 0."""
    inputs = [*batch.args, *batch.kwargs.values()]
    return next((value for value in inputs if isinstance(value, Tensor) and value.dim()), torch.zeros(1))


def read_state(model: nn.Module) -> dict[str, object]:
    """Return name → attribute of a module that holds tensors, or buffer; parameters are left out."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in (vars(module) | module._buffers).items()
        if name not in _OWN and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
    }


def keeps_state(model: nn.Module, before: Mapping[str, object]) -> bool:
    """Whether a forward pass since ``before`` (of :func:`read_state`) has put tensors into modules."""
    after = read_state(model)
    return after.keys() != before.keys() or any(value is not before[name] for name, value in after.items())


def check_lengths(batches: Iterable[Batch]) -> None:
    """Raise ValueError if inputs of batches differ in a dimension other than the first."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for batch in batches:
        for name, value in {**{str(i): value for i, value in enumerate(batch.args)}, **batch.kwargs}.items():
            if isinstance(value, Tensor):
                shapes.setdefault(name, set()).add(tuple(value.shape[1:]))
    for sizes in shapes.values():
        if len(sizes) > 1:
            raise ValueError(f"refit needs windows of one length, and these have {sorted(sizes)[:3]}; cut them alike")


@dataclass(frozen=True)
class Layer:
    """A layer to refit, and which of the dense layer's inputs and outputs it still has."""

    name: str  # the name of its weight
    dim: int  # the dimension of the weight along which its inputs lie
    kept: Tensor  # the indices of the dense layer's inputs that the cut layer has
    rows: Tensor | None  # the indices of the dense layer's outputs that the cut layer has; `None`: all


class LayerOrderError(BaseException):
    """Raised if layers run in other orders on some data; no ``except Exception`` of a network's code catches it."""


@dataclass
class RefitWork:
    """The progress of a refit: the layers, what is solved, and the sums of the layer that batches have reached."""

    task: RecoveryTask
    layers: Mapping[str, Layer]
    candidates: RidgeCandidates
    batches: Sequence[FitBatch]
    parameters: Mapping[str, nn.Parameter]  # of the cut network; if it is streamed, of the present block alone
    records: list[dict[str, Any]] = field(default_factory=list)  # per finished layer, in the order in which they run
    _sums: dict[int, Sums] = field(default_factory=dict)  # of the present layer, by number of the part of the data
    _reached: list[str] = field(default_factory=list)  # the present layer's name, once per batch that has reached it
    changed: ChangedTensors | None = None  # where each layer is kept once it is solved
    _added: int = 0  # how many batches are in the sums

    @property
    def refitted(self) -> set[str]:
        """The names of the weights whose layers have been solved and changed."""
        return {row["weight"] for row in self.records if row["ridge"]}

    @property
    def unsolved(self) -> set[str]:
        """The names of the weights whose layers have no record yet."""
        return {*self.layers} - {row["weight"] for row in self.records}

    @property
    def done(self) -> bool:
        """Whether every layer has a record: it was solved, changed or not."""
        return len(self.records) == len(self.layers)

    def resume(self) -> None:
        """Read the records of layers that an interrupted call had solved, and their weights if these are in memory."""
        task = self.task
        if task.streamed:
            self.changed = task.streamed.changed
        elif task.checkpoint is not None:
            self.changed = ChangedTensors(task.checkpoint.with_suffix(""))
        if self.changed is None:
            return
        self.changed.open(str(task.header().get("key", "")))
        self.records = list(self.changed.records)
        for name in () if task.streamed else self.changed.places:
            self.parameters[name].copy_(self.changed[name])

    def reach(self, layer: Layer) -> None:
        """Note that a batch has reached a layer; raise LayerOrderError if the last one had reached another."""
        if self._reached and self._reached[-1] != layer.name:
            raise LayerOrderError(f"{layer.name} runs where {self._reached[-1]} does on other data")
        self._reached.append(layer.name)

    def add(
        self, layer: Layer, number: int, inputs: Tensor, target: Tensor, residual: Tensor, visible: Tensor | None
    ) -> None:
        """Add the rows of batch ``number`` to the sums of a layer, each to those of its part of the data.

        ``inputs`` ``[positions, k]``, ``target``, ``residual`` ``[positions, channels]``: target − output; ``visible``:
        which rows are no padding, bool; ``None``: all.
        """
        if bias_of(layer.name) in self.parameters:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        parts = self.batches[number].parts
        ends = [0, *(len(inputs) * end // parts[-1][1] for _, end in parts)]
        for (part, _), (start, end) in zip(parts, pairwise(ends), strict=True):
            x, y, r = (rows[start:end] for rows in (inputs, target, residual))
            if visible is not None:
                indices = visible[start:end].nonzero()[:, 0].to(x.device)
                x, y, r = (rows.index_select(0, indices) for rows in (x, y, r))
            self._sums[part] = self.candidates.sum_rows(x, y, r, self._sums.get(part))
        self._added += 1

    def finish(self, layer: Layer) -> None:
        """Refit a layer that all batches have reached; every batch calls this, and the first call does it.

        Raise StopRunError after the last layer, LayerOrderError if only some batches have reached it.
        """
        if self._reached and self._reached[-1] == layer.name:  # else an earlier call has refitted it
            if len(self._reached) < len(self.batches) or self._added not in (0, len(self.batches)):
                raise LayerOrderError(f"{layer.name} does not run on part of the data")
            sums = [self._sums[part] for part in sorted(self._sums)]
            self._reached, self._sums, self._added = [], {}, 0
            if sums:  # none if it was refitted before, or the dense network does not run it
                self.solve(layer, sums)
                record = self.records[-1]
                text = f"refitting, error {record['before']:.3f} → {record['after']:.3f}"
                self.task.progress(len(self.records), len(self.layers), text)
        if self.done:
            raise StopRunError

    def solve(self, layer: Layer, sums: Sequence[Sums]) -> None:
        """Fit a layer by ridge regression, in place, from the sums of each part; record its error before and after."""
        weight, bias = self.parameters[layer.name], self.parameters.get(bias_of(layer.name))
        choice = self.candidates.choose(sums, bias=bias is not None)
        if (change := choice.change) is not None:
            columns = change if bias is None else change[:-1]
            weight.copy_(weight.double() + (columns.T if layer.dim else columns).reshape(weight.shape))
            if bias is not None:
                bias.copy_(bias.double() + change[-1])
        record = self.candidates.record(layer.name, choice)
        self.records.append(record)
        if self.changed is not None:
            names = [name for name in (layer.name, bias_of(layer.name)) if name in self.parameters and record["ridge"]]
            self.changed.write({name: self.parameters[name].detach() for name in names}, record)
