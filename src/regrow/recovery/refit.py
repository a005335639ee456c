"""Refit: every layer that reads what was cut learns by least squares to give what it gave in the dense network.

W′ = W + D,  D = argmin Σ_t w_t |y_t − (W + D) x_t|² + ridge · mean(diag Σ w_t x_t x_tᵀ) · |D|²

Layers are refitted from the first to the last; x_t is what the layer is fed at position t in the cut network with all
layers before it refitted already, and y_t what the dense network has there. With ``target=sum`` that is what is left to
give where the output is added to a residual stream: y_t = (dense output + dense stream) − stream of the cut network, so
that a layer makes up for what the layers before it still miss. With ``target=output`` it is the dense layer's output.
Positions weigh w_t = 1 / (|dense sum or output|² + a tenth of its median), since a few positions carry activations that
are thousands of times larger, and a norm follows that makes all alike. The ridge is chosen per layer on the held-out
part of the text; a layer that no ridge brings closer there stays as it is. A bias goes along, and layers that can have
one get one. Where nothing was cut nothing is missing, and D = 0.

Two networks run once over all the text, in lockstep. Memory: both networks, the activations of all positions at one
layer of each (about 4 · positions · width of the widest layer · 4 bytes), and 8 (k² + k · out) bytes of sums, three
times, for the layer at hand with k inputs. A resumed run does the forward pass again, and solves no layer twice.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.recovery.bias import set_bias
from regrow.recovery.lockstep import Answers, Meetings, Met, StopRunError, answers
from regrow.recovery.solve import Sums, chosen
from regrow.recovery.task import Recovery, Stand, Task, device_of, resting
from regrow.sources import Batch
from regrow.surgery.compensate import bias_of, read_dim
from regrow.surgery.layout import layouts

CITATION = "after Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022, arXiv:2208.11580"
TARGETS = ("sum", "output")
SECONDS = 60.0
"""A stand is kept at least this often."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``refit``.

    Args:
        target: ``sum``: where a layer's output is added to a residual stream, the dense network's sum; ``output``:
            always its output.
        even: Let positions weigh by the size of their target; without it a few huge ones decide.
        ridges: What the ridge is chosen from, as shares of the mean diagonal.
        held_out: Which share of the text chooses it.
    """

    target: str = "sum"
    even: bool = True
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    held_out: float = 0.125


@dataclass(frozen=True)
class Layer:
    """A layer to refit.

    Args:
        name: Its weight.
        dim: In which dimension that reads.
        rows: Which of the dense layer's outputs are left.
    """

    name: str
    dim: int
    rows: Tensor | None


def build(settings: Settings) -> Recovery:
    """Least squares with these settings."""
    return partial(refit, settings=settings)


def refit(task: Task, settings: Settings) -> dict[str, Any]:
    """Refit the layers of the cut network that read what was cut.

    Args:
        task: The two networks, the cut and the text, in windows of one length.
        settings: How.

    Returns:
        ``layers``: per refitted layer the held-out error before and after, as a share of what was wanted, and the
        ridge (0: it stayed as it was); ``left_out``: name → why a layer was not refitted. JSON data.

    Raises:
        ValueError: If a setting is of no use, the windows differ in shape, or nothing that was cut can be refitted.
    """
    if settings.target not in TARGETS or not settings.ridges or min(settings.ridges) < 0:
        asked = f"target={settings.target!r}, ridges={settings.ridges}"
        raise ValueError(f"refit takes the target {' or '.join(TARGETS)}, and ridges from 0; got {asked}")
    fit, held = task.parts(settings.held_out)
    every = [*(batch for part in fit for batch in part), *held]
    device = device_of(task.model)
    batch, trains = joined(every).to(device), next(task.model.parameters()).requires_grad
    with resting(task.model, task.dense):
        layers, left_out = readers_of(task, every[0].to(device))
        if left_out and not layers:
            raise ValueError(f"no layer that reads what was cut can be refitted: {left_out}")
        added = _with_biases(task.model, layers)
        own = dict(task.model.named_parameters())
        share = sum(map(len, fit)) / len(every)
        work = _Refit(task, settings, {layer.name: layer for layer in layers}, share)
        work.resume(own)
        wide = {id(p): name for name, p in task.dense.named_parameters() if name in work.layers}
        with torch.no_grad(), answers(task.dense, batch.to(device_of(task.dense)), wide) as dense:
            work.run(batch, dense)
    for name in added:
        path, _, leaf = bias_of(name).rpartition(".")
        if name in work.changed:
            own[bias_of(name)].requires_grad_(trains)
        else:
            setattr(task.model.get_submodule(path), leaf, None)
    return {"layers": work.told, "left_out": left_out}


def readers_of(task: Task, batch: Batch) -> tuple[list[Layer], dict[str, str]]:
    """The layers that read what a plan cut, in the order of their names, and why others are left out.

    Args:
        task: The two networks and the cut.
        batch: What the cut network is called with, to see which layers it runs how often.
    """
    axes, lays = task.axes, layouts(task.axes, task.plan)
    names = {slot.name for key, c in task.plan.changes.items() if not c.idle for slot in axes[key].consumers()}
    own = dict(task.model.named_parameters())
    calls = _Calls({id(own[name]): name for name in names if name in own})
    with torch.no_grad(), calls:
        task.model(*batch.args, **batch.kwargs)
    calls.finish()
    layers, left_out = [], {}
    for name in sorted(names):
        dim = read_dim(axes, name)
        problem = _problem(task, name, dim, calls.times[name])
        if problem or dim is None:
            left_out[name] = problem
            continue
        rows = [lay.source for at, lay in lays.get(name, {}).items() if at != dim]
        layers.append(Layer(name, dim, rows[0] if rows else None))
    return layers, left_out


def joined(batches: Sequence[Batch]) -> Batch:
    """Several batches as one.

    >>> joined([Batch((torch.zeros(1, 3),)), Batch((torch.ones(2, 3),))]).args[0].shape
    torch.Size([3, 3])

    Raises:
        ValueError: If their inputs differ in more than their number.
    """

    def one(values: Sequence[Any]) -> Any:
        if not isinstance(values[0], Tensor):
            return values[0]
        shapes = {tuple(value.shape[1:]) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"refit needs windows of one length, and these have {sorted(shapes)[:3]}; cut them alike")
        return torch.cat(list(values))

    first = batches[0]
    args = tuple(one([batch.args[i] for batch in batches]) for i in range(len(first.args)))
    return Batch(args, {key: one([batch.kwargs[key] for batch in batches]) for key in first.kwargs})


class _Calls(Meetings):
    """Counts how often each watched layer runs."""

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__(watched)
        self.times: Counter[str] = Counter()

    def meet(self, met: Met) -> None:
        self.times[met.name] += 1


@dataclass
class _Refit:
    """The work on all layers; ``told`` grows by an entry per layer, in the order in which they are met."""

    task: Task
    settings: Settings
    layers: Mapping[str, Layer]
    share: float
    told: list[dict[str, Any]] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)

    def resume(self, own: Mapping[str, nn.Parameter]) -> None:
        """Put in what an earlier call solved."""
        if self.task.done is None:
            return
        self.told = [dict(row) for row in self.task.done.values["layers"]]
        self.changed = {row["weight"] for row in self.told if row["ridge"]}
        with torch.no_grad():
            for name, tensor in self.task.done.tensors.items():
                own[name].copy_(tensor)

    def run(self, batch: Batch, dense: Answers) -> None:
        """Run the cut network over all the text, and refit each layer when it is met."""
        own = dict(self.task.model.named_parameters())
        solved = {row["weight"] for row in self.told}
        mode = _Solving({id(own[name]): name for name in self.layers if name not in solved}, self, own, dense)
        if not mode.watched:
            return
        try:
            with mode:
                self.task.model(*batch.args, **batch.kwargs)
            mode.finish()
        except StopRunError:
            pass

    def stand(self, own: Mapping[str, nn.Parameter]) -> Stand:
        """How far it has got."""
        names = [name for weight in sorted(self.changed) for name in (weight, bias_of(weight)) if name in own]
        return Stand(
            len(self.told), {name: own[name].detach() for name in names}, {"layers": [dict(row) for row in self.told]}
        )


class _Solving(Meetings):
    """Refits each layer before its output is used."""

    def __init__(
        self, watched: Mapping[int, str], work: _Refit, own: Mapping[str, nn.Parameter], dense: Answers
    ) -> None:
        super().__init__(watched)
        self.work, self.own, self.dense, self.last = work, own, dense, time.monotonic()

    def meet(self, met: Met) -> None:
        work, task = self.work, self.work.task
        layer, answer = work.layers[met.name], self.dense(met.name)
        if answer is not None:
            before, after, ridge = self._solve(layer, met, *answer)
            work.told.append({"weight": met.name, "before": before, "after": after, "ridge": ridge})
            met.output.copy_(met.again())
            task.progress(len(work.told), len(work.layers), f"refitting, error {before:.3f} → {after:.3f}")
        done = len(work.told) == len(work.layers)
        if done or time.monotonic() - self.last > SECONDS:
            task.kept(work.stand(self.own))
            self.last = time.monotonic()
        if done:
            raise StopRunError

    def _solve(self, layer: Layer, met: Met, wanted: Tensor, stream: Tensor | None) -> tuple[float, float, float]:
        """Change a layer; what the held-out rows missed before and miss after it, and the ridge."""
        settings, share = self.work.settings, self.work.share
        weight, bias = self.own[layer.name], self.own.get(bias_of(layer.name))
        inputs, target, missing = self._rows(layer, met, wanted, stream)
        if bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
        if settings.even:
            power = target.square().mean(1)
            scale = (power + 0.1 * power.median()).clamp_min(1e-30).rsqrt()[:, None]
            inputs, target, missing = inputs * scale, target * scale, missing * scale
        cut = round(len(inputs) * share)
        fit, held = (Sums.of(inputs[at], missing[at], target[at]) for at in (slice(0, cut), slice(cut, None)))
        change, ridge, left = chosen(fit, held, settings.ridges)
        if change is not None:
            self.work.changed.add(layer.name)
            own = change if bias is None else change[:-1]
            weight.copy_(weight.double() + (own.T if layer.dim else own).reshape(weight.shape))
            if bias is not None:
                bias.copy_(bias.double() + change[-1])
        whole = max(held.wanted, 1e-300)
        return held.missing / whole, left / whole, ridge

    def _rows(self, layer: Layer, met: Met, wanted: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer is fed, ``[rows, k]``, what is wanted where its output goes, and what of it is missing."""
        channel = met.output.dim() + met.dim

        def rows(value: Tensor) -> Tensor:
            value = value.movedim(channel, -1).flatten(0, -2)
            return value if value.dtype == torch.float64 else value.float()

        def dense(value: Tensor) -> Tensor:
            value = value if layer.rows is None else value.index_select(channel, layer.rows.to(value.device))
            return rows(value.to(met.output.device))

        target, missing = dense(wanted), dense(wanted) - rows(met.output)
        if self.work.settings.target == "sum" and stream is not None and met.other is not None:
            target, missing = target + dense(stream), missing + (dense(stream) - rows(met.other))
        module = self.work.task.model.get_submodule(layer.name.rpartition(".")[0])
        value = met.value
        if isinstance(module, nn.Conv2d):
            assert not isinstance(module.padding, str)
            value = F.unfold(value, module.kernel_size, module.dilation, module.padding, module.stride)
            return value.transpose(1, 2).flatten(0, 1).to(target.dtype), target, missing
        return value.movedim(met.dim, -1).flatten(0, -2).to(target.dtype), target, missing


def _with_biases(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Give zero biases to layers that can have one and have none; the names of their weights."""
    added = []
    for layer in layers:
        path, _, leaf = layer.name.rpartition(".")
        module, weight = model.get_submodule(path), model.get_parameter(layer.name)
        if leaf == "weight" and "bias" in module._parameters and module._parameters["bias"] is None:
            set_bias(model, bias_of(layer.name), weight.new_zeros(weight.shape[1 - layer.dim]).detach())
            added.append(layer.name)
    return added


def _problem(task: Task, name: str, dim: int | None, calls: int) -> str:
    """Why a layer cannot be refitted; empty if it can."""
    ties = task.axes.ties
    if name in ties or name in ties.values() or name not in dict(task.model.named_parameters()):
        return "its weight is shared"
    if dim is None:
        return "it reads several axes, or one in several places"
    module, weight = task.model.get_submodule(name.rpartition(".")[0]), task.model.get_parameter(name)
    if calls != 1:
        return f"its weight is seen at work {calls} times in one pass"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
        return "" if plain else "a convolution in groups, or padded otherwise than with zeros"
    if weight.dim() != 2 or dim not in (0, 1) or isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Embedding):
        return f"a {type(module).__name__} is neither a linear map nor a two-dimensional convolution"
    return ""
