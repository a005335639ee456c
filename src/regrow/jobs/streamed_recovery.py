"""Recoveries of networks that may be larger than memory: what they need, and both networks one block at a time."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from regrow.core.axes import AxisGraph
from regrow.core.errors import InputError, ResourceError
from regrow.core.names import GENERATED
from regrow.core.process_memory import read_resident
from regrow.core.sources import Batch, logits_in
from regrow.evaluation import UnpredictableError, predict_memory
from regrow.evaluation.generation import predict_generation, sampling_dtype
from regrow.jobs.inputs import count_windows
from regrow.jobs.models import DTYPES
from regrow.jobs.parents import count_parameters
from regrow.jobs.prune_settings import source_specs
from regrow.jobs.recovering import LastCut, count_generated
from regrow.methods.recovery import ChangedTensors, StreamedPair
from regrow.methods.recovery.distil import divergence
from regrow.methods.recovery.refit_work import BATCHES, ELEMENTS
from regrow.nets import Loaded
from regrow.settings.recover import Settings
from regrow.store import statistics
from regrow.store.errors import StoreError
from regrow.store.shapes import Shapes
from regrow.store.state import named_tensors
from regrow.store.weights import OutsideTensors
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import OpenedNetwork, load_saved_skeleton
from regrow.streaming.requirements import BLOCKS, MemoryPlan, MemoryTerms, explain_refusal, plan_memory
from regrow.streaming.weights import StoredWeights
from regrow.tracing.blocks import GraphBlock

SPARE = 2**26
"""Bytes that the interpreter and the operations need besides."""
PAIRED = ("dense", "residual")
"""The targets of ``refit`` for which the network before the cut may run beside the one after it."""
CHANGED = "changed"
"""The folder, among the files for resuming, with the tensors that a recovery has changed."""
RESULTS = "results"
"""The folder, among the files for resuming, with the hidden states for which memory has no room."""


@dataclass(frozen=True, eq=False)
class StreamedRecovery:
    """The networks before and after a cut, to be recovered one block at a time.

    Args:
        dense: The network before the cut, without numbers, and its stored weights.
        cut: The network after the cut.
        plan: How the run stays within its memory.
        lacking: Why memory has no room for a block of both at a time, and what to do; empty: it has.
    """

    dense: OpenedNetwork
    cut: OpenedNetwork
    plan: MemoryPlan
    lacking: str = ""

    def models(self) -> tuple[Loaded, Loaded]:
        """Return the model before the cut, and the one to recover, both without numbers."""
        dense, cut = self.dense.loaded, self.cut.loaded
        return dense, replace(dense, model=cut.model, files=(*dense.files, *cut.files))

    def start(self, folder: Path) -> StreamedPair:
        """Return both networks, to be run block by block; what hidden states a killed run left is deleted."""
        shutil.rmtree(folder / statistics.FOLDER / RESULTS, ignore_errors=True)
        results = self._results(folder)
        if results is not None:
            results.mkdir(parents=True)
        changed = ChangedTensors(folder / statistics.FOLDER / CHANGED)
        return StreamedPair(self.dense.network(results), self.cut.network(results), changed, self.lacking)

    def outside(self, model: Loaded, changed: ChangedTensors) -> OutsideTensors:
        """Return the tensors of the recovered network, which has no numbers, as ``store.write_model`` takes them."""
        weights, recording = self.cut.weights, self.cut.axes.recording
        blocks = recording.blocks if recording is not None else ()

        def each(shapes: Shapes) -> Iterator[tuple[str, Tensor]]:
            held = named_tensors(model.model)
            for name in shapes.tensors:
                if name in changed:
                    yield name, changed[name]
                else:
                    yield name, weights[name] if name in weights else held[name].tensor

        @contextmanager
        def running(place: Path) -> Iterator[nn.Module]:
            with self._written(model.model, place, blocks).on_demand() as net:
                yield net

        aligned = all(map(weights.is_aligned, weights.stored))
        return OutsideTensors(each, running, aligned, ahead=self.cut.network().largest_block)

    def recovered(self, model: Loaded, axes: AxisGraph, folder: Path) -> StreamedNetwork:
        """Return the recovered network, as it was written to the run folder, to be run one block at a time."""
        blocks = axes.recording.blocks if axes.recording is not None else ()
        return self._written(model.model, folder, blocks, self._results(folder))

    def _written(
        self, model: nn.Module, folder: Path, blocks: tuple[GraphBlock, ...], results: Path | None = None
    ) -> StreamedNetwork:
        stored = Checkpoint.open(folder).places
        weights = StoredWeights(Checkpoint(stored, stored), model, self.cut.weights.name)
        return StreamedNetwork(model, weights, blocks, results)

    def _results(self, folder: Path) -> Path | None:
        return folder / statistics.FOLDER / RESULTS if self.plan.on_disk else None


def predict_recovery(settings: Settings, source: Path, cut: LastCut, limit: int) -> MemoryTerms:
    """Predict what a recovery needs of a limit in bytes, with both networks in memory.

    Raises:
        InputError: If the network is no transformers model that takes text, or its memory depends on data.
    """
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
    reading = {"the file of the cut model while it is read": sum(one.bytes for one in shapes.tensors.values())}
    generating = _generating_terms(settings, cut, model, max(0, dense - numbers))
    most = max(work, reading, generating, key=lambda terms: sum(terms.values()))
    return MemoryTerms(limit, {"the interpreter": read_resident() + SPARE} | weights | most)


def _generating_terms(settings: Settings, cut: LastCut, model: nn.Module, lost: int) -> dict[str, int]:
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


def count_sums(settings: Settings, cut: LastCut) -> int:
    """Return how many sums over positions ``refit`` keeps of a layer: of each source, of all, and their factor."""
    sources = len(cut.settings.sources)
    several = sources > 1 and settings.recovery_settings.get("choose_on") == "left_out_source"
    return sources + 2 if several else 3


def plan_recovery(settings: Settings, cut: LastCut, dense: OpenedNetwork, terms: MemoryTerms) -> tuple[MemoryPlan, str]:
    """Predict what a recovery needs with one block in memory; raise ResourceError if that is more than the limit.

    Returns:
        The prediction, and why there is no room for a block of both networks at a time, if there is none.
    """
    sources, window = max(1, len(cut.settings.sources)), cut.settings.seq_len
    windows = sources * count_windows(settings.tokens // sources, window)
    most = max(windows, (len(cut.settings.unseen) + sources) * count_windows(cut.settings.eval_tokens, window))
    network = dense.network()
    plan = plan_memory(network, sys.maxsize, most, window, what="evaluating")
    refit, sums = settings.by == "refit", count_sums(settings, cut)
    more = predict_refit(dense.loaded.model, windows * window, window, sums=sums) if refit else 0
    plan = replace(plan, limit=terms.limit, whole=terms.needed, least=plan.least + more, decision=True)
    beside = predict_pairing(network, windows * window, window) if refit else 0
    paired = refit and settings.recovery_settings.get("target") in PAIRED
    plan = plan_pairing(plan, beside) if paired else plan
    if plan.least > plan.limit:
        raise ResourceError(explain_refusal(f"recovery by {settings.by}", plan.least, plan.limit))
    return plan, explain_lacking(plan, beside) if refit and not paired else ""


def predict_later_recovery(by: str, model: nn.Module, window: int, tokens: int, *, sums: int = 3) -> int:
    """Return what a recovery within a pruning run needs beside what the process held, in bytes.

    Both networks count with the shapes before the cut, which is not known yet.

    Args:
        by: The recovery.
        model: The network before the cut, without numbers.
        window: Tokens per window.
        tokens: Tokens that the recovery reads.
        sums: As :func:`count_sums`.

    Raises:
        UnpredictableError: If its memory depends on data.
    """
    weights, work = _recovery_terms(by, model, _sizes(model)[1], window, tokens, sums)
    return SPARE + sum((*weights.values(), *work.values()))


def predict_learning(model: nn.Module, names: Sequence[str], window: int, batch_size: int, sums: int) -> int:
    """Return what a method that needs gradients of a network needs beside what the process held, in bytes.

    Args:
        model: The network, without numbers.
        names: The parameters whose gradients are summed, in float32.
        window: Tokens per window.
        batch_size: Windows per batch.
        sums: How many sums are kept.

    Raises:
        UnpredictableError: If its memory depends on data.
    """
    size = _sizes(model)[1]
    summed = sum(4 * model.get_parameter(name).numel() for name in names)
    activations = max(0, _predict_step("lora", model, window) - 4 * size)
    return SPARE + 2 * size + sums * summed + batch_size * activations


def predict_refit(model: nn.Module, tokens: int, window: int, *, sums: int = 3) -> int:
    """Return what refit needs besides the weights while it solves the layers of one block, in bytes."""
    return sum(_refit_terms(model, tokens, window, sums).values())


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
    """Say why there is no room for refit to the dense network, and what to do; empty if there is.

    Args:
        plan: The prediction with one of the networks in memory, which says where hidden states are.
        beside: What :func:`predict_pairing` returns.
    """
    both = plan_pairing(plan, beside)
    if both.least + (0 if plan.on_disk else both.results) <= plan.limit:
        return ""
    what = "fitting to what the dense network has, with a block of both networks in memory,"
    return explain_refusal(what, both.least + both.results, plan.limit, "")


def text_batch(model: nn.Module, window: int) -> Batch:
    """Return one window of text, whose shape is all that a prediction needs."""
    ids = torch.zeros(1, window, dtype=torch.int64)
    return Batch((ids,), {"use_cache": False} if hasattr(model, "config") else {}, ids)


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Return how many numbers the parameters of a network have, and how many bytes."""
    parameters = [*model.parameters()]
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)


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
    linear = [parameter.shape for parameter in model.parameters() if parameter.dim() == 2]
    sums = max(8 * (k * k + k * out) for out, k in linear[1:]) if len(linear) > 1 else 0
    return {"all windows at a layer": count_activations(model, tokens, window), "sums": parts * sums}
