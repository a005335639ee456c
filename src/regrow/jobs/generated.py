"""Text that the model of a run generates to calibrate on, stored in the run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.data.windows import find_separator, find_start
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import broadcast_tensors
from regrow.evaluation.generation import generate_tokens
from regrow.jobs.inputs import PendingWindows, SourceHalves, SourceSpecs, count_windows, generated_source
from regrow.jobs.prune_settings import source_specs
from regrow.jobs.reconstruction import count_calibration, count_tokens
from regrow.nets import Loaded
from regrow.settings.prune import Settings
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.statistics import parameter_sums
from regrow.store.tensors import read_tensors, write_tensors

FILE = "generated/windows.safetensors"
"""The file in a run folder: a folder of its own, since loaders of models read all weights beside a configuration."""
FORMAT = "regrow-generated/1"


def count_generated(settings: Settings) -> int:
    """Return how many windows a pruning run needs at most, of the parts that use different amounts.

    Args:
        settings: The settings of the run.
    """
    amounts = [settings.generated_tokens or settings.tokens]
    if settings.reconstruct and count_tokens(settings, text=True) != count_calibration(settings):
        amounts.append(source_specs(settings, count_tokens(settings, text=True)).tokens)
    if settings.recover:
        amounts.append(source_specs(settings, settings.recover_tokens).tokens)
    return count_windows(max(amounts), settings.seq_len)


def fill_generated(
    kinds: SourceHalves,
    specs: SourceSpecs,
    loaded: Loaded,
    n: int,
    folder: Path | None = None,
    *,
    known: Sequence[Path | Tensor] = (),
    progress: Progress = silent,
    ranks: ProcessRank = SINGLE,
    weights: Sequence[float] | None = None,
) -> SourceHalves:
    """Generate the text of a run, or read what its folder has of it; without a source that is pending, do nothing.

    Args:
        kinds: The data of the run.
        specs: The sources, and how much of each.
        loaded: The model that generates.
        n: How many windows are stored: at least as many as ``specs`` says.
        folder: The run folder, which gets the windows, stretch by stretch; ``None``: nothing is written.
        known: Windows of the same model, or run folders that may have some.
        progress: Called with (tokens so far, tokens in all, what is being done).
        ranks: The processes; rank 0 generates for all.
        weights: A sum of each parameter of the model; ``None``: they are in memory, and are summed.

    Raises:
        InputError: If the model cannot generate text.
        StoreError: If the disk is full.
    """
    if not kinds.pending:
        return kinds
    tokens = _empty_windows(specs, loaded, n)
    if ranks.leads:
        path = None if folder is None else folder / FILE
        header = _header(specs, loaded, weights)
        for one in (*known, *([folder] if folder else [])):
            _copy_known(tokens, one if isinstance(one, Tensor) else _read(one / FILE, header))

        def store() -> None:
            if path is not None:
                with explain_os_errors(path.parent):
                    path.parent.mkdir(exist_ok=True)
                write_tensors(path, {"tokens": tokens}, header, FORMAT)

        if (tokens < 0).any():
            separator = find_separator(loaded.tokenizer)
            generate_tokens(loaded.model, tokens, separator, specs.seed, progress=progress, store=store)
        store()
    broadcast_tensors(ranks, [tokens])
    filled = (
        generated_source(specs, loaded, tokens) if isinstance(one.batches, PendingWindows) else one
        for one in kinds.calibration
    )
    return replace(kinds, calibration=tuple(filled), generated=tokens)


def check_stored(
    kinds: SourceHalves, specs: SourceSpecs, loaded: Loaded, n: int, known: Sequence[Path], weights: Sequence[float]
) -> None:
    """Raise InputError unless run folders have all text of a run whose network, read block by block, cannot generate.

    Args:
        kinds: The data of the run.
        specs: The sources, and how much of each.
        loaded: The model, without numbers.
        n: As for :func:`fill_generated`.
        known: The run folders.
        weights: A sum of each parameter of the model.

    Raises:
        InputError: If text is missing.
    """
    if not kinds.pending:
        return
    tokens, header = _empty_windows(specs, loaded, n), _header(specs, loaded, weights)
    for folder in known:
        _copy_known(tokens, _read(folder / FILE, header))
    if missing := int((tokens < 0).any(1).sum()):
        raise InputError(
            f"source 'generated' lacks {missing} of {n} windows, and a network that is read one block at a time cannot "
            "generate them; give more --memory, or fewer --tokens"
        )


def _empty_windows(specs: SourceSpecs, loaded: Loaded, n: int) -> Tensor:
    """Return windows all of whose tokens are missing."""
    return torch.full((n, specs.seq_len - len(find_start(loaded.tokenizer))), -1)


def _header(specs: SourceSpecs, loaded: Loaded, weights: Sequence[float] | None) -> dict[str, object]:
    """Return what the text depends on: seed, first token, vocabulary and weights."""
    model: Any = loaded.model
    return {
        "seed": specs.seed,
        "separator": find_separator(loaded.tokenizer),
        "vocabulary": len(model.get_input_embeddings().weight),
        "weights": parameter_sums(model) if weights is None else list(weights),
    }


def _read(path: Path, header: Mapping[str, object]) -> Tensor | None:
    """Return stored windows; ``None`` if there is no usable file, or it is of another model, seed or vocabulary."""
    try:
        found, tensors = read_tensors(path, FORMAT)
    except StoreError:
        return None
    tokens = tensors.get("tokens")
    if tokens is None or tokens.dtype != torch.int64 or tokens.dim() != 2 or not tokens.numel():
        return None
    own = int(tokens.min()) >= -1 and int(tokens.max()) < int(str(header["vocabulary"]))
    return tokens if own and all(found.get(name) == value for name, value in header.items()) else None


def _copy_known(tokens: Tensor, known: Tensor | None) -> None:
    """Fill in windows that are known, as far as they have the same length."""
    if known is not None and known.shape[1] == tokens.shape[1]:
        n = min(len(tokens), len(known))
        tokens[:n] = torch.where(known[:n] >= 0, known[:n], tokens[:n])
