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
from regrow.jobs.pruning_inputs import make_budget, make_model_spec, make_pruner, make_source_specs
from regrow.jobs.recording import Invocation
from regrow.jobs.recovery_steps import LastCut
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

# Bytes that the interpreter and the operations need besides.
SPARE_BYTES = 2**26


def open_to_prune(settings: Settings, invocation: Invocation) -> tuple[OpenedNetwork, MemoryPlan]:
    """Open the network that settings name without its weights; the plan says whether it is read one block at a time.

    The limit is ``invocation.memory``. Raises ResourceError if even that way does not fit; InputError if the network is
    no language model, or exceeds the limit while a setting needs all of it in memory.
    """
    spec, pruner, budget = make_model_spec(settings), make_pruner(settings), make_budget(settings)
    opened = _open_language_model(spec.name, spec)
    network, window, sources = opened.network(), settings.seq_len, len(settings.sources)
    calibrated = sources * count_windows(settings.tokens, window)
    windows = max(calibrated, (sources + len(settings.unseen)) * count_windows(settings.eval_tokens, window))
    size = settings.batch_size or 1
    if pruner.products:
        size = max(size, min(MAX_BATCH_WINDOWS, windows))
    batches = -(-windows // size)  # rounded up
    plan = plan_memory(network, parse_bytes(invocation.memory), batches, window * size)
    if pruner.products:
        plan = add_products(plan, network, opened.axes, budget.units(opened.axes))
    if not plan.streams:
        plan = replace(plan, whole=max(plan.whole, read_resident() + _predict_extra_bytes(settings, pruner, opened)))
    if invocation.ranks.several:
        plan = replace(plan, decision=broadcast_record(invocation.ranks, plan.streams))
    needs = {
        f"method {settings.method}": bool(pruner.needs & {Need.GRADIENTS, Need.FISHER}) or pruner.runs_network,
        f"--source {GENERATED}": GENERATED in settings.sources,
        "a target in ms": budget.measure == Measure.TIME,
    }
    check_memory_plan(opened, plan, needs | list_model_needs(spec, settings.precision, opened), invocation.announce)
    return opened, plan


def open_to_recover(
    settings: RecoverSettings, source: RunFolder, cut: LastCut, invocation: Invocation
) -> tuple[OpenedNetwork, OpenedNetwork, MemoryPlan]:
    """Open the networks before and after a cut, without weights; the plan says whether they are read block by block.

    ``source``: the run whose model is recovered; ``cut``: its last cut. Raises as :func:`open_to_prune` does.
    """
    spec, count, window = make_model_spec(cut.settings), max(1, len(cut.settings.sources)), cut.settings.seq_len
    dense, small = (
        _open_language_model(str(cut.before or spec.name), spec),
        _open_language_model(str(source.path), spec),
    )
    windows = count * count_windows(settings.tokens // count, window)
    max_windows = max(windows, (len(cut.settings.unseen) + count) * count_windows(cut.settings.eval_tokens, window))
    plan = plan_memory(dense.network(), parse_bytes(invocation.memory), max_windows, window, what="evaluating")
    work = 0
    if settings.by == "refit":
        left_out = count > 1 and settings.recovery_settings.get("choose_on") == "left_out_source"
        work = _predict_refit_bytes(dense.loaded.model, windows * window, window, count + 2 if left_out else 3)
    size = _count_weight_bytes(small.loaded.model)
    recovering = _predict_recovery_bytes(settings.by, small.loaded.model, window) + work
    besides = size  # the file while it is read
    if GENERATED in cut.settings.sources:
        windows = make_source_specs(cut.settings, settings.tokens).generated_windows
        besides = max(size, predict_generation_bytes(dense.loaded.model, windows, window))
    whole = max(recovering, size + besides) + read_resident() + SPARE_BYTES + _count_weight_bytes(dense.loaded.model)
    least = plan.least + work if settings.by in CLOSED_FORM else whole
    plan = replace(plan, whole=whole, least=least, what=f"recovery by {settings.by}")
    needs = {
        "recovery where the run dropped whole modules": bool(cut.plan.drop),
        "fitting to what the dense network has": settings.recovery_settings.get("target") in ("dense", "residual"),
    }
    check_memory_plan(dense, plan, needs | list_model_needs(spec, cut.settings.precision, dense), invocation.announce)
    if plan.streams:
        small.check_output()
    return dense, small, plan


def _open_language_model(name: str, spec: ModelSpec) -> OpenedNetwork:
    """Open a network without its weights, in the dtype of ``spec``; InputError if it has no tokenizer."""
    opened = open_network(name, DTYPES.get(spec.dtype))
    if opened.loaded.tokenizer is None:
        raise InputError(f"--memory predicts for models of text, and {name} has no tokenizer; leave it out")
    return opened


def list_model_needs(spec: ModelSpec, precision: str, opened: OpenedNetwork) -> dict[str, bool]:
    """Return what needs the whole network in memory (a setting, such as ``--input``) → whether it does here."""
    return {
        "a model without text": opened.loaded.tokenizer is None,
        "--input": bool(spec.input),
        f"--device {spec.device}": spec.device != "cpu",
        f"--precision {precision}": precision != "float32",
    }


def check_memory_plan(
    opened: OpenedNetwork, plan: MemoryPlan, needs: Mapping[str, bool], announce: Callable[[str], None]
) -> bool:
    """Announce a memory plan, and return whether the network is read one block at a time.

    If so, caches of this process are limited, and the network's recorded output is compared (StoreError if it differs).
    ``needs``: words for what rules that out → whether it applies, when InputError is raised. Raises ResourceError if
    the limit is too low.
    """
    plan.check()
    reason = next((text for text, holds in needs.items() if holds), "")
    if plan.streams and reason:
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


def _predict_extra_bytes(settings: Settings, pruner: Pruner, opened: OpenedNetwork) -> int:
    """Return the bytes that generating text or scoring take besides what the process holds, whichever is more.

    The weights of a network in memory are included; 0 if the run neither generates text nor needs gradients or passes.
    """
    model, window, count = opened.loaded.model, settings.seq_len, len(settings.sources)
    size, needed = _count_weight_bytes(model), []
    if GENERATED in settings.sources:
        needed.append(size + predict_generation_bytes(model, make_source_specs(settings).generated_windows, window))
    if Need.GRADIENTS in pruner.needs:
        names = differentiated_names(model, opened.axes, make_budget(settings).units(opened.axes))
        sums = pruner.shards * max(pruner.sources, count)
        summed = sums * sum(4 * model.get_parameter(name).numel() for name in names)
        needed.append(2 * size + summed + _predict_activation_bytes(model, window))
    elif Need.FISHER in pruner.needs or pruner.runs_network:
        needed.append(2 * size + (settings.batch_size or 1) * _predict_activation_bytes(model, window))
    return SPARE_BYTES + max(needed) if needed else 0


def _predict_recovery_bytes(by: str, model: nn.Module, window: int) -> int:
    """Return the bytes that a recovery ``by`` a method needs for a cut network, its weights included.

    ``window``: tokens per window. What refit sums is not included: :func:`_predict_refit_bytes` has it.
    """
    size = _count_weight_bytes(model)
    if by in CLOSED_FORM:
        widest = max((p.shape[0] for p in model.parameters() if p.dim() == 2), default=1)
        return size + 3 * window * widest * 4  # bytes of float32
    activations = _predict_activation_bytes(model, window, distils=by == "distil")
    if by == "distil":  # in float32: weights, gradients, two moments of the optimizer, and the best values
        in_float32 = 4 * sum(p.numel() for p in model.parameters())
        return 5 * in_float32 + int(in_float32 / max(1, size) * activations)
    return size + activations


def _count_weight_bytes(model: nn.Module) -> int:
    """Return how many bytes the parameters of a network take."""
    return sum(p.nbytes for p in model.parameters())


def _predict_activation_bytes(model: nn.Module, window: int, *, distils: bool = False) -> int:
    """Return the bytes that a training step on two windows needs beside weights, gradients and two moments of AdamW.

    ``window``: tokens per window; ``distils``: whether the loss compares logits with another network's, too. Raises
    InputError if this cannot be predicted.
    """
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
    flags = {"use_cache": False} if hasattr(model, "config") else {}
    batch = Batch((ids,), flags, ids)
    try:
        return max(0, predict_memory(model, batch, step).peak - 4 * _count_weight_bytes(model))
    except UnpredictableError as error:
        raise InputError(f"the memory of the run is not predicted: {error}; leave out --memory") from None


def _predict_refit_bytes(model: nn.Module, tokens: int, window: int, parts: int) -> int:
    """Return the bytes that refit, least squares layer by layer, needs beside weights.

    ``tokens``: of all windows, whose inputs, outputs and additions at the largest layer are in memory; ``window``: per
    window, for what one batch needs between two layers; ``parts``: how many sums of products of the widest layer.
    """
    linear = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    shapes = [parameter.shape for parameter in linear[1:] or linear]
    batch = min(tokens, max(MIN_ELEMENTS, tokens // MAX_BATCHES) + window)
    waiting = tokens * max(p.element_size() for p in linear) * max(k + 2 * out for out, k in shapes)
    sums = max(8 * (k * k + k * out) for out, k in shapes)
    return waiting + 4 * batch * max(map(max, shapes)) * 4 + parts * sums
