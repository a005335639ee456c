"""``regrow.prune``: from a network and data to a smaller network and the plan that made it."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.api.call import Call
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, Precision
from regrow.core.amounts import parse_share
from regrow.core.axes import AxisGraph, Mark
from regrow.core.errors import InputError
from regrow.core.objectives import NEXT_TOKEN
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, preserve_random_state
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.progress_bar import ensure_progress
from regrow.jobs.prune import PruneInputs, prune_network
from regrow.jobs.pruning_inputs import take_for_fit
from regrow.jobs.recording import ActiveRun
from regrow.jobs.run_networks import WholeNetwork
from regrow.methods.recovery.refit_work import check_lengths
from regrow.settings.prune import DISTILLATION, Settings, choose_defaults


def prune(
    model: ModelLike,
    data: Any = None,
    *,
    validation: Any = None,
    method: str = "",
    keep: float | None = None,
    target: str = "",
    smaller: str | float | None = None,
    example: Any = None,
    loss: LossLike = None,
    tokenizer: Any = None,
    batch_size: int = 32,
    device: DeviceLike = None,
    precision: Precision = "float32",
    axes: AxisGraph | None = None,
    only: Sequence[str] = (),
    exclude: Sequence[str] = (),
    marks: Iterable[Mark] = (Mark.NEUTRAL,),
    round_to: int | None = None,
    regular: bool = False,
    settings: Mapping[str, Any] | None = None,
    reconstruct: bool | None = None,
    time: Literal["quick", "minutes", "hour", "night"] = "minutes",
    seed: int = 0,
    out: str | Path | None = None,
    progress: Progress = silent,
) -> tuple[nn.Module, Plan]:
    """Prune a network in one call: trace it, measure importance, choose units, cut it, and measure BatchNorms again.

    Args:
        model: The network, changed in place; or a model's name or a run folder, which is loaded.
        data: Data to measure importance on: a ``DataLoader``, tensors, a data set, a path, strings, or a dict of such.
        validation: With ``out``: labelled data on which quality is measured before and after; ``None``: ``data``.
        method: One of ``regrow.methods.METHODS``; empty: chosen by the kind of network and data.
        keep: The fraction of the weights of linear layers and convolutions. This, ``target`` or ``smaller`` is needed.
        target: The largest allowed size: ``"params=100M"`` (all parameters), ``"macs=2G"``, ``"bytes=200M"``,
            ``"kv_cache=50M@4096"``, ``"ms=120"`` (the example's pass on this device), or a share, ``"params=70%"``.
        smaller: The share of all parameters that is removed: ``"30%"`` or 0.3 is the target ``"params=70%"``.
        example: The input with which the network is traced: a tensor, tuple or dict; ``None``: two rows of the data.
        loss: A function (what the network returned, labels) → scalar, or ``"next-token"``, …; ``None``: by the labels.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16.
        axes: The network's axes, if they are known; it is then not traced.
        only: Patterns of tensor names, such as ``"mlp"``: axes are cut if all their tensors match one; empty: all.
        exclude: Patterns of tensor names; axes with a tensor that matches one are left uncut.
        marks: Marks of the axes that are cut; neutral: a cut equals units set to 0.
        round_to: Widths are multiples of this number where an axis has that many units; ``None``: 1.
        regular: Whether every block gets the same widths.
        settings: Settings of the method.
        reconstruct: Whether layers that read cut units are fitted to dense outputs by least squares after the cut.
        time: The uncut language model teaches the cut one on 0, 2¹⁴, 2¹⁸ or 2²¹ tokens (minutes: without ``method``).
        seed: The random seed of methods that draw, and of training.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        progress: Called with (batches done, batches in all, what is being done).

    Returns:
        The network, smaller, and the plan of the cut. Warnings tell of split sources and of stale BatchNorms.

    Raises:
        ValueError: If the method is unknown, the budget cannot be met, or there is nothing to trace or measure with.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> prune(net, (torch.randn(64, 4), torch.randint(2, (64,))), method="llm_pruner", keep=0.5)[0][0].out_features
    4
    """
    if torch.is_inference_mode_enabled():
        raise InputError("prune would make weights that no gradient can reach in inference mode; use torch.no_grad()")
    call = Call(model, data, validation, example, loss, tokenizer, batch_size, device, precision, axes, out)
    call = call.with_generators(data=data, validation=validation)
    config = Settings(call.name, method, dict(settings or {}), only=tuple(only), exclude=tuple(exclude))
    config = replace(config, marks=tuple(sorted(map(str, marks))), round_to=round_to, regular=regular, seed=seed)
    config = replace(_with_size(config, keep, target, smaller), precision=precision, reconstruct=reconstruct, time=time)
    with ensure_progress(progress) as bar:
        result = prune_network(config, partial(_open_inputs, call, config), call.start_run("prune", bar))
    for line in result.warnings:
        warnings.warn(line, stacklevel=2)
    return result.loaded.model, result.plan


def _with_size(config: Settings, keep: float | None, target: str, smaller: str | float | None) -> Settings:
    """Return a copy of the settings with the size, given in one of three ways; InputError for none or several."""
    sizes = {"keep": keep, "target": target or None, "smaller": smaller}
    arguments = [f"{name}={value}" for name, value in sizes.items() if value is not None]
    if len(arguments) > 1:
        got = " and ".join(arguments)
        raise InputError(f"keep, target and smaller exclude each other, got {got}; give one of them")
    if not arguments:
        raise InputError("say how much stays: keep=0.8 of the weights, smaller='20%' or target='params=100M'")
    share = None if smaller is None else parse_share(str(smaller))
    return replace(config, keep=keep, target=target, smaller=share)


def _find_kind(inputs: Inputs) -> str:
    """Return the kind of network and data, of ``RECOMMENDED``."""
    if inputs.loaded.tokenizer is not None or inputs.objective is NEXT_TOKEN:
        return "text"
    if not inputs.sources:
        return "no data"
    source = inputs.sources[0]
    with preserve_random_state(source.generators):  # a loader may shuffle
        is_labelled = source.batches[0].labels is not None
    return "examples" if is_labelled else "examples without labels"


def _take_tokens(source: Source, tokens: int) -> Source:
    """Return the first batches of a source, of this many tokens."""
    batches, total = [], 0
    with preserve_random_state(source.generators):
        for batch in source:
            total += batch.size
            if total > tokens:
                break
            batches.append(batch)
    return replace(source, batches=batches)


def _leave_out(source: Source, held_out: Sequence[Batch]) -> Source:
    """Return a source without batches on which training is judged; that of a loader, or of these alone, as it is."""
    if not isinstance(source.batches, list | tuple):
        return source
    rest = [batch for batch in source.batches if not any(batch is other for other in held_out)]
    return replace(source, batches=rest or source.batches)


def _open_inputs(call: Call, config: Settings, run: ActiveRun) -> PruneInputs:
    """Load the network if it is named, trace it unless its axes are given, read the data, and choose what is open."""
    inputs = call.read(run.progress).with_two_rows()
    reconstruct = config.reconstruct
    parameters = sum(map(Tensor.numel, inputs.loaded.model.parameters()))
    config = replace(choose_defaults(config, _find_kind(inputs), parameters), sources=())
    with run.stage("trace"):
        axes = inputs.trace() if call.axes is None else call.axes
    if config.reconstruct:
        with preserve_random_state(generator for source in inputs.sources for generator in source.generators):
            try:
                is_text = inputs.loaded.tokenizer is not None
                fitted_on = inputs.sources if is_text else map(take_for_fit, inputs.sources)
                check_lengths(chain.from_iterable(fitted_on))
            except ValueError as error:
                if reconstruct:  # asked for
                    raise
                warnings.warn(f"layers are not reconstructed: {error}", stacklevel=4)
                config = replace(config, reconstruct=False)
    taught_on, calibration = list[Source](), inputs.sources
    if config.distil:
        taught_on = [_take_tokens(source, config.distil // len(inputs.sources)) for source in inputs.sources]
        pairs = zip(inputs.sources, taught_on, strict=True)
        share = DISTILLATION["held_out"]
        calibration = tuple(
            _leave_out(source, taught.held_out(share)[1]) if len(taught) > 1 else source for source, taught in pairs
        )
    network = WholeNetwork(inputs.for_saving())
    return PruneInputs(
        config,
        network,
        axes,
        SourceHalves(calibration, calibration if inputs.tests is inputs.sources else inputs.tests),
        taught_on=taught_on,
        objective=inputs.objective,
        python_call=call.describe_inputs(inputs, network.sum_parameters),
    )
