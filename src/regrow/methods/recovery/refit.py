"""Refit: every layer that reads units that were cut is fitted by least squares to do without them.

W′ = W + D,  D = argmin Σ_t |y_t − (W + D) x_t|² + ridge · mean(diag Σ x_t x_tᵀ) · |D|²

Layers are refitted from the first to the last; x_t is the layer's input at position t in the cut network, with all
layers before it refitted already. There are two targets:

* ``own``: y_t is the output that the uncut layer would have, on the stream of the cut network.
* ``dense``: y_t is the dense network's value, on its own stream, where the output goes. Where the output is added to
  another tensor, as to a residual stream: (dense output + dense tensor) − tensor of the cut network, so that a layer
  makes up for what the layers before it still miss. It cannot where a norm or a factor follows the layer (Gemma 3).

On SmolLM2-135M ``own`` recovers more from 8,192 tokens, above all on text domains that it was not fitted on: the error
of the layers before can mostly not be predicted from a layer's inputs. It needs a network that equals the dense one but
for layers that read cut units: not one that was trained since, or that lost units of a residual stream under norms.

The ridge is chosen per layer: on the held-out part of the text; or, with ``choose_on=left_out_source``, where the mean
error on a source that was left out of the fit is least, so that the layers do well on text of other domains too. Sums
over positions are kept per source, so that leaving one out takes no other pass. A shrinkage below 1 moves the solution
towards the one that changes the bias alone. A layer that no candidate brings closer to its target is not changed.
Biases are fitted too, and layers that can have one get one. Where nothing was cut, D = 0.

All the text runs through the network once, in batches of at least 2,048 tokens (at most 16 batches) that wait for
one another at each layer; a network that keeps what it computes in its modules takes all in one. Memory: both networks,
inputs and outputs of the present layer at all positions, what one batch needs between two layers, and
8 (k² + k · out) bytes of sums, three times (with left-out sources: two times more than there are sources), for the
present layer with k inputs. Of a network that is read one block at a time, the present block and the next one are in
memory instead. A resumed run repeats the forward pass, but solves no layer twice.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.errors import ResourceError
from regrow.core.sources import Batch, device_of
from regrow.methods.recovery import Recovery, RecoveryTask
from regrow.methods.recovery.refit_work import (
    MAX_BATCHES,
    Layer,
    LayerOrderError,
    RefitWork,
    keeps_state,
    merge_batches,
    read_state,
)
from regrow.methods.recovery.solve import RidgeCandidates
from regrow.methods.recovery.streams import check_in_blocks, compute_outputs, count_calls, refit_layers
from regrow.settings.constraints import OneOf, OpenFraction, check_constraints
from regrow.surgery.compensate import bias_of, consumed_dim
from regrow.surgery.layout import plan_layouts
from regrow.training.hooks import freeze

CITATION = (
    "regrow's own; after the least-squares reconstruction of He et al., Channel Pruning, ICCV 2017, arXiv:1707.06168"
)
# The largest relative root mean square error at which the dense network with the cut layers counts as the cut one.
CLOSE = 0.01
UNFIT = (
    "it is not a linear layer, or a convolution without groups padded with zeros, that runs once per pass and reads "
    "one axis by a weight of its own"
)


@dataclass(frozen=True)
class Settings:
    """Settings of ``refit``: the target of the least squares, the candidate ridges, and the held-out fraction.

    Args:
        target: ``own``: the output that the uncut layer would have on the cut network's activations; ``dense``: the
            dense network's value there; ``auto``: ``own`` where that can be computed, else ``dense``; ``residual``:
            ``dense`` if the output of at least one fitted layer is added to another tensor directly, else ``auto``.
        ridges: The candidate ridges, as multiples of the mean diagonal of Σ x xᵀ.
        held_out: The fraction of the text on which the ridge is chosen.
        choose_on: ``held_out``: the ridge is chosen on held-out text of the same sources; ``left_out_source``: on each
            source in turn, left out of the fit; with a single source, on held-out text.
        shrinkages: The candidate factors, above 0 and at most 1, by which the least squares solution is shrunk towards
            the one that changes the bias alone; 1: it is not.
    """

    target: Annotated[str, OneOf("auto", "own", "dense", "residual")] = "auto"
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_out: OpenFraction = 0.125
    choose_on: Annotated[str, OneOf("held_out", "left_out_source")] = "held_out"
    shrinkages: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        check_constraints(self)
        if not self.ridges or min(self.ridges) < 0:
            raise ValueError(f"ridges must be numbers from 0, got {self.ridges}; for example ridges=0.01,0.1")
        if not self.shrinkages or not all(0 < factor <= 1 for factor in self.shrinkages):
            raise ValueError(f"shrinkages must be above 0 and up to 1, got {self.shrinkages}; for example 0.9,1")


def build(settings: Settings) -> Recovery:
    """Return the recovery that refits layers by least squares."""
    return partial(refit, settings=settings)


def refit(task: RecoveryTask, settings: Settings) -> dict[str, object]:
    """Refit the layers of the cut network that read cut units, by least squares and in place.

    Return a summary as JSON data: a record per layer, the layers that were left out, and the target. Raise ValueError
    if no layer can be refitted, or ResourceError if that needs both networks in memory.
    """
    left_out_source = settings.choose_on == "left_out_source" and len(task.sources) > 1
    candidates = RidgeCandidates(settings.ridges, settings.shrinkages, left_out_source)
    if left_out_source:
        parts = [list(source) for source in task.sources]
    else:
        fit, held = task.split_sources(settings.held_out)
        parts = [[batch for part in fit for batch in part], held]
    first = parts[0][0].to(device_of(task.model))
    requires_grad = next(task.model.parameters()).requires_grad  # before freeze: that of new biases
    with freeze(task.model, task.dense), torch.no_grad():
        state = read_state(task.model)
        layers, left_out, added = find_layers(task, first)
        if left_out and not layers:
            raise ValueError(f"{_explain_first(left_out)}; recover by distil")
        if task.streamed:
            check_in_blocks(task.streamed, layers)
        # Batches in turns would take from each other what a forward pass keeps in modules.
        batches = merge_batches(parts, 1 if keeps_state(task.model, state) else MAX_BATCHES)
        parameters = dict(task.model.named_parameters())
        work = RefitWork(task, {layer.name: layer for layer in layers}, candidates, batches, parameters)
        no_stream = settings.target == "residual" and bool(layers) and not added
        requested = "auto" if no_stream else settings.target.replace("residual", "dense")
        problem = "" if requested == "dense" else _explain_mismatch(work, left_out, first)
        if problem and requested == "own":
            raise ValueError(f"{problem}; refit it with target=dense")
        target = "dense" if problem else requested.replace("auto", "own")
        if task.streamed and target == "dense":
            raise ResourceError(
                f"{problem or 'target=dense'}: fitting to what the dense network has needs both networks in memory; "
                "give more --memory"
            )
        biased = _add_biases(task.model, layers)
        work.parameters = dict(task.model.named_parameters())
        work.resume()
        try:
            if not work.done:
                refit_layers(work, target, added=biased)
        except LayerOrderError as error:
            raise ValueError(f"{error}: which layers run depends on the data; recover by distil") from None
    for name in biased:
        path, _, leaf = bias_of(name).rpartition(".")
        if name in work.refitted:
            task.model.get_parameter(bias_of(name)).requires_grad_(requires_grad)
        else:  # the layer is not changed: it needs no bias
            setattr(task.model.get_submodule(path), leaf, None)
    notes = [f"{problem}; fitted to what the dense network has there"] if problem else []
    if no_stream and not problem:
        notes.append("no fitted layer's output is added to a residual stream directly, so target=own")
    if settings.choose_on == "left_out_source" and not left_out_source:
        notes.append("there is one set of data, so the strength of the fit was chosen on a part held out of it")
    summary: dict[str, object] = {"layers": work.records, "left_out": left_out, "target": target}
    if notes:
        summary["note"] = "; ".join(notes)
    if left_out_source:
        summary["choose_on"] = settings.choose_on
    return summary


def find_layers(task: RecoveryTask, batch: Batch) -> tuple[list[Layer], dict[str, str], bool]:
    """Return (layers that read cut units and can be refitted; weight → why another cannot; whether any is added).

    The last is whether at least one of these layers has an output that is added to another tensor as it is. The cut
    network runs on ``batch`` to find that.
    """
    axes, layouts = task.axes, plan_layouts(task.axes, task.plan)
    names = {slot.name for key, c in task.plan.changes.items() if not c.idle for slot in axes[key].consumers()}
    times, added = count_calls(task, names, batch)
    layers, left_out = [], {}
    for name in sorted(names):
        dim = consumed_dim(axes, name)
        if dim is None or not _can_refit(task, name, times[name]):
            left_out[name] = UNFIT
            continue
        rows = [layout.source for other, layout in layouts[name].items() if other != dim]
        layers.append(Layer(name, dim, layouts[name][dim].source, rows[0] if rows else None))
    return layers, left_out, any(added[layer.name] for layer in layers)


def _can_refit(task: RecoveryTask, name: str, calls: int) -> bool:
    """Whether the layer of the weight ``name``, which runs ``calls`` times per pass, is no case of ``UNFIT``."""
    ties = task.axes.ties
    is_shared = name in ties or name in ties.values() or name not in dict(task.model.named_parameters())
    if is_shared or calls != 1:
        return False
    module, weight = task.model.get_submodule(name.rpartition(".")[0]), task.model.get_parameter(name)
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and not isinstance(module.padding, str) and module.padding_mode == "zeros"
    return weight.dim() == 2 and not isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.Embedding)


def _explain_first(left_out: Mapping[str, str]) -> str:
    """Return why the first of the layers that are left out (weight → reason) cannot be refitted."""
    name, why = next(iter(left_out.items()))
    return f"{name}, which reads what was cut, cannot be refitted: {why}"


def _explain_mismatch(work: RefitWork, left_out: Mapping[str, str], batch: Batch) -> str:
    """Return why the cut network is not the dense one with its own layers put in; ``""`` if it nearly is.

    ``left_out``: weight → why its layer cannot be refitted; ``batch``: both networks run on it.
    """
    if left_out:
        return _explain_first(left_out)
    if not work.layers:
        return ""
    hybrid, cut = compute_outputs(work, batch)
    is_half = work.task.precision != "float32"
    for a, b in zip(tree_leaves(hybrid), tree_leaves(cut), strict=False):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape:
            error = float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())
            largest = CLOSE * (10 if a.dtype in (torch.float16, torch.bfloat16) or is_half else 1)
            if not error <= largest:  # NaN, too
                return (
                    "the network differs from the dense one in more than the layers that read what was cut (by "
                    f"{error:.2g} of its output: trained since, or units of a residual stream cut)"
                )
    return ""


def _add_biases(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Give zero biases without gradients, in place, to layers whose bias is ``None``; return their weights' names."""
    added = []
    for layer in layers:
        path, _, leaf = layer.name.rpartition(".")
        module, weight = model.get_submodule(path), model.get_parameter(layer.name)
        if leaf == "weight" and "bias" in module._parameters and module._parameters["bias"] is None:
            zeros = weight.new_zeros(weight.shape[1 - layer.dim]).detach()
            module.bias = nn.Parameter(zeros, requires_grad=False)
            added.append(layer.name)
    return added
