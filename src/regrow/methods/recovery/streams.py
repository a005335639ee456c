"""Layers refitted as a network runs: on the dense network that carries the cut one's stream, or in lockstep with it."""

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.methods.recovery.lockstep import Answers, Meetings, Met, StopRunError
from regrow.methods.recovery.solve import Sums, chosen
from regrow.methods.recovery.task import RecoveryTask
from regrow.surgery.compensate import bias_of

SECONDS = 60.0
"""A checkpoint is written at least this often."""


@dataclass(frozen=True)
class Layer:
    """A layer to refit.

    Args:
        name: Its weight.
        dim: In which dimension that reads.
        kept: Which of the dense layer's inputs are left.
        rows: Which of its outputs are; ``None``: all.
    """

    name: str
    dim: int
    kept: Tensor
    rows: Tensor | None


@dataclass
class RefitWork:
    """The work on all layers; ``told`` grows by an entry per layer, in the order in which they are met.

    Args:
        task: The two networks.
        layers: By name.
        ridges: What the ridge is chosen from.
        share: Which share of the positions is learned from; the rest judge.
        own: The parameters of the cut network.
        told: Per refitted layer: ``weight``, ``before``, ``after``, ``ridge``.
    """

    task: RecoveryTask
    layers: Mapping[str, Layer]
    ridges: Sequence[float]
    share: float
    own: Mapping[str, nn.Parameter]
    told: list[dict[str, Any]] = field(default_factory=list)

    @property
    def changed(self) -> set[str]:
        """The weights that are not as the cut left them."""
        return {row["weight"] for row in self.told if row["ridge"]}

    @property
    def done(self) -> bool:
        """Whether every layer was met."""
        return len(self.told) == len(self.layers)

    def resume(self) -> None:
        """Put in what an earlier call solved."""
        if (done := self.task.read()) is not None:
            _, tensors, values = done
            self.told = [dict(row) for row in values["layers"]]
            with torch.no_grad():
                for name, tensor in tensors.items():
                    self.own[name].copy_(tensor)

    def write(self) -> None:
        """Write a checkpoint of the layers that are done."""
        names = [n for weight in sorted(self.changed) for n in (weight, bias_of(weight)) if n in self.own]
        tensors = {name: self.own[name].detach() for name in names}
        self.task.write(len(self.told), tensors, {"layers": [dict(row) for row in self.told]})

    def solve(self, layer: Layer, inputs: Tensor, target: Tensor, missing: Tensor) -> None:
        """Change a layer, and tell what the held-out positions missed before and miss after it.

        Args:
            layer: Which.
            inputs: What it is fed, ``[rows, k]``.
            target: What it is to give, ``[rows, out]``.
            missing: What of that it does not give yet.
        """
        weight, bias = self.own[layer.name], self.own.get(bias_of(layer.name))
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        cut = round(len(inputs) * self.share)
        fit, held = (Sums.of(inputs[at], missing[at], target[at]) for at in (slice(0, cut), slice(cut, None)))
        change, ridge, left = chosen(fit, held, self.ridges)
        if change is not None:
            own = change if bias is None else change[:-1]
            weight.copy_(weight.double() + (own.T if layer.dim else own).reshape(weight.shape))
            if bias is not None:
                bias.copy_(bias.double() + change[-1])
        whole = max(held.wanted, 1e-300)
        self.told.append({"weight": layer.name, "before": held.missing / whole, "after": left / whole, "ridge": ridge})


class Refitting(Meetings):
    """Refits each layer before its output is used, and ends the run with the last."""

    def __init__(self, watched: Mapping[int, str], work: RefitWork) -> None:
        super().__init__(watched)
        self.work, self.last = work, time.monotonic()
        self.solved = {row["weight"] for row in work.told}

    @abstractmethod
    def rows(self, layer: Layer, met: Met) -> tuple[Tensor, Tensor, Tensor] | None:
        """The inputs of a layer, what it is to give, and what of that is missing; ``None``: it cannot be said."""

    @abstractmethod
    def put(self, layer: Layer, met: Met) -> None:
        """Write what the layer gives now into its output."""

    def meet(self, met: Met) -> None:
        """Refit a layer, unless an earlier call has."""
        work, task = self.work, self.work.task
        layer = work.layers[met.name]
        if layer.name not in self.solved and (rows := self.rows(layer, met)) is not None:
            work.solve(layer, *rows)
            last = work.told[-1]
            words = f"refitting, error {last['before']:.3f} → {last['after']:.3f}"
            task.progress(len(work.told), len(work.layers), words)
        if work.done or time.monotonic() - self.last > SECONDS:
            work.write()
            self.last = time.monotonic()
        if work.done:
            raise StopRunError
        self.put(layer, met)


