"""The memory of recoveries and of gradients, predicted from shapes before anything is loaded."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.errors import InputError
from regrow.core.objectives import NEXT_TOKEN
from regrow.core.process_memory import read_resident
from regrow.core.source_names import GENERATED
from regrow.core.sources import Batch, logits_in
from regrow.evaluation import UnpredictableError, predict_memory
from regrow.evaluation.generation import predict_generation, sampling_dtype
from regrow.jobs.generated import count_generated
from regrow.jobs.inputs import count_windows
from regrow.jobs.last_cut import LastCut
from regrow.jobs.models import DTYPES
from regrow.jobs.parents import count_parameters
from regrow.jobs.prune_settings import source_specs
from regrow.methods.recovery.distil import divergence
from regrow.methods.recovery.fit_batches import BATCHES, ELEMENTS
from regrow.scoring.gradients import add_gradients
from regrow.settings.recover import Settings
from regrow.store.errors import StoreError
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import load_saved_skeleton
from regrow.streaming.requirements import BLOCKS, MemoryPlan, MemoryTerms, explain_refusal

SPARE = 2**26
"""Bytes that the interpreter and the operations need besides."""
PAIRED = ("dense", "residual")
"""The targets of ``refit`` for which the network before the cut may run beside the one after it."""


def predict_recovery(settings: Settings, source: Path, cut: LastCut, limit: int) -> MemoryTerms:
    """Predict what a recovery needs: interpreter, both networks, gradients, optimizer and activations.

    Args:
        settings: The settings of the recovery.
        source: The folder of the run to recover.
        cut: The cut behind it.
        limit: The limit in bytes.

    Raises:
        InputError: If the network is no transformers model that takes text, or its memory depends on data.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        dtype = torch.float32 if settings.by == "distil" else DTYPES.get(cut.settings.dtype)
        loaded, shapes = load_saved_skeleton(source, mode, dtype)
        if loaded.tokenizer is None:
            raise StoreError(f"{source} holds a model without text")
        tokens = cut.settings.seq_len
        sums = count_sums(settings, cut)
        running = _running_terms(settings.by, loaded.model, tokens, settings.tokens, sums)
    except (StoreError, UnpredictableError) as error:
        raise InputError(f"{str(error).split(';')[0]}, whose memory is not predicted; leave out --memory") from None
    numbers, own = _sizes(loaded.model)
    item = own / max(1, numbers)
    before = (cut.folder.run().get("parent") or {}).get("parameters") or count_parameters(shapes)
    dense = int(before * (item if dtype is None else DTYPES.get(cut.settings.dtype, dtype).itemsize))
    terms = {"the interpreter": read_resident() + SPARE, "the weights of the dense model": dense}
    terms["the weights of the cut model"] = own
    training = _training_terms(own) if settings.by == "distil" else {}
    reading = {"the file of the cut model while it is read": sum(one.bytes for one in shapes.tensors.values())}
    later = settings.by == "distil" or sum(running.values()) > sum(reading.values())
    most = training | (running if later else reading)
    generating = _generating_terms(settings, cut, loaded.model, max(0, before - numbers))
    return MemoryTerms(limit, terms | max(most, generating, key=lambda one: sum(one.values())))


def _generating_terms(settings: Settings, cut: LastCut, model: nn.Module, more: int) -> dict[str, int]:
    """Return what generating text needs that the pruning run did not store; the dense model has ``more`` numbers."""
    specs = source_specs(cut.settings, settings.tokens)
    missing = count_windows(specs.tokens, specs.seq_len) - count_generated(cut.settings)
    if GENERATED not in specs.sources or missing <= 0:
        return {}
    kind = sampling_dtype(model)
    copied = any(one.dtype != kind for one in model.parameters())
    return {"generating text": predict_generation(model, missing, specs.seq_len) + kind.itemsize * more * copied}


def count_sums(settings: Settings, cut: LastCut) -> int:
    """Return how many sums over positions ``refit`` keeps of a layer, as for :func:`predict_later_recovery`.

    Args:
        settings: The settings of the recovery.
        cut: The cut behind it, whose run names the sources.
    """
    sources = len(cut.settings.sources)
    several = sources > 1 and settings.recovery_settings.get("choose_on") == "left_out_source"
    return sources + 2 if several else 3


def predict_later_recovery(by: str, model: nn.Module, window: int, tokens: int, *, sums: int = 3) -> int:
    """Return what a recovery within a pruning run needs beside what the process held, in bytes.

    Both networks count with the shapes before the cut, which is not known yet.

    Args:
        by: The recovery.
        model: The network before the cut, without numbers.
        window: Tokens per window.
        tokens: Tokens that the recovery reads.
        sums: How many sums over positions ``refit`` keeps of a layer: of each source, of those that are fitted, and the
            factor of these.

    Raises:
        UnpredictableError: If its memory depends on data.
    """
    numbers, own = _sizes(model)
    running = sum(_running_terms(by, model, window, tokens, sums).values())
    if by != "distil":
        return SPARE + 2 * own + running
    exact = 4 * numbers  # it trains in float32
    return SPARE + own + exact + sum(_training_terms(exact).values()) + running * exact // max(1, own)


def predict_learning(model: nn.Module, window: int, batch_size: int, sums: int) -> int:
    """Return what a method that learns masks needs beside what the process held, in bytes.

    Args:
        model: The network, without numbers.
        window: Tokens per window.
        batch_size: Windows per batch.
        sums: How many sums of gradients, in float32, are kept meanwhile.

    Raises:
        UnpredictableError: If its memory depends on data.
    """
    numbers, own = _sizes(model)
    activations = sum(_running_terms("lora", model, window, 0).values())
    return SPARE + 2 * own + 4 * numbers * sums + batch_size * activations


