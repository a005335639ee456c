"""The result of loading a model: the network, an example input, how to build it again, and the files of its weights."""

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from regrow.core.axes import Example
from regrow.core.errors import InputError, install_command
from regrow.core.limits import reason
from regrow.core.sources import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SUFFIXES = (".safetensors", ".gguf")  # of weight files
TOKENS = 16  # of an example input
PIXELS = 224  # height and width of an example input; of signals, the number of samples
CLIP = (16, 112, 112)  # frames, height and width of an example input of three dimensions
MAX_ENTRIES = 2**28  # of an example input


class ModelError(InputError):
    """Raised if a model cannot be found, read or built; one line with the value and the remedy."""


def missing_package(extra: str, package: str) -> ModelError:
    """Return the error for an optional package that is not installed, which an extra of regrow installs."""
    return ModelError(f"this needs {package}, which is not installed: {install_command(extra)}")


@dataclass(frozen=True)
class Origin:
    """How to build an architecture again, as plain data: no weights and no code.

    Args:
        kind: ``"transformers"``, ``"torchvision"``, ``"small"``, ``"cells"``, ``"mobile"`` or ``"callable"``.
        reference: The class (transformers), the model's name (torchvision, small) or ``pkg.mod:fn`` (callable), which
            is informative: it is never imported.
        config: The arguments to build it with: a transformers configuration, the builder's arguments, or nothing.
        name: What the user called the model (it may be a path); informative, nothing is built from it.
        builder: For ``"callable"``: the function that the user passed in this process; it is not saved.
    """

    kind: str
    reference: str
    config: Mapping[str, object] = field(default_factory=dict)
    name: str = ""
    builder: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension, for small, cells and mobile; else empty."""
        shape = self.config.get("shape")
        return tuple(shape) if isinstance(shape, list | tuple) else ()

    @property
    def normalised_images(self) -> bool:
        """Whether it takes images normalised as torchvision's pretrained networks do, and not of values 0 to 1."""
        return self.kind not in ("small", "cells", "mobile")

    def record(self) -> dict[str, object]:
        """Return the origin as JSON data, without the function."""
        return {"kind": self.kind, "reference": self.reference, "config": dict(self.config), "name": self.name}


class WeightFile:
    """A file as it was when it was opened: its size, times and inode, with which :meth:`check` compares it later.

    ``handle``: the descriptor of the open file; ``None``: the file now at ``path``; ``held``: its content is in memory.
    Raises InputError if it is gone.
    """

    def __init__(self, path: Path, handle: int | None = None, *, held: bool = False) -> None:
        self.path, self.held = path, held
        self.status = self._read(handle)

    def check(self, handle: int | None = None) -> None:
        """Raise InputError unless the file is the one that was opened, unchanged; it may get or lose hard links."""
        now = self._read(handle)
        # Device, inode, size and content are the same, and a hard link came or went, which changes the inode's time.
        linked = now[:4] == self.status[:4] and now[5] != self.status[5]
        if now != self.status and not linked:
            raise InputError(
                f"{self.path} was replaced or written to while it was in use; nothing is saved, start again"
            )
        self.status = now

    @property
    def record(self) -> dict[str, int]:
        """Inode, size and times (in nanoseconds) as JSON data, by which a later process recognises the file."""
        return dict(zip(("inode", "bytes", "modified", "changed"), self.status[1:5], strict=True))

    def leads_to_it(self) -> bool:
        """Whether the path still leads to the file that was opened, which may have been changed."""
        try:
            return self._read(None)[:2] == self.status[:2]
        except InputError:
            return False

    def _read(self, handle: int | None) -> tuple[int, ...]:
        """Return device, inode, size, times of content and inode, and number of links; InputError if it is gone."""
        try:
            now = os.stat(self.path) if handle is None else os.fstat(handle)  # noqa: PTH116 (alike for both)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read any more ({reason(error)}); put it back") from None
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_nlink


@dataclass(frozen=True)
class Loaded:
    """A loaded model, with all that is needed to trace and save it.

    Args:
        model: The network, in eval mode.
        tokenizer: Its tokenizer, or ``None``.
        example: An input to trace it with, on the model's device.
        origin: How to build the architecture again.
        notes: What a reader of results must know about these weights (de-quantised, random).
        guessed: Whether the shape of the example input is a guess.
        files: The files of its weights, as they were when they were opened.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    example: Example
    origin: Origin
    notes: tuple[str, ...] = ()
    guessed: bool = False
    files: tuple[WeightFile, ...] = ()


def find_weight_files(path: Path) -> tuple[WeightFile, ...]:
    """Return the ``.safetensors`` and ``.gguf`` files in a folder, or ``path`` itself, marked as ``held`` in memory."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return tuple(WeightFile(file, held=True) for file in files if file.suffix in _SUFFIXES and file.is_file())


