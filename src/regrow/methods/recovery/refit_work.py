"""The progress of a refit: the layers, the sums over positions of the present one, and what is solved."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.turns import StopRunError
from regrow.methods.recovery.fit_batches import FitBatch
from regrow.methods.recovery.solve import RidgeCandidates, Sums
from regrow.methods.recovery.streamed import ChangedTensors
from regrow.methods.recovery.task import RecoveryTask
from regrow.surgery.compensate import bias_of

SECONDS = 60.0
"""The longest time between two checkpoints, in seconds, as long as layers are handled."""


@dataclass(frozen=True)
class Layer:
    """A layer to refit, and which of the dense layer's inputs and outputs it still has.

    Args:
        name: The name of its weight.
        dim: The dimension of the weight along which its inputs lie.
        kept: The indices of the dense layer's inputs that the cut layer has.
        rows: The indices of the dense layer's outputs that the cut layer has; ``None``: all.
    """

    name: str
    dim: int
    kept: Tensor
    rows: Tensor | None


class LayerOrderError(BaseException):
    """Raised if layers run in different orders, or not at all, for different batches.

    No ``except Exception`` of a network's code catches it.
    """


@dataclass
class RefitWork:
    """The progress of a refit over all layers.

    Args:
        task: The two networks.
        layers: Weight name → the layer.
        candidates: What is tried for each layer.
        batches: All the text or images.
        own: The parameters of the cut network.
        records: Per finished layer, in the order in which they run, :meth:`RidgeCandidates.record`.
        changed: Where each layer is kept once it is solved, if the networks are larger than memory: ``own`` holds the
            parameters of the present block alone. ``None``: all are in memory, and kept in the task's checkpoint.
    """

    task: RecoveryTask
    layers: Mapping[str, Layer]
    candidates: RidgeCandidates
    batches: Sequence[FitBatch]
    own: Mapping[str, nn.Parameter]
    records: list[dict[str, Any]] = field(default_factory=list)
    changed: ChangedTensors | None = None
    _sums: dict[int, Sums] = field(default_factory=dict)
    _reached: list[str] = field(default_factory=list)
    _added: int = 0
    _written: float = field(default_factory=time.monotonic)

    @property
    def refitted(self) -> set[str]:
        """The names of the weights that have been refitted."""
        return {row["weight"] for row in self.records if row["ridge"]}

    @property
    def waiting(self) -> set[str]:
        """The names of the weights that have not been handled."""
        return {*self.layers} - {row["weight"] for row in self.records}

    @property
    def done(self) -> bool:
        """Whether every layer has been handled."""
        return len(self.records) == len(self.layers)

    def resume(self) -> None:
        """Load the layers that an interrupted call had solved, from the task's checkpoint."""
        if self.changed is not None:
            self.records = list(self.changed.records)
        elif (done := self.task.read()) is not None:
            _, tensors, stored = done
            self.records = [dict(row) for row in stored["layers"]]
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self.own[name].copy_(tensor)

    def write(self) -> None:
        """Write a checkpoint of the layers that are done, unless each is kept on its own."""
        if self.changed is not None:
            return
        names = [n for weight in sorted(self.refitted) for n in (weight, bias_of(weight)) if n in self.own]
        tensors = {name: self.own[name].detach() for name in names}
        self.task.write(len(self.records), tensors, {"layers": [dict(row) for row in self.records]})

    def start_again(self, batches: Sequence[FitBatch]) -> None:
        """Divide the data otherwise; layers that are done stay so.

        Args:
            batches: All the text or images.
        """
        self.batches, self._sums, self._reached, self._added = batches, {}, [], 0

    def reach(self, layer: Layer) -> None:
        """Note that a batch has reached a layer.

        Args:
            layer: The layer.

        Raises:
            LayerOrderError: If another batch has reached another layer instead.
        """
        if self._reached and self._reached[-1] != layer.name:
            raise LayerOrderError(f"{layer.name} runs where {self._reached[-1]} does on other data")
        self._reached.append(layer.name)

    def add(
        self, layer: Layer, number: int, inputs: Tensor, target: Tensor, missing: Tensor, shown: Tensor | None = None
    ) -> None:
        """Add the rows of a batch to the sums of a layer.

        Args:
            layer: The layer.
            number: The number of the batch.
            inputs: The inputs of the layer, ``[rows, k]``.
            target: The outputs that it should have, ``[rows, out]``.
            missing: The target minus the current output, ``[rows, out]``.
            shown: Which rows count, ``[rows]`` bool on the CPU; ``None``: all.
        """
        if bias_of(layer.name) in self.own:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        parts = self.batches[number].parts
        ends = [0, *(len(inputs) * end // parts[-1][1] for _, end in parts)]
        for (part, _), (start, end) in zip(parts, pairwise(ends), strict=True):
            x, y, r = (rows[start:end] for rows in (inputs, target, missing))
            if shown is not None:  # without padding
                where = shown[start:end].nonzero()[:, 0].to(x.device)
                x, y, r = (rows.index_select(0, where) for rows in (x, y, r))
            self._sums[part] = self.candidates.sum_rows(x, y, r, self._sums.get(part))
        self._added += 1

    def finish(self, layer: Layer) -> None:
        """Refit a layer that all batches have reached, unless the first of them to go on has seen to it.

        Args:
            layer: The layer.

        Raises:
            LayerOrderError: If a batch has not reached it, or the dense network does not run it on one.
            StopRunError: If all layers are refitted.
        """
        if self._reached and self._reached[-1] == layer.name:
            if len(self._reached) < len(self.batches) or self._added not in (0, len(self.batches)):
                raise LayerOrderError(f"{layer.name} does not run on part of the data")
            sums = [self._sums[part] for part in sorted(self._sums)]
            self._reached, self._sums, self._added = [], {}, 0
            if sums:  # none if it was refitted before, or the dense network does not run it
                self.solve(layer, sums)
                last = self.records[-1]
                words = f"refitting, error {last['before']:.3f} → {last['after']:.3f}"
                self.task.progress(len(self.records), len(self.layers), words)
            if self.done or time.monotonic() - self._written > SECONDS:
                self.write()
                self._written = time.monotonic()
        if self.done:
            raise StopRunError

    def solve(self, layer: Layer, sums: Sequence[Sums]) -> None:
        """Fit a layer by ridge regression, in place, and record its error before and after.

        Args:
            layer: The layer.
            sums: The sums over the rows of each part of the data.
        """
        weight, bias = self.own[layer.name], self.own.get(bias_of(layer.name))
        choice = self.candidates.choose(sums, bias=bias is not None)
        if (change := choice.change) is not None:
            own = change if bias is None else change[:-1]
            weight.copy_(weight.double() + (own.T if layer.dim else own).reshape(weight.shape))
            if bias is not None:
                bias.copy_(bias.double() + change[-1])
        record = self.candidates.record(layer.name, choice)
        self.records.append(record)
        if self.changed is not None:
            named = {layer.name: weight, bias_of(layer.name): bias}
            made = {name: one.detach() for name, one in named.items() if one is not None}
            self.changed.write(made if record["ridge"] else {}, record)
