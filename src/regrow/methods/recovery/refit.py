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
one another at each layer; a network that keeps what it computes in its modules, or runs other layers for other data,
takes all in one. Memory: both networks, inputs and outputs of the present layer at all positions, what one batch needs
between two layers, and 8 (k² + k · out) bytes of sums, three times (with left-out sources: two times more than
there are sources), for the present layer with k inputs. Of a network that is read one block at a time, the present
block and the next one are in memory instead. A resumed run repeats the forward pass, but solves no layer twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.errors import ResourceError
from regrow.core.sources import Batch, device_of
from regrow.core.turns import StopRunError, Turns
from regrow.methods.recovery.bias import set_bias
from regrow.methods.recovery.fit_batches import join_all, keeps_state, read_state, regroup
from regrow.methods.recovery.paired_forward import run_in_thread
from regrow.methods.recovery.refit_layers import find_layers
from regrow.methods.recovery.refit_work import Layer, LayerOrderError, RefitWork
from regrow.methods.recovery.solve import RidgeCandidates
from regrow.methods.recovery.streamed_refit import (
    check_places,
    compare_outputs,
    refit_blocks,
    refit_paired_blocks,
)
from regrow.methods.recovery.streams import RefitInDense, RefitPaired, Refitting
from regrow.methods.recovery.task import Recovery, RecoveryTask
from regrow.streaming.network import Around
from regrow.surgery.compensate import bias_of
from regrow.training.freeze import freeze

CITATION = (
    "regrow's own; after the least-squares reconstruction of He et al., Channel Pruning, ICCV 2017, arXiv:1707.06168"
)
TARGETS = ("auto", "own", "dense", "residual")
CHOICES = ("held_out", "left_out_source")
CLOSE = 0.01
"""The largest relative root mean square error at which the dense network with the cut layers counts as the cut one."""


@dataclass(frozen=True)
class Settings:
    """Settings of ``refit``: the target of the least squares, the candidate ridges, and the held-out fraction.

    Args:
        target: ``own``: the output that the uncut layer would have on the cut network's stream; ``dense``: the dense
            network's value there; ``auto``: ``own`` where that can be computed, else ``dense``; ``residual``: ``dense``
            if the output of at least one fitted layer is added to another tensor directly, else ``auto``.
        ridges: The candidate ridges, as multiples of the mean diagonal of Σ x xᵀ.
        held_out: The fraction of the text on which the ridge is chosen.
        choose_on: ``held_out``: the ridge is chosen on held-out text of the same sources; ``left_out_source``: on each
            source in turn, left out of the fit; with a single source, on held-out text.
        shrinkages: The candidate factors, above 0 and at most 1, by which the least squares solution is shrunk towards
            the one that changes the bias alone; 1: it is not.
        standardize: Whether each input's weights are penalised in proportion to its own Σ x², as if inputs were scaled
            alike, and biases are not; otherwise in proportion to the mean, which few strong inputs dominate.
    """

    target: str = "auto"
    ridges: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    held_out: float = 0.125
    choose_on: str = "held_out"
    shrinkages: tuple[float, ...] = (1.0,)
    standardize: bool = False


def build(settings: Settings) -> Recovery:
    """Return the recovery that refits layers by least squares.

    Args:
        settings: Its settings.

    Raises:
        ValueError: If a setting is of no use.
    """
    _check(settings)
    return partial(refit, settings=settings)