def check_unchanged(files: Iterable[WeightFile]) -> None:
    """Raise InputError if a file was changed; one whose content is in memory may be gone or replaced by another."""
    for file in files:
        if not file.held or file.leads_to_it():
            file.check()


def longest_input(model: nn.Module) -> int:
    """Return the most tokens that a model of transformers takes, by its configuration; 2³¹ if that says nothing."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31


def text_example(model: nn.Module, vocabulary: int, shape: Sequence[int] = (1, TOKENS)) -> Example:
    """Return token ids of a shape, int64, spread over ``vocabulary`` (their number), always the same; no cache."""
    # Multiples of a prime: spread over the vocabulary, and not the low ids that are special tokens.
    tokens = ((torch.arange(1, prod(shape) + 1) * 7919) % vocabulary).view(tuple(shape)).to(device_of(model))
    kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = tokens
    return Example((tokens,), kwargs)


def image_example(model: nn.Module, *shape: int) -> Example:
    """Return one image of noise, ``[1, *shape]``, in the model's dtype and on its device; always the same."""
    return noise_example(model, (1, *shape))


def noise_example(model: nn.Module, shape: Sequence[int]) -> Example:
    """Return noise of a shape in the model's dtype and on its device; always the same."""
    noise = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    return Example((noise.to(next(model.parameters(), noise)),))


def shaped_example(model: nn.Module, shape: Sequence[int]) -> Example:
    """Return an example input of a given shape: tokens if the network starts with an embedding, else noise.

    >>> shaped_example(nn.Linear(3, 2), (5, 3)).args[0].shape, shaped_example(nn.Embedding(7, 2), (1, 4)).args[0].dtype
    (torch.Size([5, 3]), torch.int64)
    """
    for layer in model.modules():
        if isinstance(layer, nn.Embedding):
            return text_example(model, layer.num_embeddings, shape)
        if _has_own_parameters(layer):
            break
    return noise_example(model, shape)


def _has_own_parameters(layer: nn.Module) -> bool:
    """Whether a module has parameters besides those of its submodules."""
    return next(layer.parameters(recurse=False), None) is not None


def read_shape(text: str) -> tuple[int, ...]:
    """Parse an input shape as users write it on the command line; ModelError unless it is one.

    >>> read_shape("1x3x32x32")
    (1, 3, 32, 32)
    """
    if not re.fullmatch(r"\d{1,9}(x\d{1,9})*", text) or not 0 < prod(map(int, text.split("x"))) <= MAX_ENTRIES:
        raise ModelError(f"an input is sizes joined by x, batch first, like 1x3x32x32; got {text!r:.60}")
    return tuple(map(int, text.split("x")))


def format_shape(example: Example) -> str:
    """Return the shapes of an input's positional tensors, each as :func:`read_shape` parses it, joined by commas.

    >>> format_shape(Example((torch.ones(1, 3, 8, 8),)))
    '1x3x8x8'
    """
    values = [x for value in example.args for x in (value if isinstance(value, list | tuple) else [value])]
    return ", ".join("x".join(map(str, x.shape)) for x in values if isinstance(x, torch.Tensor))


def log_guess(example: Example) -> None:
    """Log which example input was guessed, since multiply–accumulates are counted for it."""
    how = "(guessed; set it with --input 1x3x32x32 or example=, or give an image source)"
    logging.getLogger("regrow").warning("example input: %s %s", format_shape(example), how)


def guess_example(model: nn.Module, pixels: int = 0) -> Example | None:
    """Return an input for the first registered layer with weights; ``None`` if that layer does not determine it.

    ``pixels``: height and width where the layer leaves them open; 0: ``PIXELS``.

    >>> guess_example(nn.Sequential(nn.Linear(3, 2))).args[0].shape
    torch.Size([1, 3])
    """
    for layer in model.modules():
        match layer:
            case nn.Embedding():
                return text_example(model, layer.num_embeddings)
            case nn.Linear():
                return noise_example(model, (1, layer.in_features))
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                spatial_dims = layer.weight.dim() - 2
                sides = CLIP if spatial_dims == 3 else (pixels or PIXELS,) * spatial_dims
                return noise_example(model, (1, layer.in_channels, *sides))
            case _ if _has_own_parameters(layer):
                return None
    return None


def run_error(model: nn.Module, example: Example) -> Exception | None:
    """Run a network on an input without gradients, and return the error that it raises; ``None``: it raises none."""
    try:
        with torch.no_grad():
            model(*example.args, **example.kwargs)
    except Exception as error:  # whatever a user's network raises
        return error
    return None
