"""``regrow.export``: write a network in a format that other programs load."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from regrow.api.inputs import ModelLike
from regrow.core.axes.axis import to_example
from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.exporters import ExportResult
from regrow.jobs.export import ExportInputs, export_network, open_named
from regrow.jobs.recording import Invocation
from regrow.settings.export import Settings

Format = Literal["transformers", "gguf", "onnx", "torchvision"]


def export(
    model: ModelLike,
    out: str | Path,
    *,
    format: Format,
    dtype: str = "",
    example: Any = None,
    progress: Progress = silent,
) -> ExportResult:
    """Write a network in a format of other tools, read it back, and compare it with the network.

    Args:
        model: The network, which is not changed; or a model's name or a run folder, which is loaded.
        out: The file or folder to write; a folder gets a model card, ``README.md``, and the licence of the base model.
        format: ``"transformers"`` (a folder for ``from_pretrained``), ``"gguf"`` (a file for llama.cpp), ``"onnx"`` or
            ``"torchvision"`` (a ``state_dict`` and code that builds the network).
        dtype: The dtype in which weights are stored; empty: the first of the format. ``"gguf"``: ``"f16"``, ``"f32"``,
            ``"bf16"``, ``"q8_0"``, ``"q5_1"``, ``"q5_0"``, ``"q4_1"``, ``"q4_0"``; ``"onnx"``: ``"float32"``,
            ``"int8"``; ``"transformers"``: that of the network, or ``"float32"``, ``"bfloat16"``, ``"float16"``.
        example: The input with which the network is recorded or compared, a tensor, a tuple of inputs, or a dict of
            inputs by name; ``None``: that of a model given by its name or folder, or a guess.
        progress: Called with (steps done, steps in all, what is being done).

    Returns:
        What was written: its ``path``, its size in ``bytes``, what was ``checked`` (``max_abs_diff``: the largest
        difference of an output), and ``notes``.

    Raises:
        ValueError: If there is no such format or dtype, the format cannot hold the network, the file cannot be written,
            or what is read back differs from the network.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = export(net, f"{folder}/net.onnx", format="onnx")
    ...     written.path.name, written.checked["max_abs_diff"] < 1e-5
    ('net.onnx', True)
    """
    if not isinstance(model, nn.Module | str | Path):
        got = type(model).__name__
        raise InputError(f"model must be a torch.nn.Module, a model's name or a run folder, got a {got}")
    settings = Settings("" if isinstance(model, nn.Module) else str(model), format, dtype)

    def inputs() -> ExportInputs:
        opened = (
            ExportInputs(model) if isinstance(model, nn.Module) else open_named(settings, Invocation(progress=progress))
        )
        return opened if example is None else replace(opened, example=to_example(example, opened.model))

    return export_network(settings, inputs, Path(out), progress=progress)
