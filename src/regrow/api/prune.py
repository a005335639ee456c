"""``regrow.prune``: from a network and data to a smaller network and the plan that made it."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.amounts import Measure, Target, parse_share
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, names_generated, read_inputs
from regrow.api.quality import measure_run
from regrow.api.runs import Destination, complete, describe_inputs, loaded_of, name_of, run_of
from regrow.api.streamed import open_within, prune_streamed
from regrow.axes import AxisGraph
from regrow.budget import Budget
from regrow.commands.calibration import calibrate, open_journal
from regrow.commands.cutting import CutRun
from regrow.commands.pruning import build_pruner, check_pruning, collect_evidence, with_timing
from regrow.commands.reconstruction import build_reconstruction, check_batches
from regrow.commands.score_summary import write_scores
from regrow.errors import InputError
from regrow.evaluation import Perplexity
from regrow.evidence import Need
from regrow.methods.pruning.pruner import Pruner, check_objective, plan_cut, with_modules
from regrow.methods.recovery.fit_batches import check_lengths
from regrow.nets.precision import autocasting
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.progress_bar import visible
from regrow.run_folder import RunFolder
from regrow.scoring import weights_of
from regrow.settings.prune import Settings
from regrow.settings.training import check_combination
from regrow.sources import preserve_random_state
from regrow.store.building import describe_origin


def prune(
    model: ModelLike,
    data: Any = None,
    *,
    validation: Any = None,
    method: str = "flap",
    keep: float | str | None = None,
    target: str | Target = "",
    smaller: str | float | None = None,
    example: Any = None,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: str = "float32",
    memory: str = "",
    axes: AxisGraph | None = None,
    settings: Mapping[str, Any] | None = None,
    reconstruct: bool | Mapping[str, Any] | None = False,
    out: str | Path | None = None,
    track: str = "",
    progress: Progress = silent,
    **budget: Any,
) -> tuple[nn.Module, Plan]:
    """Prune a network in one call: trace it, measure importance, choose units, cut it, and measure BatchNorms again.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        data: Data to measure importance on: a ``DataLoader``, tensors (inputs, labels), a data set, a path, strings, or
            a dict of such by name; several text domains carry over better. Methods that score by weights need none.
        validation: With ``out``: labelled data on which quality is measured before and after; ``None``: ``data``.
        method: One of ``regrow.methods.METHODS``.
        keep: The fraction (0.8, ``"80%"``) that stays of the weights of linear layers and convolutions (of a language
            model: of its decoder), or of another ``measure``; ``None``: 0.8, unless there is a target.
        target: A size instead of a fraction: ``"params=100M"`` (all parameters), ``"macs=2G"``, ``"bytes=200M"``,
            ``"kv_cache=50M@4096"``, or ``"ms=120"`` of the example's pass on this device; or a share of what the
            network has, ``"params=70%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        example: The input with which the network is traced: a tensor, a tuple or a dict; ``None``: the first batch.
        loss: The loss of methods that measure gradients: a function (what the network returned, labels) → scalar, or
            ``"classification"``, ``"next-token"``, ``"multi-label"``, ``"regression"``, ``"own"``; ``None``: what fits
            the labels.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16.
        memory: With ``out``: how much memory the call may use, such as ``"4GiB"``. A language model that does not fit,
            given by its name or as a folder, is read one block at a time; the network that is returned then has no
            numbers, which are in ``out``. Empty: it is loaded whole.
        axes: The network's axes, if they are known (:func:`regrow.declare`); the network is then not traced.
        settings: Settings of the method that differ from its defaults.
        reconstruct: Whether layers that read cut units are fitted to dense outputs by least squares after the cut, on
            all of the data, which are in memory; or settings of ``refit`` that differ from the defaults of this fit.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
        progress: Called with (batches done, batches in all, what is being done).
        **budget: More fields of :class:`regrow.budget.Budget`: ``measure``, ``only``, ``exclude``, ``round_to``,
            ``regular``.

    Returns:
        The same model, smaller, and the plan. Warnings tell of a source that was split, and of BatchNorms without data.

    Raises:
        ValueError: If the method is unknown, the budget cannot be met, or there is nothing to trace or measure with.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> net, plan = prune(net, (torch.randn(64, 4), torch.randint(2, (64,))), method="llm_pruner", keep=0.5)
    >>> net[0].out_features
    4
    """
    if torch.is_inference_mode_enabled():
        raise InputError("prune would make weights that no gradient can reach in inference mode; use torch.no_grad()")
    place = Destination(out, track).checked(data=data, validation=validation)
    pruner, limits = build_pruner(method, settings or {}), _budget(keep, target, smaller, budget)
    check_combination(precision, measure=limits.measure)
    given: Any = {"loss": loss, "tokenizer": tokenizer, "batch_size": batch_size, "device": device}
    given |= {"example": example if axes is None else axes.example, "precision": precision, "validation": validation}
    call = _PruneCall(method, settings or {}, pruner, limits, place, memory, _check_reconstruct(reconstruct), progress)
    return _carry_out(call, model, data, given, axes)


def _check_reconstruct(reconstruct: object) -> bool | Mapping[str, Any]:
    """Return whether to reconstruct, or its settings; raise InputError for anything else."""
    if reconstruct is None:
        return False
    if isinstance(reconstruct, bool | Mapping):
        return reconstruct
    raise InputError(f"reconstruct must be True, False or a dict of settings of refit, got {reconstruct!r:.60}")


@dataclass(frozen=True)
class _PruneCall:
    """What a call of :func:`prune` asks for, checked."""

    method: str
    settings: Mapping[str, Any]
    pruner: Pruner
    limits: Budget
    place: Destination
    memory: str
    reconstruct: bool | Mapping[str, Any]
    progress: Progress


def _carry_out(
    call: _PruneCall, model: ModelLike, data: Any, given: dict[str, Any], axes: AxisGraph | None
) -> tuple[nn.Module, Plan]:
    """Read the network and the data, as ``given`` says, and prune."""
    limits, place, progress, precision = call.limits, call.place, call.progress, given["precision"]
    loss, described = name_of(given["loss"]), partial(_describe, call.method, call.settings, limits)
    if call.memory:
        if names_generated(data):
            raise InputError(
                f"memory={call.memory!r} does not count what generating text needs, got data='generated'; leave out "
                f"memory, or run `regrow prune --source generated --memory {call.memory}`"
            )
        needs = _needs(call.pruner, limits, given, axes, call.reconstruct)
        read = {name: given[name] for name in ("loss", "tokenizer", "batch_size")}
        read |= {"what": "pruning", "pruner": call.pruner, "limits": limits}
        streamed = open_within(model, data, call.memory, needs, progress, **read)
        if streamed is not None:
            settings = described(streamed.inputs, precision, None)
            return prune_streamed(streamed, call.pruner, limits, place, settings, str(model), loss, progress)
    inputs = read_inputs(model, data, **given, progress=progress, generates=True)
    check_objective(call.pruner, (), inputs.objective)
    axes, fit = inputs.trace() if axes is None else axes, _reconstruction(call.reconstruct, inputs)
    axes = with_modules(call.pruner, inputs.model, axes)
    work = _Pruning(inputs, axes, call.pruner, precision, progress, fit)
    if place.out is None:
        return inputs.model, _prune(work, with_timing(inputs.model, axes, limits, progress=progress))
    return inputs.model, _prune_in_folder(work, limits, place, described(inputs, precision, fit), model, loss)


def _needs(
    pruner: Pruner,
    limits: Budget,
    given: Mapping[str, Any],
    axes: AxisGraph | None,
    reconstruct: bool | Mapping[str, Any],
) -> dict[str, bool]:
    """Return what of a call needs the whole network in memory → whether the call has it."""
    device, precision = given["device"], given["precision"]
    return {
        "a method that computes gradients of all weights": Need.GRADIENTS in pruner.needs,
        "a method that computes gradients of masks": Need.FISHER in pruner.needs,
        "a method that runs the masked network": pruner.runs_network,
        "reconstruct=": reconstruct is not False,
        "a target in ms": limits.measure == Measure.TIME,
        "axes=": axes is not None,
        "validation=": given["validation"] is not None,
        "example=": axes is None and given["example"] is not None,
        f"device={device}": device not in (None, "cpu"),
        f"precision={precision}": precision != "float32",
    }


def _reconstruction(reconstruct: bool | Mapping[str, Any], inputs: Inputs) -> dict[str, Any] | None:
    """Return the settings of the reconstruction that differ from the defaults; ``None`` if none is wanted."""
    if reconstruct is False:
        return None
    settings = dict(reconstruct) if isinstance(reconstruct, Mapping) else {}
    build_reconstruction(settings, [source.name for source in inputs.sources])
    if not inputs.sources:
        raise InputError("reconstruct fits on data; give data, for example a DataLoader")
    check_batches(inputs.sources, settings)
    with preserve_random_state(*(one for source in inputs.sources for one in source.generators)):
        check_lengths(chain.from_iterable(inputs.sources))
    return settings


@dataclass(frozen=True)
class _Pruning:
    """What is pruned, and how."""

    inputs: Inputs
    axes: AxisGraph
    pruner: Pruner
    precision: str
    progress: Progress
    reconstruct: Mapping[str, Any] | None = None


def _prune(work: _Pruning, limits: Budget, folder: RunFolder | None = None) -> Plan:
    """Measure importance, choose the units that stay, and cut the network; return the plan."""
    inputs, axes, pruner, progress = work.inputs, work.axes, work.pruner, work.progress
    depth = 4 if folder is None else 5  # of the call of prune
    check_pruning(pruner, axes, limits, inputs.sources)
    more: Any = {"objective": inputs.objective, "units": limits.units(axes)}
    loaded = loaded_of(inputs)
    with torch.enable_grad(), autocasting(inputs.model, work.precision):
        if folder is None:
            evidence, saved = collect_evidence(inputs.model, axes, pruner, inputs.sources, progress, **more), {}
        else:
            evidence, key = calibrate(folder, loaded, axes, pruner, inputs.sources, progress, **more)
            saved = open_journal(folder, key)
        for note in evidence.notes:
            warnings.warn(note, stacklevel=depth)
        saved |= {"progress": progress, "objective": inputs.objective}
        cut = plan_cut(pruner, inputs.model, axes, limits, evidence, **saved)
    if folder is not None:
        write_scores(folder, weights_of(inputs.model), axes, cut.plan, cut.scores, evidence)
        if cut.findings:
            folder.write_findings(folder.run()["settings"]["method"], cut.findings)
    run = CutRun(
        loaded,
        inputs.sources,
        work.precision,
        folder,
        partial(_measure, work, folder),
        fit=work.reconstruct,
        fitted_on=lambda: inputs.sources,
        progress=progress,
    )
    _, note = run.carry_out(axes, cut.plan, limits)
    if note:
        warnings.warn(note, stacklevel=depth)
    return cut.plan


def _measure(work: _Pruning, folder: RunFolder | None, axes: AxisGraph, name: str) -> dict[str, Perplexity]:
    return measure_run(folder, work.inputs, axes, name, work.precision, work.progress) if folder else {}


def _prune_in_folder(
    work: _Pruning, limits: Budget, place: Destination, settings: Settings, model: ModelLike, loss: str
) -> Plan:
    """Prune and write the run, or resume it."""
    inputs, start = work.inputs, time.perf_counter()
    known = RunFolder(begun).run().get("timing") if (begun := place.begun()) else None
    limits = with_timing(inputs.model, work.axes, limits, known=known, progress=work.progress)
    check_pruning(work.pruner, work.axes, limits, inputs.sources)
    data = describe_inputs(place, inputs)
    with (
        run_of(place, "prune", settings, model, loaded_of(inputs), data=data, loss=loss) as folder,
        visible(work.progress) as shown,
    ):
        if limits.timing:  # another measurement would be another plan
            folder.update(timing=limits.timing.record())
        plan = _prune(replace(work, progress=shown), limits, folder)
        complete(folder, prune=time.perf_counter() - start)
    return plan


def _describe(
    method: str,
    given: Mapping[str, Any],
    limits: Budget,
    inputs: Inputs,
    precision: str,
    reconstruct: Mapping[str, Any] | None,
) -> Settings:
    """Return the settings of the command that say what a call does."""
    return Settings(
        describe_origin(inputs.model).name,
        method,
        dict(given),
        keep=None if limits.target else limits.keep,
        measure=str(limits.measure),
        target=str(limits.target or ""),
        regular=limits.regular,
        only=tuple(limits.only),
        exclude=tuple(limits.exclude),
        marks=tuple(sorted(limits.marks)),
        round_to=limits.round_to,
        precision=precision,
        reconstruct=reconstruct is not None,
        reconstruct_settings=reconstruct or {},
    )


def _budget(
    keep: float | str | None, target: str | Target, smaller: str | float | None, more: Mapping[str, Any]
) -> Budget:
    """Return the budget that is given in one of three ways."""
    if unknown := more.keys() - {"measure", "only", "exclude", "round_to", "regular", "marks", "timing"}:
        raise TypeError(
            f"prune has no argument {min(unknown)!r}; the size is given by keep=0.8, smaller='20%' or "
            "target='macs=2G', and limited by measure, only, exclude, round_to, regular"
        )
    given = {"keep": keep, "target": target or None, "smaller": smaller}
    names = [f"{name}={value}" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"keep, target and smaller exclude each other, got {' and '.join(names)}; give one of them")
    if smaller is not None:
        return Budget(target=Target.smaller(parse_share(str(smaller))), **more)
    if target:
        return Budget(target=Target.parse(str(target)), **more)
    return Budget(0.8 if keep is None else parse_share(str(keep)), **more)
