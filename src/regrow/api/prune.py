"""``regrow.prune``: from a network and data to a smaller network and the plan that made it."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.api.call import Call
from regrow.api.inputs import DeviceLike, Inputs, LossLike, ModelLike, names_generated
from regrow.core.amounts import Measure, Target, parse_share
from regrow.core.axes import AxisGraph, Mark
from regrow.core.budget import Budget, Timing
from regrow.core.errors import InputError
from regrow.core.plan import Plan
from regrow.core.progress import Progress, silent
from regrow.core.sources import preserve_random_state
from regrow.data.batch_streams import join_sources
from regrow.jobs.calibration import PruneInputs
from regrow.jobs.evaluate import count_positions
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.memory_needs import plan_streaming
from regrow.jobs.progress_bar import visible
from regrow.jobs.prune import carry_out
from regrow.jobs.pruning import pruner_of
from regrow.jobs.recording import ActiveRun, Invocation
from regrow.jobs.run_networks import PrunedNetwork, StreamedRun, WholeNetwork
from regrow.methods.pruning.layer_orders import BATCH
from regrow.methods.recovery.refit_work import check_lengths
from regrow.settings.prune import Settings
from regrow.streaming.opening import OpenedNetwork
from regrow.streaming.requirements import MemoryPlan


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
            a dict of such by name. Methods that score by weights need none.
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
            the name of one of ``regrow.core.objectives.OBJECTIVES`` (``"next-token"``); ``None``: what fits the labels.
        tokenizer: The tokenizer, for text; ``None``: ``model.tokenizer``.
        batch_size: Examples per batch, where the data do not come in batches.
        device: The device to run on, such as ``"cuda"``, or ``"auto"``; ``None``: where the network is.
        precision: ``"bfloat16"`` computes the matrix products and convolutions of forward passes in bfloat16.
        memory: With ``out``: how much memory the call may use, such as ``"4GiB"``. A language model that does not fit,
            given by its name or as a folder, is read one block at a time; the network that is returned then has no
            numbers, which are in ``out``. Empty: it is loaded whole.
        axes: The network's axes, if they are known (:func:`regrow.trace`); the network is then not traced.
        settings: Settings of the method that differ from its defaults.
        reconstruct: Whether layers that read cut units are fitted to dense outputs by least squares after the cut, on
            all of the data, in memory; or settings of ``refit`` that differ from the defaults of this fit.
        out: The folder of a run, which the same call resumes and every command takes; ``None``: nothing is written.
        track: With ``out``: a tracker that gets every measurement, too: ``"tensorboard"``, ``"mlflow"``, ``"wandb"``.
        progress: Called with (batches done, batches in all, what is being done).
        **budget: More fields of :class:`regrow.core.budget.Budget`: ``measure``, ``only``, ``exclude``, ``round_to`` ….

    Returns:
        The same model, smaller, and the plan. Warnings tell of a source that was split, and of BatchNorms without data.

    Raises:
        ValueError: If the method is unknown, the budget cannot be met, or there is nothing to trace or measure with.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> net, plan = prune(net, (torch.randn(64, 4), torch.randint(2, (64,))), method="llm_pruner", keep=0.5)
    >>> net[0].out_features
    4
    """
    if torch.is_inference_mode_enabled():
        raise InputError("prune would make weights that no gradient can reach in inference mode; use torch.no_grad()")
    call = Call(model, data, validation, example, loss, tokenizer, batch_size, device, precision, axes, out, track)
    call = call.checked(data=data, validation=validation)
    size, timing = _choose_size(keep, target, smaller), budget.pop("timing", None)
    job = _describe(call, method, settings or {}, size, budget, reconstruct)
    with visible(progress) as shown:
        result = carry_out(job, partial(_open, call, job, memory, timing), call.run("prune", shown))
    for line in result.warnings:
        warnings.warn(line, stacklevel=2)
    return result.loaded.model, result.plan


def _open(call: Call, settings: Settings, memory: str, timing: Timing | None, run: ActiveRun) -> PruneInputs:
    """Open the network, one block at a time if it does not fit into ``memory``, and read the data."""
    if memory:
        opened, inputs, plan = _open_files(call, settings, memory, run.progress)
        if plan.streams:
            if call.out is None:
                raise InputError(
                    "the network does not fit into memory, so that the cut one is written to a folder; give out=, for "
                    "example out='runs/pruned'"
                )
            network = StreamedRun(opened, plan)
            return replace(_inputs_of(call, settings, inputs, network, opened.axes), timing=timing, memory=plan)
    inputs = call.read(run.progress, generates=True)
    with run.stage("trace"):
        axes = inputs.trace() if call.axes is None else call.axes
    return replace(_inputs_of(call, settings, inputs, WholeNetwork(inputs.saved()), axes), timing=timing)


