"""What pruning runs and recoveries need of a limit of memory, and whether they read networks one block at a time."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from regrow.core.amounts import Measure, format_bytes, parse_bytes
from regrow.core.errors import InputError
from regrow.core.names import GENERATED
from regrow.core.process_memory import read_resident, return_memory
from regrow.core.scores import Need
from regrow.core.sources import Batch, logits_in
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation.generation import predict_generation_bytes
from regrow.evaluation.memory import UnpredictableError, predict_memory
from regrow.jobs.inputs import count_windows
from regrow.jobs.models import DTYPES, ModelSpec
from regrow.jobs.pruning import budget_of, model_spec, pruner_of, source_specs
from regrow.jobs.recording import Invocation
from regrow.jobs.recovering import LastCut
from regrow.methods.pruning.pruner import Pruner
from regrow.methods.recovery.distil import compute_divergence
from regrow.methods.recovery.refit_work import MAX_BATCHES, MIN_ELEMENTS
from regrow.scoring.collect import differentiated_names
from regrow.scoring.grams import MAX_BATCH_WINDOWS
from regrow.settings.prune import Settings
from regrow.settings.recover import CLOSED_FORM
from regrow.settings.recover import Settings as RecoverSettings
from regrow.store.run_folder import RunFolder
from regrow.streaming.opening import OpenedNetwork, limit_caches, open_network
from regrow.streaming.requirements import MemoryPlan, add_products, plan_memory

SPARE = 2**26
"""Bytes that the interpreter and the operations need besides."""


def open_to_prune(settings: Settings, invocation: Invocation) -> tuple[OpenedNetwork, MemoryPlan]:
    """Open the network that settings name without its weights, and decide whether it is read one block at a time."""
    spec, pruner, budget = model_spec(settings), pruner_of(settings), budget_of(settings)
    opened = _open_text(spec.name, spec)
    network, window, sources = opened.network(), settings.seq_len, len(settings.sources)
    calibrated = sources * count_windows(settings.tokens, window)
    windows = max(calibrated, (sources + len(settings.unseen)) * count_windows(settings.eval_tokens, window))
    size = max(settings.batch_size, min(MAX_BATCH_WINDOWS, windows)) if pruner.products else settings.batch_size
    plan = plan_memory(network, parse_bytes(invocation.memory), -(-windows // size), window * size)
    if pruner.products:
        plan = add_products(plan, network, opened.axes, budget.units(opened.axes))
    if not plan.streams:
        plan = replace(plan, whole=max(plan.whole, read_resident() + _predict_besides(settings, pruner, opened)))
    if invocation.ranks.several:
        plan = replace(plan, decision=broadcast_record(invocation.ranks, plan.streams))
    needs = {
        f"method {settings.method}": bool(pruner.needs & {Need.GRADIENTS, Need.FISHER}) or pruner.runs_network,
        f"--source {GENERATED}": GENERATED in settings.sources,
        "a target in ms": budget.measure == Measure.TIME,
    }
    start_streaming(opened, plan, needs | needs_of_model(spec, settings.precision, opened), invocation.announce)
    return opened, plan


def open_to_recover(
    settings: RecoverSettings, source: RunFolder, cut: LastCut, invocation: Invocation
) -> tuple[OpenedNetwork, OpenedNetwork, MemoryPlan]:
    """Open the networks before and after a cut, and decide whether a recovery reads them one block at a time."""
    spec, count, window = model_spec(cut.settings), max(1, len(cut.settings.sources)), cut.settings.seq_len
    dense, small = _open_text(str(cut.before or spec.name), spec), _open_text(str(source.path), spec)
    windows = count * count_windows(settings.tokens // count, window)
    most = max(windows, (len(cut.settings.unseen) + count) * count_windows(cut.settings.eval_tokens, window))
    plan = plan_memory(dense.network(), parse_bytes(invocation.memory), most, window, what="evaluating")
    work = 0
    if settings.by == "refit":
        left_out = count > 1 and settings.recovery_settings.get("choose_on") == "left_out_source"
        work = _refit_bytes(dense.loaded.model, windows * window, window, count + 2 if left_out else 3)
    size = _weight_bytes(small.loaded.model)
    recovering = _recovery_bytes(settings.by, small.loaded.model, window) + work
    besides = size  # the file while it is read
    if GENERATED in cut.settings.sources:
        windows = source_specs(cut.settings, settings.tokens).generated_windows
        besides = max(size, predict_generation_bytes(dense.loaded.model, windows, window))
    whole = max(recovering, size + besides) + read_resident() + SPARE + _weight_bytes(dense.loaded.model)
    least = plan.least + work if settings.by in CLOSED_FORM else whole
    plan = replace(plan, whole=whole, least=least, what=f"recovery by {settings.by}")
    needs = {
        "recovery where the run dropped whole modules": bool(cut.plan.drop),
        "fitting to what the dense network has": settings.recovery_settings.get("target") in ("dense", "residual"),
    }
    start_streaming(dense, plan, needs | needs_of_model(spec, cut.settings.precision, dense), invocation.announce)
    if plan.streams:
        small.check_output()
    return dense, small, plan


def _open_text(name: str, spec: ModelSpec) -> OpenedNetwork:
    opened = open_network(name, DTYPES.get(spec.dtype))
    if opened.loaded.tokenizer is None:
        raise InputError(f"--memory predicts for models of text, and {name} has no tokenizer; leave it out")
    return opened


def needs_of_model(spec: ModelSpec, precision: str, opened: OpenedNetwork) -> dict[str, bool]:
    """Return what of a model, and of how it runs, needs the whole network in memory → whether it is so."""
    return {
        "a model without text": opened.loaded.tokenizer is None,
        "--input": bool(spec.input),
        f"--device {spec.device}": spec.device != "cpu",
        f"--precision {precision}": precision != "float32",
    }


def start_streaming(
    opened: OpenedNetwork, plan: MemoryPlan, needs: Mapping[str, bool], announce: Callable[[str], None]
) -> bool:
    """Whether a network is read one block at a time; prepare the process for that, unless something needs it whole."""
    plan.check()
    if plan.streams and (reason := next((text for text, holds in needs.items() if holds), "")):
        raise InputError(
            f"{reason} needs the whole network in memory, about {plan.whole / 2**30:.1f} GiB of --memory "
            f"{format_bytes(plan.limit)}; give more memory, or use another method or setting"
        )
    announce(str(plan))
    if plan.streams:
        limit_caches()
        return_memory()
        opened.check_output()
    return plan.streams


def _predict_besides(settings: Settings, pruner: Pruner, opened: OpenedNetwork) -> int:
    """Return the most bytes that generating text and gradients need in memory."""
    model, window, count = opened.loaded.model, settings.seq_len, len(settings.sources)
    size, needed = _weight_bytes(model), []
    if GENERATED in settings.sources:
        needed.append(size + predict_generation_bytes(model, source_specs(settings).generated_windows, window))
    if Need.GRADIENTS in pruner.needs:
        names = differentiated_names(model, opened.axes, budget_of(settings).units(opened.axes))
        sums = pruner.shards * max(pruner.sources, count)
        summed = sums * sum(4 * model.get_parameter(name).numel() for name in names)
        needed.append(2 * size + summed + _activation_bytes(model, window))
    elif Need.FISHER in pruner.needs or pruner.runs_network:
        needed.append(2 * size + settings.batch_size * _activation_bytes(model, window))
    return SPARE + max(needed) if needed else 0


def _recovery_bytes(by: str, model: nn.Module, window: int) -> int:
    """Return what a recovery needs of a cut network, its weights included, but for what ``refit`` sums."""
    size = _weight_bytes(model)
    if by in CLOSED_FORM:
        widest = max((p.shape[0] for p in model.parameters() if p.dim() == 2), default=1)
        return size + 3 * window * widest * 4
    activations = _activation_bytes(model, window, distils=by == "distil")
    if by == "distil":  # in float32: weights, gradients, two moments of the optimizer, and the best values
        single = 4 * sum(p.numel() for p in model.parameters())
        return 5 * single + int(single / max(1, size) * activations)
    return size + activations


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _activation_bytes(model: nn.Module, window: int, *, distils: bool = False) -> int:
    """Return what a training step of all weights on two windows needs beside weights, gradients and two moments."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step(model: nn.Module, batch: Batch) -> None:
        assert batch.labels is not None
        optimizer = optimizers.setdefault(id(model), torch.optim.AdamW(model.parameters()))
        optimizer.zero_grad()
        for _ in range(2):
            logits = logits_in(batch.run(model)).flatten(0, -2)
            loss = F.cross_entropy(logits.float(), batch.labels.flatten())
            if distils:
                loss = loss + compute_divergence(logits, torch.zeros_like(logits))
            loss.backward()
        optimizer.step()

    ids = torch.zeros(1, window, dtype=torch.int64)
    batch = Batch((ids,), {"use_cache": False} if hasattr(model, "config") else {}, ids)
    try:
        return max(0, predict_memory(model, batch, step).peak - 4 * _weight_bytes(model))
    except UnpredictableError as error:
        raise InputError(f"the memory of the run is not predicted: {error}; leave out --memory") from None


def _refit_bytes(model: nn.Module, tokens: int, window: int, parts: int) -> int:
    """Return what refit needs for all positions at one layer, and for its ``parts`` sums of the widest layer.

    At the largest layer that is inputs, outputs and what is added to them; and what one batch needs between two layers.
    """
    linear = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    shapes = [parameter.shape for parameter in linear[1:] or linear]
    batch = min(tokens, max(MIN_ELEMENTS, tokens // MAX_BATCHES) + window)
    waiting = tokens * max(p.element_size() for p in linear) * max(k + 2 * out for out, k in shapes)
    sums = max(8 * (k * k + k * out) for out, k in shapes)
    return waiting + 4 * batch * max(map(max, shapes)) * 4 + parts * sums
