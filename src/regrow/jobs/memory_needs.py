"""What pruning runs and recoveries need of a limit of memory, and whether they read networks one block at a time."""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.amounts import Measure, format_bytes, parse_bytes
from regrow.core.errors import InputError, ResourceError
from regrow.core.names import GENERATED
from regrow.core.process_memory import read_resident, return_memory
from regrow.core.scores import Need
from regrow.core.sources import Batch, logits_in
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation import UnpredictableError, predict_memory
from regrow.evaluation.generation import predict_generation, sampling_dtype
from regrow.jobs.inputs import count_windows
from regrow.jobs.models import DTYPES, ModelSpec
from regrow.jobs.parents import count_parameters
from regrow.jobs.pruning import budget_of, count_generated, count_tokens, model_spec, pruner_of, source_specs
from regrow.jobs.recording import Invocation
from regrow.jobs.recovering import LastCut
from regrow.methods.pruning.pruner import Pruner
from regrow.methods.recovery.distil import divergence
from regrow.methods.recovery.refit_work import BATCHES, ELEMENTS
from regrow.scoring.collect import differentiated
from regrow.scoring.grams import BATCH
from regrow.settings.prune import Settings, complete_reconstruction
from regrow.settings.recover import Settings as RecoverSettings
from regrow.store.errors import StoreError
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, limit_caches, load_saved_skeleton, open_network
from regrow.streaming.requirements import (
    BLOCKS,
    MemoryPlan,
    MemoryTerms,
    enough,
    explain_refusal,
    plan_memory,
    with_products,
)

SPARE = 2**26
"""Bytes that the interpreter and the operations need besides."""
PAIRED = ("dense", "residual")
"""The targets of ``refit`` for which the network before the cut may run beside the one after it."""