def _inputs_of(call: Call, settings: Settings, inputs: Inputs, network: PrunedNetwork, axes: AxisGraph) -> PruneInputs:
    """Return the inputs of the run."""
    if settings.reconstruct:
        with preserve_random_state(*(generator for source in inputs.sources for generator in source.generators)):
            check_lengths(chain.from_iterable(inputs.sources))
    return PruneInputs(
        network,
        axes,
        SourceHalves(inputs.sources, inputs.tests),
        objective=inputs.objective,
        lenient=inputs.lenient,
        call=call.record_inputs(inputs, network.sums),
    )


def _open_files(
    call: Call, settings: Settings, memory: str, progress: Progress
) -> tuple[OpenedNetwork, Inputs, MemoryPlan]:
    """Open a network from its files, read the data, all batches of which are in memory, and predict what is needed."""
    if names_generated(call.data):
        raise InputError(
            f"memory={memory!r} does not count what generating text needs, got data='generated'; leave out memory, "
            f"or run `regrow prune --source generated --memory {memory}`"
        )
    opened, inputs = call.open_files(memory)
    needs = {
        "axes=": call.axes is not None,
        "example=": call.axes is None and call.example is not None,
        f"device={call.device}": call.device not in (None, "cpu"),
        f"precision={call.precision}": call.precision != "float32",
        "a model without text": opened.loaded.tokenizer is None,
    }
    pruner = pruner_of(settings)
    batches = list(join_sources(inputs.sources, BATCH if pruner.products else 1))
    positions, total = max(map(count_positions, batches), default=1), sum(map(count_positions, batches))
    names = tuple(f"data{i}" for i in range(len(inputs.sources)))
    described = replace(settings, sources=names, seq_len=positions, tokens=max(1, total // max(1, len(names))))
    invocation = Invocation(memory=memory, announce=lambda line: progress(0, 1, line))
    return opened, inputs, plan_streaming(opened, invocation, described, pruner, (len(batches), positions), needs)


def _describe(
    call: Call,
    method: str,
    settings: Mapping[str, Any],
    size: tuple[float | None, str],
    budget: Mapping[str, Any],
    reconstruct: object,
) -> Settings:
    """Return the settings of the command that say what a call does."""
    if not (reconstruct is None or isinstance(reconstruct, bool | Mapping)):
        raise InputError(f"reconstruct must be True, False or a dict of settings of refit, got {reconstruct!r:.60}")
    if unknown := budget.keys() - {"measure", "only", "exclude", "round_to", "regular", "marks"}:
        raise TypeError(
            f"prune has no argument {min(unknown)!r}; the size is given by keep=0.8, smaller='20%' or "
            "target='macs=2G', and limited by measure, only, exclude, round_to, regular"
        )
    return Settings(
        call.name,
        method,
        dict(settings),
        keep=size[0],
        target=size[1],
        measure=str(budget.get("measure", Measure.WEIGHTS)),
        regular=budget.get("regular", False),
        only=tuple(budget.get("only", ())),
        exclude=tuple(budget.get("exclude", ())),
        marks=tuple(sorted(map(str, budget.get("marks", (Mark.NEUTRAL,))))),
        round_to=budget.get("round_to", 1),
        precision=call.precision,
        reconstruct=isinstance(reconstruct, Mapping) or bool(reconstruct),
        reconstruct_settings=reconstruct if isinstance(reconstruct, Mapping) else {},
    )


def _choose_size(
    keep: float | str | None, target: str | Target, smaller: str | float | None
) -> tuple[float | None, str]:
    """Return the fraction that stays or the target, of which one is given in one of three ways."""
    ways = {"keep": keep, "target": target or None, "smaller": smaller}
    names = [f"{name}={value}" for name, value in ways.items() if value is not None]
    if len(names) > 1:
        raise InputError(f"keep, target and smaller exclude each other, got {' and '.join(names)}; give one of them")
    if smaller is not None:
        target = Target.smaller(parse_share(str(smaller)))
    if target:
        return None, str(Target.parse(str(target)))
    return Budget(0.8 if keep is None else parse_share(str(keep))).keep, ""
