"""Export networks to the file formats of other tools, and check each file by reading it back.

Here: the result of an export, its errors, and what exports to a folder share.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import Example
from regrow.core.errors import RefusedError, first_line
from regrow.core.sources import move_inputs
from regrow.evaluation.measure import evaluating
from regrow.nets.loaded import format_shape
from regrow.store.errors import StoreError
from regrow.store.models import link_other_files
from regrow.store.probe import max_difference
from regrow.store.replacing import WORK, replace_folder
from regrow.store.run_folder import WritePage
from regrow.store.shapes import SHAPES

ROUNDING = 1e-4  # the allowed output difference, relative to the largest output: memory layout can change rounding


Results = dict[str, float | int | str]  # what was compared → its result


class ExportError(ValueError):
    """Raised if a format cannot hold the network, or the file cannot be written or read back."""


class CheckError(ExportError, RefusedError):
    """Raised if an export, read back, differs from the network; the export is not kept."""


@dataclass(frozen=True)
class ExportResult:
    """The result of an export: where it is, its size, and how it compared with the network."""

    path: Path  # the file or folder
    bytes: int  # of all files
    checked: Results = field(default_factory=dict)  # what was compared when it was read back → result
    notes: tuple[str, ...] = ()  # what a user of the file must know
    memory: Mapping[str, int | None] = field(default_factory=dict)  # limit, prediction, peak: bytes, if limited


@contextmanager
def export_folder(out: Path, card: WritePage) -> Iterator[Path]:
    """Context manager: yields a temporary folder that replaces ``out`` if the block succeeds.

    ``card``: called with that folder at the end, to write the model card. Files in ``out`` that belong to no model are
    linked into it, unless the block wrote files of these names. Raises StoreError unless ``out`` is new, empty, or
    holds a model that regrow wrote, and no run.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder")
    if (out / "run.json").exists() or (out / WORK).exists():
        raise StoreError(f"{out} is the folder of a run; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not (out / SHAPES).is_file():
        raise StoreError(f"{out} holds something else; choose another folder")
    with replace_folder(out) as folder:
        yield folder
        card(folder)
        link_other_files(out, folder)


def folder_bytes(folder: Path) -> int:
    """Return the size in bytes of the files directly in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def compare_outputs(
    model: nn.Module, rebuilt: nn.Module, example: Example, subject: str, tolerance: float = ROUNDING
) -> float:
    """Return the largest absolute output difference of two networks on ``example``.

    Raises CheckError if it is more than ``tolerance`` times the largest output of ``model``, and ExportError if a
    network does not take the example. ``subject``: what the error calls the rebuilt network.
    """
    ours, theirs = (_run(net, example) for net in (model, rebuilt))
    difference = max_difference(ours, theirs)
    largest = max((float(a[a.isfinite()].abs().max()) for a in ours if a.isfinite().any()), default=0.0)
    if not difference <= tolerance * largest:
        raise CheckError(f"{subject} answers otherwise, by {difference:.3g}; please report it")
    return difference


def _run(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the tensors of a network's output in eval mode, float32, on the CPU; ExportError for unfit examples."""
    try:
        with evaluating(model) as device:
            args, named = move_inputs(example.args, device), move_inputs(dict(example.kwargs), device)
            leaves = tree_leaves(model(*args, **named))
    except Exception as error:
        problem = f"{type(model).__name__} does not take an input of {format_shape(example)} ({first_line(error)})"
        raise ExportError(f"{problem}, so that the export is not compared; give an input that it takes") from None
    return [leaf.float().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