def refit(task: RecoveryTask, settings: Settings) -> dict[str, object]:
    """Refit the layers of the cut network that read cut units, by least squares and in place.

    Args:
        task: The two networks, the cut and the text, in windows of one length.
        settings: The settings of the fit.

    Returns:
        ``layers``: per refitted layer :meth:`RidgeCandidates.record`: the error before and after, relative to the
        target's energy, and the ridge (0: it stayed); ``left_out``: name → why a layer was not refitted; ``target``:
        which was used; ``note``: why not the wanted one, or no left-out source, if not; ``choose_on``, if it was
        left-out sources. JSON data.

    Raises:
        ValueError: If a setting is of no use, the windows differ in shape, nothing that was cut can be refitted, or
            ``own`` cannot be worked out for this network.
    """
    _check(settings)
    parts, candidates = _arrange(task, settings)
    one = parts[0][0].to(device_of(task.model))
    trains = next(task.model.parameters()).requires_grad
    with freeze(task.model, task.dense), torch.no_grad():
        state = read_state(task.model)
        found = find_layers(task, one)
        layers, left_out = found.layers, found.left_out
        if left_out and not layers:
            name, why = next(iter(left_out.items()))
            raise ValueError(f"{name}, which reads what was cut, cannot be refitted: {why}; recover by distil")
        if task.streamed:
            check_places(task.streamed, layers)
        named = {layer.name: layer for layer in layers}
        batches = join_all(parts) if keeps_state(task.model, state) else regroup(parts)
        work = RefitWork(task, named, candidates, batches, dict(task.model.named_parameters()))
        work.changed = task.streamed.changed if task.streamed else None
        no_stream = settings.target == "residual" and bool(layers) and not found.added
        wanted = "auto" if no_stream else settings.target.replace("residual", "dense")
        problem = "" if wanted == "dense" else _explain_mismatch(work, left_out, one)
        if problem and wanted == "own":
            raise ValueError(f"{problem}; refit it with target=dense")
        target = "dense" if problem else wanted.replace("auto", "own")
        if task.streamed and target == "dense" and task.streamed.lacking:
            raise ResourceError(f"{problem or 'target=dense'}: {task.streamed.lacking}")
        biased = _with_biases(task.model, layers)
        work.own = dict(task.model.named_parameters())
        work.resume()
        joined = False
        if not work.done:
            joined = _refit(work, parts, target, biased)
    for name in biased:
        path, _, leaf = bias_of(name).rpartition(".")
        if name in work.refitted:
            task.model.get_parameter(bias_of(name)).requires_grad_(trains)
        else:
            setattr(task.model.get_submodule(path), leaf, None)
    notes = ["which layers run depends on the data, so that all of it ran in one batch"] if joined else []
    notes += [f"{problem}; fitted to what the dense network has there"] if problem else []
    if no_stream and not problem:
        notes.append("no fitted layer's output is added to a residual stream directly, so target=own")
    if settings.choose_on == "left_out_source" and not candidates.left_out:
        notes.append("there is one source alone, so the ridge was chosen on its held-out part")
    more: dict[str, object] = {"note": "; ".join(notes)} if notes else {}
    more |= {"choose_on": settings.choose_on} if candidates.left_out else {}
    return {"layers": work.records, "left_out": left_out, "target": target, **more}


def _arrange(task: RecoveryTask, settings: Settings) -> tuple[list[list[Batch]], RidgeCandidates]:
    """Return the batches of each part of the data, and what is tried for each layer."""
    left_out = settings.choose_on == "left_out_source" and len(task.sources) > 1
    if left_out:
        parts = [list(source) for source in task.sources]
    else:
        fit, held = task.parts(settings.held_out)
        parts = [[batch for part in fit for batch in part], held]
    return parts, RidgeCandidates(settings.ridges, settings.shrinkages, left_out, settings.standardize)


def _check(settings: Settings) -> None:
    """Raise ValueError if a setting is of no use."""
    if settings.target not in TARGETS or not settings.ridges or min(settings.ridges) < 0:
        given = f"target={settings.target!r}, ridges={settings.ridges}"
        raise ValueError(f"refit takes the target {' or '.join(TARGETS)}, and ridges from 0; got {given}")
    if settings.choose_on not in CHOICES or not all(0 < one <= 1 for one in settings.shrinkages or (0,)):
        given = f"choose_on={settings.choose_on!r}, shrinkages={settings.shrinkages}"
        raise ValueError(
            f"refit takes choose_on {' or '.join(CHOICES)}, and shrinkages above 0 and up to 1; got {given}"
        )