def predict_gradients(model: nn.Module, names: Sequence[str], window: int, sums: int) -> int:
    """Return what sums of gradients on windows of text need beside what the process held, in bytes.

    Args:
        model: The network, without numbers.
        names: The parameters whose gradients are summed.
        window: Tokens per window.
        sums: How many sums, in float32, are kept; several are added up to one more.

    Raises:
        UnpredictableError: If its memory depends on data.
    """
    total: dict[str, Tensor] = {}

    def step(model: nn.Module, batch: Batch) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        add_gradients(model, batch, names, total, NEXT_TOKEN, count=window)

    peak = predict_memory(model, text_batch(model, window), step).peak
    each, own = sum(4 * model.get_parameter(name).numel() for name in names), _sizes(model)[1]
    return SPARE + max(peak + each * (sums - 1), own + each * (sums + (sums > 1)))


def predict_refit(model: nn.Module, tokens: int, window: int, *, sums: int = 3) -> int:
    """Return what refit needs besides the weights while it solves the layers of one block, in bytes.

    Args:
        model: The network before the cut, without numbers.
        tokens: Tokens that it reads.
        window: Tokens per window.
        sums: As for :func:`predict_later_recovery`.
    """
    return sum(_refit_terms(model, tokens, window, sums).values())


def count_activations(model: nn.Module, tokens: int, window: int) -> int:
    """Return how many bytes the activations of a network take while refit runs its batches in turns.

    That is inputs, outputs and what is added to them at the largest layer, of all positions; and what one batch needs
    between two layers.

    Args:
        model: The network, which may be without numbers.
        tokens: The number of positions.
        window: Tokens per window.
    """
    linear = [one for one in model.parameters() if one.dim() == 2]
    shapes = [one.shape for one in linear[1:] or linear]
    batch = min(tokens, max(ELEMENTS, tokens // BATCHES) + window)
    waiting = tokens * max(one.element_size() for one in linear) * max(k + 2 * out for out, k in shapes)
    return waiting + 4 * batch * max(map(max, shapes)) * 4


def predict_pairing(network: StreamedNetwork, tokens: int, window: int) -> int:
    """Return what refit to the dense network needs besides, where both networks run one block at a time, in bytes.

    That is the cut network, counted with the shapes before the cut, and its activations, beside those of the dense one.

    Args:
        network: The network before the cut.
        tokens: Tokens that refit reads.
        window: Tokens per window.
    """
    outer = sum(map(network.weights.bytes_of, network.outer))
    return outer + BLOCKS["evaluating"] * network.largest_block + count_activations(network.model, tokens, window)


def plan_pairing(plan: MemoryPlan, more: int) -> MemoryPlan:
    """Return the prediction for refit to the dense network (:data:`PAIRED`).

    Args:
        plan: The prediction with one of the networks in memory.
        more: What :func:`predict_pairing` returns.
    """
    return replace(plan, least=plan.least + more, results=2 * plan.results)


def explain_lacking(plan: MemoryPlan, more: int) -> str:
    """Say why there is no room for refit to the dense network, and what to do; empty if there is.

    Args:
        plan: The prediction with one of the networks in memory, which says where hidden states are.
        more: What :func:`predict_pairing` returns.
    """
    both = plan_pairing(plan, more)
    if both.least + (0 if plan.on_disk else both.results) <= plan.limit:
        return ""
    what = "fitting to what the dense network has, with a block of both networks in memory,"
    return explain_refusal(what, both.least + both.results, plan.limit, "")


def text_batch(model: nn.Module, window: int) -> Batch:
    """Return one window of text, whose shape is all that a prediction needs.

    Args:
        model: The network that will read it.
        window: Tokens per window.
    """
    ids = torch.zeros(1, window, dtype=torch.int64)
    return Batch((ids,), {"use_cache": False} if hasattr(model, "config") else {}, ids)


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the parameters of a network have, and how many bytes."""
    every = [*model.parameters()]
    return sum(one.numel() for one in every), sum(one.numel() * one.element_size() for one in every)


def _training_terms(own: int) -> dict[str, int]:
    """Return what training all weights needs beside them and the activations."""
    return {"gradients": own, "optimizer moments": 2 * own, "the best values": own}


def _running_terms(by: str, model: nn.Module, window: int, tokens: int, sums: int = 3) -> dict[str, int]:
    """Return what a recovery needs while the network runs."""
    if by in ("lora", "distil"):  # the step had weights, gradients and two moments
        return {"activations": max(0, _predict_step(by, model, window) - 4 * _sizes(model)[1])}
    widest = max((one.shape[0] for one in model.parameters() if one.dim() == 2), default=1)
    return {"activations": 3 * window * widest * 4} | (
        _refit_terms(model, tokens, window, sums) if by == "refit" else {}
    )


def _predict_step(by: str, model: nn.Module, tokens: int) -> int:
    """Return the peak of a training step of all weights on several batches, in bytes."""
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

    return predict_memory(model, text_batch(model, tokens), step).peak


def _refit_terms(model: nn.Module, tokens: int, window: int, parts: int = 3) -> dict[str, int]:
    """Return what refit needs for all positions at one layer, and for the sums of the widest layer."""
    linear = [one.shape for one in model.parameters() if one.dim() == 2]
    sums = max(8 * (k * k + k * out) for out, k in linear[1:]) if len(linear) > 1 else 0
    return {"all windows at a layer": count_activations(model, tokens, window), "sums": parts * sums}
