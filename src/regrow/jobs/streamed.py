"""Runs of a network that is larger than memory: what differs from a run that loads it whole."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from regrow.core.amounts import Measure, format_bytes, parse_bytes
from regrow.core.errors import InputError, ResourceError
from regrow.core.names import GENERATED
from regrow.core.process_memory import return_memory
from regrow.core.scores import Need
from regrow.distributed.parallel import broadcast_record
from regrow.evaluation import UnpredictableError
from regrow.evaluation.generation import predict_generation
from regrow.jobs.models import ModelSpec
from regrow.jobs.prune_settings import budget_of
from regrow.jobs.recording import Invocation
from regrow.jobs.recovering import count_generated, count_tokens
from regrow.jobs.streamed_recovery import (
    PAIRED,
    SPARE,
    count_activations,
    plan_pairing,
    predict_later_recovery,
    predict_learning,
    predict_pairing,
    predict_refit,
)
from regrow.methods.pruning.pruner import Pruner
from regrow.scoring.collect import differentiated
from regrow.settings.prune import Settings, complete_reconstruction
from regrow.streaming.opening import OpenedNetwork, limit_caches
from regrow.streaming.requirements import MemoryPlan, enough, plan_memory, with_products


def plan_streaming(
    opened: OpenedNetwork,
    invocation: Invocation,
    settings: Settings,
    pruner: Pruner,
    amounts: tuple[int, int],
    needs: Mapping[str, bool],
    earlier: MemoryPlan | None = None,
) -> MemoryPlan:
    """Predict what a pruning run needs, and decide whether it reads the network one block at a time."""
    limit, held = parse_bytes(invocation.memory), earlier.held if earlier else None
    plan = _with_learning(plan_memory(opened.network(), limit, *amounts, held=held), settings, pruner, opened)
    if invocation.ranks.several:
        plan = replace(plan, decision=broadcast_record(invocation.ranks, plan.streams))
    start_streaming(opened, plan, {**_needs_of_plan(settings, pruner), **needs}, invocation.announce)
    return plan


def _with_learning(plan: MemoryPlan, settings: Settings, pruner: Pruner, opened: OpenedNetwork) -> MemoryPlan:
    """Return the prediction with what the method needs besides forward passes, and what follows the cut."""
    units = budget_of(settings).units(opened.axes)
    if not plan.streams:
        needed = max(_predict_learning(settings, pruner, opened), _predict_generated(settings, opened))
        plan = replace(plan, whole=max(plan.whole, plan.held + needed))
    ordered = with_products(plan, opened.network(), opened.axes, units) if pruner.products else plan
    if ordered.streams and settings.reconstruct:  # the sums of the method are released before
        plan = _with_reconstruction(plan, settings, opened)
        return replace(plan, whole=ordered.whole, least=max(plan.least, ordered.least))
    return ordered


def _predict_generated(settings: Settings, opened: OpenedNetwork) -> int:
    """Return what generating text needs of a network in memory, in bytes; 0 without it."""
    if GENERATED not in settings.sources or opened.loaded.tokenizer is None:
        return 0
    model = opened.loaded.model
    weights = sum(one.numel() * one.itemsize for one in model.parameters())
    return SPARE + weights + predict_generation(model, count_generated(settings), settings.seq_len)


def _with_reconstruction(plan: MemoryPlan, settings: Settings, opened: OpenedNetwork) -> MemoryPlan:
    """Return the prediction with what a reconstruction needs of one block; raise ResourceError if that is too much."""
    tokens = count_tokens(settings, text=True)
    more = predict_refit(opened.loaded.model, tokens, settings.seq_len, sums=len(settings.sources) + 2)
    plan = replace(plan, least=plan.least + more)
    if settings.reconstruct_settings.get("target") in PAIRED:
        plan = plan_pairing(plan, predict_pairing(opened.network(), tokens, settings.seq_len))
    if plan.least > plan.limit:
        raise ResourceError(
            f"pruning with --reconstruct within {format_bytes(plan.limit)} of memory is impossible, even one block at "
            f"a time; use --memory {enough(plan.least)}, or fewer --reconstruct-tokens"
        )
    return plan


def _needs_of_plan(settings: Settings, pruner: Pruner) -> dict[str, bool]:
    """Return what of a plan needs the whole network in memory → whether it is so."""
    return {
        f"method {settings.method}, which computes gradients of all weights,": Need.GRADIENTS in pruner.needs,
        f"method {settings.method}, which computes gradients of masks,": Need.FISHER in pruner.needs,
        f"method {settings.method}, which runs the masked network,": pruner.runs_network,
        f"--recover {settings.recover}": bool(settings.recover),
        f"--source {GENERATED}": GENERATED in settings.sources,
        "a target in ms": settings.measure == Measure.TIME,
    }


def _predict_learning(settings: Settings, pruner: Pruner, opened: OpenedNetwork) -> int:
    """Return what gradients, and the recovery after the cut, need of a network in memory, in bytes; 0 without them."""
    gradients, masks, needed = Need.GRADIENTS in pruner.needs, Need.FISHER in pruner.needs, 0
    if not (gradients or masks or pruner.runs_network or settings.recover or settings.reconstruct):
        return 0
    after = f"--recover {settings.recover}" if settings.recover else "--reconstruct" if settings.reconstruct else ""
    what = after or f"--method {settings.method}"
    model, window = opened.loaded.model, settings.seq_len
    if opened.loaded.tokenizer is None:
        raise InputError(f"what {what} needs is predicted for models that take text only; leave out --memory")
    try:
        if gradients:
            names = differentiated(model, opened.axes, budget_of(settings).units(opened.axes))
            sums = pruner.shards * max(pruner.sources, len(settings.sources))
            needed = predict_learning(model, names, window, 1, sums)
        elif masks or pruner.runs_network:
            needed = predict_learning(model, (), window, settings.batch_size, 0)
        if settings.recover:
            needed = max(needed, predict_later_recovery(settings.recover, model, window, settings.recover_tokens))
        if settings.reconstruct:
            tokens, several = count_tokens(settings, text=True), len(settings.sources) + 2
            dense = complete_reconstruction(settings.reconstruct_settings, settings.sources).get("target") in PAIRED
            beside = count_activations(model, tokens, window) if dense else 0
            needed = max(needed, beside + predict_later_recovery("refit", model, window, tokens, sums=several))
    except UnpredictableError as error:
        raise InputError(f"what {what} needs is not predicted: {error}; leave out --memory") from None
    return needed


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
    """Whether a network is read one block at a time; prepare the process for that."""
    _check_streamable(plan, needs)
    announce(str(plan))
    if plan.streams:
        limit_caches()
        return_memory()
        opened.check_output()
    return plan.streams


def _check_streamable(plan: MemoryPlan, needs: Mapping[str, bool]) -> None:
    """Raise InputError if a network that does not fit into memory is needed as a whole."""
    if plan.streams and (reason := next((text for text, holds in needs.items() if holds), "")):
        raise InputError(
            f"{reason} needs the whole network in memory, about {plan.whole / 2**30:.1f} GiB of --memory "
            f"{format_bytes(plan.limit)}; give more memory, or use another method or setting"
        )