def _refit(work: RefitWork, parts: Sequence[Sequence[Batch]], target: str, biased: Sequence[str]) -> bool:
    """Refit all layers; returns whether the data had to run in one batch, since not all of them run every layer."""
    for batches in (work.batches, None):
        if batches is None:
            work.start_again(regroup(parts, most=1))
        try:
            _refit_batches(work, target, biased)
        except LayerOrderError as error:
            problem = str(error)
        else:
            return batches is None
    raise ValueError(f"{problem}, also in one batch; give data with the same arguments, or recover by distil")


def _refit_batches(work: RefitWork, target: str, biased: Sequence[str]) -> None:
    if work.task.streamed is not None:
        run = refit_blocks if target == "own" else refit_paired_blocks
        run(work, work.task.streamed, biased)
    elif target == "own":
        _refit_in_dense(work)
    else:
        _refit_paired(work)


def _refit_in_dense(work: RefitWork) -> None:
    dense = work.task.dense
    _run(work, dense, partial(RefitInDense, _watched(dense, work.layers), work))


def _refit_paired(work: RefitWork) -> None:
    task, waiting, batches = work.task, work.waiting, work.batches
    watched = _watched(task.dense, waiting)

    def run(around: Around, turns: Turns) -> None:
        def run_one(number: int) -> None:
            with around(number, watched):
                _run_batch(task.dense, batches[number].batch)

        turns.run(run_one)

    with run_in_thread(run, len(batches)) as dense:
        _run(work, task.model, partial(RefitPaired, _watched(task.model, waiting), work, dense=dense))


def _watched(model: nn.Module, names: Mapping[str, Any] | set[str]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters() if name in names}


def _run(work: RefitWork, model: nn.Module, mode: Callable[[int, Turns], Refitting]) -> None:
    """Run a network until its last layer is refitted; a user's interrupt first writes the layers done so far."""
    turns = Turns(len(work.batches))

    def run_one(number: int) -> None:
        own = mode(number, turns)
        with torch.no_grad():
            with own:
                _run_batch(model, work.batches[number].batch)
            own.finish()

    try:
        turns.run(run_one)
    except StopRunError:
        pass
    except KeyboardInterrupt:
        work.write()
        raise


def _run_batch(model: nn.Module, batch: Batch) -> Any:
    """Return what a network gives for a batch, which may be on another device."""
    there = batch.to(device_of(model))
    return there.run(model)


def _explain_mismatch(work: RefitWork, left_out: Mapping[str, str], batch: Batch) -> str:
    """Say why the dense network with the cut one's layers in it is not the cut network; empty if it is."""
    dense, model = work.task.dense, work.task.model
    for name, why in left_out.items():
        return f"{name}, which reads what was cut, cannot be refitted: {why}"
    if not work.layers:
        return ""
    if work.task.streamed is None:
        mode = RefitInDense(_watched(dense, work.layers), work, 0, Turns(1), fit=False)
        with mode:
            carried = _run_batch(dense, batch)
        mode.finish()
        own = batch.run(model)
    else:
        carried, own = compare_outputs(work, work.task.streamed, batch)
    for a, b in zip(tree_leaves(carried), tree_leaves(own), strict=False):
        if isinstance(a, Tensor) and a.is_floating_point() and a.shape == b.shape:
            away = float((a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt())
            close = CLOSE * (10 if a.dtype in (torch.float16, torch.bfloat16) else 1)
            if not away <= close:
                return (
                    "the network differs from the dense one in more than the layers that read what was cut (by "
                    f"{away:.2g} of its output: trained since, or units of a residual stream cut)"
                )
    return ""


def _with_biases(model: nn.Module, layers: Sequence[Layer]) -> list[str]:
    """Give zero biases to layers that can have one and have none; return the names of their weights."""
    added = []
    for layer in layers:
        path, _, leaf = layer.name.rpartition(".")
        module, weight = model.get_submodule(path), model.get_parameter(layer.name)
        if leaf == "weight" and "bias" in module._parameters and module._parameters["bias"] is None:
            set_bias(model, bias_of(layer.name), weight.new_zeros(weight.shape[1 - layer.dim]).detach())
            added.append(layer.name)
    return added
