"""The data of a run: calibration and evaluation halves of its sources, as text windows or images for its model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from regrow import data
from regrow.core.errors import InputError
from regrow.core.source_names import GENERATED, check_evaluated
from regrow.core.sources import Batch, Source
from regrow.data import Half
from regrow.data.text import find_separator, find_start, token_windows
from regrow.data.vision import digits, images
from regrow.evaluation.generation import check_generation, describe_generated
from regrow.nets import Loaded


@dataclass(frozen=True)
class SourceSpecs:
    """The sources of a run, and how much of each is used.

    Args:
        eval_tokens: Evaluation tokens (or images) per source.
        seq_len: Tokens per window of text.
        sources: The sources for calibration, also used for evaluation, as ``--source`` takes them.
        unseen: The sources for evaluation only.
        tokens: Calibration tokens (or images) per source.
        seed: Seed of the choice of calibration windows.
        generated_tokens: Calibration tokens of text that the model generates; 0: as many as of other sources.
    """

    eval_tokens: int
    seq_len: int
    sources: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    tokens: int = 0
    seed: int = 0
    generated_tokens: int = 0


@dataclass(frozen=True)
class SourceHalves:
    """The sources of a run: calibration halves, and evaluation halves of the same and then of unseen sources.

    Args:
        calibration: The calibration halves.
        evaluation: The evaluation halves, of the same sources in the same order, then of unseen ones.
        generated: The tokens of all windows that the model generated, of which ``calibration`` may have the first;
            ``None``: none yet.
    """

    calibration: tuple[Source, ...]
    evaluation: tuple[Source, ...]
    generated: Tensor | None = field(default=None, compare=False)

    @property
    def seen(self) -> frozenset[str]:
        """The names of the calibration sources."""
        return frozenset(source.name for source in self.calibration)

    @property
    def pending(self) -> bool:
        """Whether a source is text that is still to be generated."""
        return any(isinstance(source.batches, PendingWindows) for source in self.calibration)


@dataclass(frozen=True)
class PendingWindows(Sequence[Batch]):
    """Windows that the model is still to generate: only their number is known.

    Args:
        number: The number of windows.
    """

    number: int

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: object) -> NoReturn:
        """Raise RuntimeError: there is nothing to read."""
        raise RuntimeError(f"window {index} is read before it is generated")


def read_sources(specs: SourceSpecs, loaded: Loaded, generated: Tensor | None = None) -> SourceHalves:
    """Read the calibration and evaluation halves of every named source; generated text has no evaluation half.

    Args:
        specs: The sources, and how much of each.
        loaded: The model, whose tokenizer or input shape decides the form of the data.
        generated: The tokens of the windows that the model generated, of which the source takes the first; ``None``:
            they are pending.

    Raises:
        ValueError: If a source is unknown, empty, too short, named twice, or of no use for the model.
    """
    check_evaluated(specs.unseen)
    every = (*specs.sources, *specs.unseen)
    names = [spec.partition("=")[0] for spec in every]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two sources are named {twice!r}; give each its own name: NAME=PATH")
    if GENERATED in names and GENERATED not in every:
        raise InputError(f"source {GENERATED!r} is text that the model generates; give {GENERATED}=PATH another name")
    return SourceHalves(
        tuple(
            generated_source(specs, loaded, generated)
            if spec == GENERATED
            else _source(specs, loaded, spec, Half.CALIBRATION, specs.tokens)
            for spec in specs.sources
        ),
        tuple(_source(specs, loaded, spec, Half.EVALUATION, specs.eval_tokens) for spec in every if spec != GENERATED),
        generated,
    )


def generated_source(specs: SourceSpecs, loaded: Loaded, tokens: Tensor | None) -> Source:
    """Return the source of text that the model generated.

    Args:
        specs: The sources, and how much of each.
        loaded: The model.
        tokens: The tokens of at least as many windows; ``None``: they are pending.

    Raises:
        InputError: If the model has no tokenizer, or cannot generate text.
    """
    if loaded.tokenizer is None:
        raise InputError(
            f"source {GENERATED!r} is text that the model generates, and this model has no tokenizer; name a language "
            "model, or another source"
        )
    check_generation(loaded.model)
    find_separator(loaded.tokenizer)
    n = count_windows(specs.generated_tokens or specs.tokens, specs.seq_len)
    if tokens is None:
        return Source(GENERATED, PendingWindows(n))
    origin = describe_generated(n, specs.seq_len, specs.seed)
    return token_windows(GENERATED, tokens[:n], find_start(loaded.tokenizer), origin)


def count_windows(tokens: int, seq_len: int) -> int:
    """Return how many windows of a text source are read.

    >>> count_windows(100, 32), count_windows(20, 32)
    (3, 1)

    Args:
        tokens: The tokens asked for.
        seq_len: Tokens per window.
    """
    return max(1, tokens // seq_len)


def _source(specs: SourceSpecs, loaded: Loaded, spec: str, half: Half, amount: int) -> Source:
    if loaded.tokenizer is not None:
        n = count_windows(amount, specs.seq_len)
        seed = specs.seed if half is Half.CALIBRATION else 0
        return data.windows(data.text(spec), loaded.tokenizer, n=n, seq_len=specs.seq_len, seed=seed, half=half)
    shape = _image_shape(loaded, spec)
    seed = specs.seed if half is Half.CALIBRATION else 0
    if spec == "digits":
        return digits(n=amount, size=shape[-1], channels=shape[1], seed=seed, half=half)
    name, equals, path = spec.partition("=")
    if not equals or not name.strip() or not path.strip():
        raise InputError(
            f"source {spec!r} names no images, which this model takes; write digits, or NAME=FOLDER of class folders"
        )
    return images(
        name,
        Path(path),
        n=amount,
        size=shape[-1],
        channels=shape[1],
        seed=seed,
        half=half,
        normalised=loaded.origin.normalised_images,
    )


def _image_shape(loaded: Loaded, spec: str) -> torch.Size:
    """Return the shape ``[N, C, H, W]`` of the images that a model takes.

    Raises:
        InputError: If the model takes no square images, or is not in float32, in which images are read.
    """
    shape = next((arg.shape for arg in loaded.example.args if isinstance(arg, torch.Tensor)), torch.Size())
    if len(shape) != 4:
        raise InputError(
            f"source {spec!r} holds images, and the model takes inputs of shape {list(shape)}, which no source has; "
            "leave --source out"
        )
    height, width = shape[2:]
    if height != width or (spec != "digits" and shape[1] not in (1, 3)):
        raise InputError(
            f"source {spec!r} gives square images of 1 or 3 channels, and the model takes "
            f"{shape[1]} × {height} × {width}; use regrow.prune in Python with batches of your own"
        )
    kind = next(loaded.model.parameters()).dtype
    if kind != torch.float32:
        raise InputError(f"images are read in float32, and the model is in {str(kind)[6:]}; leave out --dtype")
    return shape


def describe_sources(specs: SourceSpecs, kinds: SourceHalves) -> list[dict[str, object]]:
    """Return the rows of ``run.json`` about the sources: name, origin, and tokens used.

    Args:
        specs: The sources, and how much of each.
        kinds: The data that were read.
    """
    tests, rows = iter(kinds.evaluation), []
    for i, spec in enumerate((*specs.sources, *specs.unseen)):
        own = kinds.calibration[i] if i < len(kinds.calibration) else None
        test = None if spec == GENERATED else next(tests)
        parts = {"calibration": own, "evaluation": test}
        name = next(one.name for one in (test, own) if one is not None)
        origin = "; ".join(f"{half}: {one.origin}" for half, one in parts.items() if one is not None)
        counts = {f"{half}_tokens": one.tokens if one else 0 for half, one in parts.items()}
        rows.append({"name": name, "spec": spec, "origin": origin, **counts})
    return rows