class Carried(Refitting):
    """The dense network with the cut one's stream in it: each watched layer gives what the cut one's layer gives.

    What the dense layer would have given there is the target. Nothing else differs between the networks, since dropped
    units reach nothing but layers that do not read them. Without ``fit`` it is only run, to see whether that is so.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork, *, fit: bool = True) -> None:
        super().__init__(watched, work)
        self.fit = fit
        self.fed = torch.empty(0)

    def meet(self, met: Met) -> None:
        """Refit a layer, or only put in what it gives."""
        layer = self.work.layers[met.name]
        inputs = inputs_of(
            self.work.task.model, layer, met.value.index_select(met.dim, layer.kept.to(met.value.device)), met.dim
        )
        self.fed = inputs
        if self.fit:
            super().meet(met)
        else:
            self.put(layer, met)

    def rows(self, layer: Layer, met: Met) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the cut layer is fed, and what the dense one gives."""
        target = rows_of(met.output, met.output.dim() + met.dim, layer.rows)
        return self.fed, target, target - self._given(layer)

    def put(self, layer: Layer, met: Met) -> None:
        """Write what the cut layer gives; outputs that it has not are left: nothing reads them."""
        channel = met.output.dim() + met.dim
        form = met.output.movedim(channel, -1).shape[:-1]
        given = self._given(layer).reshape(*form, -1).movedim(-1, channel).to(met.output.dtype)
        if layer.rows is None:
            met.output.copy_(given)
        else:
            met.output.index_copy_(channel, layer.rows.to(met.output.device), given)

    def _given(self, layer: Layer) -> Tensor:
        weight, bias = self.work.own[layer.name], self.work.own.get(bias_of(layer.name))
        flat = weight.flatten(1) if layer.dim else weight.T
        return F.linear(self.fed, flat.to(self.fed.dtype), None if bias is None else bias.to(self.fed.dtype))


class Lockstep(Refitting):
    """The cut network beside the dense one: each layer is to give what the dense network has at the same place.

    Where its output is added to a stream that is what is left to give: dense output + dense stream − own stream.
    """

    def __init__(self, watched: Mapping[int, str], work: RefitWork, dense: Answers) -> None:
        super().__init__(watched, work)
        self.dense = dense

    def rows(self, layer: Layer, met: Met) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the layer is fed, and what the dense network has where its output goes."""
        answer, channel = self.dense(layer.name), met.output.dim() + met.dim
        if answer is None:
            return None
        device = met.output.device
        target = rows_of(answer[0].to(device), channel, layer.rows)
        missing = target - rows_of(met.output, channel)
        if answer[1] is not None and met.other is not None:
            stream = rows_of(answer[1].to(device), channel, layer.rows)
            target, missing = target + stream, missing + (stream - rows_of(met.other, channel))
        return inputs_of(self.work.task.model, layer, met.value, met.dim), target, missing

    def put(self, layer: Layer, met: Met) -> None:
        """Compute the output anew."""
        met.output.copy_(met.again())


def rows_of(value: Tensor, channel: int, some: Tensor | None = None) -> Tensor:
    """A tensor as ``[positions, channels]``, in float32 or float64; some of its channels, if asked."""
    value = value if some is None else value.index_select(channel, some.to(value.device))
    value = value.movedim(channel, -1).flatten(0, -2)
    return value if value.dtype == torch.float64 else value.float()


def inputs_of(model: nn.Module, layer: Layer, value: Tensor, dim: int) -> Tensor:
    """What a layer contracts with its weight at each position, ``[positions, k]``, in float32 or float64.

    Args:
        model: The cut network, whose module says how a convolution runs.
        layer: Which.
        value: What the layer is fed.
        dim: Which dimension of that it contracts.
    """
    module = model.get_submodule(layer.name.rpartition(".")[0])
    if not isinstance(module, nn.Conv2d):
        return rows_of(value, value.dim() + dim)
    assert not isinstance(module.padding, str)
    return rows_of(F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride), 1)