def open_to_prune(
    settings: Settings, invocation: Invocation, earlier: MemoryPlan | None = None
) -> tuple[OpenedNetwork, MemoryPlan]:
    """Open the network that settings name without its weights, and predict what pruning it needs."""
    if earlier:
        gc.collect()
        return_memory()
    spec, pruner = model_spec(settings), pruner_of(settings)
    opened = open_network(spec.name, DTYPES.get(spec.dtype))
    calibrated, evaluated = len(settings.sources), len(settings.sources) + len(settings.unseen)
    windows = max(
        calibrated * count_windows(settings.tokens, settings.seq_len),
        evaluated * count_windows(settings.eval_tokens, settings.seq_len),
    )
    size = max(settings.batch_size, min(BATCH, windows)) if pruner.products else settings.batch_size
    amounts = -(-windows // size), settings.seq_len * size
    needs = needs_of_model(spec, settings.precision, opened)
    return opened, plan_streaming(opened, invocation, settings, pruner, amounts, needs, earlier)


def plan_streaming(
    opened: OpenedNetwork,
    invocation: Invocation,
    settings: Settings,
    pruner: Pruner,
    amounts: tuple[int, int],
    needs: Mapping[str, bool],
    earlier: MemoryPlan | None = None,
) -> MemoryPlan:
    """Predict what a pruning run needs, and decide whether it reads the network one block at a time.

    ``amounts`` are the most batches, and the positions of the longest; ``needs`` says what, besides the plans, needs
    the whole network in memory. What an ``earlier`` run of this process left in memory is given back, and not counted.
    """
    network, units = opened.network(), budget_of(settings).units(opened.axes)
    held, (batches, positions) = earlier.held if earlier else None, amounts
    plan = plan_memory(network, parse_bytes(invocation.memory), batches, positions, held=held)
    if not plan.streams:
        plan = replace(plan, whole=max(plan.whole, plan.held + _predict_besides(settings, pruner, opened)))
    ordered = with_products(plan, network, opened.axes, units) if pruner.products else plan
    if ordered.streams and settings.reconstruct:  # the sums of the method are released before
        plan = _with_reconstruction(plan, settings, opened)
        plan = replace(plan, whole=ordered.whole, least=max(plan.least, ordered.least))
    else:
        plan = ordered
    if invocation.ranks.several:
        plan = replace(plan, decision=broadcast_record(invocation.ranks, plan.streams))
    needs_of_plan = {
        f"method {settings.method}, which computes gradients of all weights,": Need.GRADIENTS in pruner.needs,
        f"method {settings.method}, which computes gradients of masks,": Need.FISHER in pruner.needs,
        f"method {settings.method}, which runs the masked network,": pruner.runs_network,
        f"--source {GENERATED}": GENERATED in settings.sources,
        "a target in ms": settings.measure == Measure.TIME,
    }
    start_streaming(opened, plan, {**needs_of_plan, **needs}, invocation.announce)
    return plan


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


def _with_reconstruction(plan: MemoryPlan, settings: Settings, opened: OpenedNetwork) -> MemoryPlan:
    """Return the prediction with what a reconstruction needs of one block; raise ResourceError if that is too much."""
    tokens = count_tokens(settings, text=True)
    work = _refit_terms(opened.loaded.model, tokens, settings.seq_len, len(settings.sources) + 2)
    plan = replace(plan, least=plan.least + sum(work.values()))
    if settings.reconstruct_settings.get("target") in PAIRED:
        plan = plan_pairing(plan, predict_pairing(opened.network(), tokens, settings.seq_len))
    if plan.least > plan.limit:
        raise ResourceError(
            f"pruning with --reconstruct within {format_bytes(plan.limit)} of memory is impossible, even one block at "
            f"a time; use --memory {enough(plan.least)}, or fewer --reconstruct-tokens"
        )
    return plan


def _predict_besides(settings: Settings, pruner: Pruner, opened: OpenedNetwork) -> int:
    """Return the most bytes that generating text, gradients, and the repair after the cut need in memory."""
    model, window, text = opened.loaded.model, settings.seq_len, opened.loaded.tokenizer is not None
    gradients, runs = Need.GRADIENTS in pruner.needs, Need.FISHER in pruner.needs or pruner.runs_network
    needed = [0]
    if GENERATED in settings.sources and text:
        needed.append(SPARE + _sizes(model)[1] + predict_generation(model, count_generated(settings), window))
    if not (gradients or runs or settings.reconstruct):
        return max(needed)
    what = "--reconstruct" if settings.reconstruct else f"--method {settings.method}"
    if not text:
        raise InputError(f"what {what} needs is predicted for models that take text only; leave out --memory")
    try:
        if gradients:
            names = differentiated(model, opened.axes, budget_of(settings).units(opened.axes))
            sums = pruner.shards * max(pruner.sources, len(settings.sources))
            needed.append(predict_learning(model, names, window, 1, sums))
        elif runs:
            needed.append(predict_learning(model, (), window, settings.batch_size, 0))
        if settings.reconstruct:
            tokens, sums = count_tokens(settings, text=True), len(settings.sources) + 2
            fit = complete_reconstruction(settings.reconstruct_settings, settings.sources)
            beside = count_activations(model, tokens, window) if fit.get("target") in PAIRED else 0
            needed.append(beside + predict_reconstruction(model, window, tokens, sums))
    except UnpredictableError as error:
        raise InputError(f"what {what} needs is not predicted: {error}; leave out --memory") from None
    return max(needed)


def predict_recovery(settings: RecoverSettings, source: Path, cut: LastCut, limit: int) -> MemoryTerms:
    """Predict what a recovery needs of a limit in bytes, with both networks in memory."""
    pruning, mode = cut.settings, FakeTensorMode(allow_non_fake_inputs=True)
    try:
        loaded, shapes = load_saved_skeleton(source, mode, DTYPES.get(pruning.dtype))
        model, (numbers, size) = loaded.model, _sizes(loaded.model)
        if loaded.tokenizer is None:
            raise StoreError(f"{source} holds a model without text")
        dense = (cut.folder.run().get("parent") or {}).get("parameters") or count_parameters(shapes)
        dense_size = dense * size // max(1, numbers)
        sums = count_sums(settings, cut)
        weights, work = _recovery_terms(settings.by, model, dense_size, pruning.seq_len, settings.tokens, sums)
    except (StoreError, UnpredictableError) as error:
        raise InputError(f"{str(error).split(';')[0]}, whose memory is not predicted; leave out --memory") from None
    reading = {"the file of the cut model while it is read": sum(stored.bytes for stored in shapes.tensors.values())}
    generating = _generating_terms(settings, cut, model, max(0, dense - numbers))
    most = max(work, reading, generating, key=lambda terms: sum(terms.values()))
    return MemoryTerms(limit, {"the interpreter": read_resident() + SPARE} | weights | most)


def _generating_terms(settings: RecoverSettings, cut: LastCut, model: nn.Module, lost: int) -> dict[str, int]:
    """Return what generating text needs that the pruning run did not store; the cut has removed ``lost`` numbers."""
    specs = source_specs(cut.settings, settings.tokens)
    missing = specs.generated_windows - count_generated(cut.settings)
    if GENERATED not in specs.sources or missing <= 0:
        return {}
    dtype = sampling_dtype(model)
    copied = any(parameter.dtype != dtype for parameter in model.parameters())
    return {"generating text": predict_generation(model, missing, specs.seq_len) + dtype.itemsize * lost * copied}


def _recovery_terms(
    by: str, model: nn.Module, dense: int, window: int, tokens: int, sums: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return what the weights of a recovery take, and what it needs besides while it runs; ``dense`` is in bytes."""
    numbers, size = _sizes(model)
    scale = 4 * numbers / max(1, size) if by == "distil" else 1  # it trains in float32
    trained = int(scale * size)
    weights = {"the weights of the dense model": dense, "the weights of the cut model": trained}
    if by in ("lora", "distil"):  # the step had weights, gradients and two moments
        work = {"activations": int(scale * max(0, _predict_step(by, model, window) - 4 * size))}
    else:
        widest = max((p.shape[0] for p in model.parameters() if p.dim() == 2), default=1)
        work = {"activations": 3 * window * widest * 4}
        work |= _refit_terms(model, tokens, window, sums) if by == "refit" else {}
    training = {"gradients": trained, "optimizer moments": 2 * trained, "the best values": trained}
    return weights, (training | work if by == "distil" else work)


def count_sums(settings: RecoverSettings, cut: LastCut) -> int:
    """Return how many sums over positions ``refit`` keeps of a layer: of each source, of all, and their factor."""
    sources = len(cut.settings.sources)
    left_out = sources > 1 and settings.recovery_settings.get("choose_on") == "left_out_source"
    return sources + 2 if left_out else 3


def plan_recovery(
    settings: RecoverSettings, cut: LastCut, dense: OpenedNetwork, terms: MemoryTerms
) -> tuple[MemoryPlan, str]:
    """Predict what a recovery needs with one block in memory; raise ResourceError if that is more than the limit.

    Also returns why there is no room for a block of both networks at a time, if there is none.
    """
    sources, window = max(1, len(cut.settings.sources)), cut.settings.seq_len
    windows = sources * count_windows(settings.tokens // sources, window)
    evaluated = (len(cut.settings.unseen) + sources) * count_windows(cut.settings.eval_tokens, window)
    network, refits = dense.network(), settings.by == "refit"
    plan = plan_memory(network, sys.maxsize, max(windows, evaluated), window, what="evaluating")
    plan, beside = replace(plan, limit=terms.limit, whole=terms.needed, decision=True), 0
    paired = refits and settings.recovery_settings.get("target") in PAIRED
    if refits:
        work = _refit_terms(dense.loaded.model, windows * window, window, count_sums(settings, cut))
        plan = replace(plan, least=plan.least + sum(work.values()))
        beside = predict_pairing(network, windows * window, window)
    if paired:
        plan = plan_pairing(plan, beside)
    if plan.least > plan.limit:
        raise ResourceError(explain_refusal(f"recovery by {settings.by}", plan.least, plan.limit))
    return plan, explain_lacking(plan, beside) if refits and not paired else ""


def predict_reconstruction(model: nn.Module, window: int, tokens: int, sums: int) -> int:
    """Return what fitting layers within a pruning run needs beside what the process held, in bytes.

    Both networks count with the shapes before the cut, which is not known yet.
    """
    weights, work = _recovery_terms("refit", model, _sizes(model)[1], window, tokens, sums)
    return SPARE + sum((*weights.values(), *work.values()))


def predict_learning(model: nn.Module, names: Sequence[str], window: int, batch_size: int, sums: int) -> int:
    """Return what a method needs that sums gradients of some parameters in float32, beside what the process held."""
    size = _sizes(model)[1]
    summed = sum(4 * model.get_parameter(name).numel() for name in names)
    activations = max(0, _predict_step("lora", model, window) - 4 * size)
    return SPARE + 2 * size + sums * summed + batch_size * activations


def count_activations(model: nn.Module, tokens: int, window: int) -> int:
    """Return how many bytes the activations of a network take while refit runs its batches in turns.

    That is inputs, outputs and what is added to them at the largest layer, of all positions; and what one batch needs
    between two layers. The network may be without numbers.
    """
    linear = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    shapes = [parameter.shape for parameter in linear[1:] or linear]
    batch = min(tokens, max(ELEMENTS, tokens // BATCHES) + window)
    waiting = tokens * max(p.element_size() for p in linear) * max(k + 2 * out for out, k in shapes)
    return waiting + 4 * batch * max(map(max, shapes)) * 4


def predict_pairing(network: StreamedNetwork, tokens: int, window: int) -> int:
    """Return what refit to the dense network needs besides, where both networks run one block at a time, in bytes.

    That is the cut network, counted with the shapes before the cut, and its activations, beside those of the dense one.
    """
    outer = sum(map(network.weights.bytes_of, network.outer))
    return outer + BLOCKS["evaluating"] * network.largest_block + count_activations(network.model, tokens, window)


def plan_pairing(plan: MemoryPlan, beside: int) -> MemoryPlan:
    """Return the prediction for refit to the dense network, of which ``beside`` is :func:`predict_pairing`."""
    return replace(plan, least=plan.least + beside, results=2 * plan.results)


def explain_lacking(plan: MemoryPlan, beside: int) -> str:
    """Say why there is no room for refit to the dense network, and what to do; empty if there is."""
    both = plan_pairing(plan, beside)
    if both.least + (0 if plan.on_disk else both.results) <= plan.limit:
        return ""
    what = "fitting to what the dense network has, with a block of both networks in memory,"
    return explain_refusal(what, both.least + both.results, plan.limit, "")


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the parameters of a network have, and how many bytes."""
    parameters = [*model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


def _predict_step(by: str, model: nn.Module, window: int) -> int:
    """Return the peak of a training step of all weights on two batches, each a window of text, in bytes."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step(model: nn.Module, batch: Batch) -> None:
        assert batch.labels is not None
        optimizer = optimizers.setdefault(id(model), torch.optim.AdamW(model.parameters()))
        optimizer.zero_grad()
        for _ in range(2):
            logits = logits_in(batch.run(model)).flatten(0, -2)
            loss = F.cross_entropy(logits.float(), batch.labels.flatten())
            if by == "distil":
                loss = loss + divergence(logits, torch.zeros_like(logits))
            loss.backward()
        optimizer.step()

    ids = torch.zeros(1, window, dtype=torch.int64)
    batch = Batch((ids,), {"use_cache": False} if hasattr(model, "config") else {}, ids)
    return predict_memory(model, batch, step).peak


def _refit_terms(model: nn.Module, tokens: int, window: int, parts: int) -> dict[str, int]:
    """Return what refit needs for all positions at one layer, and for the sums of the widest layer."""
    linear = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2]
    sums = max(8 * (k * k + k * out) for out, k in linear[1:]) if len(linear) > 1 else 0
    return {"all windows at a layer": count_activations(model, tokens, window), "sums": parts * sums}
