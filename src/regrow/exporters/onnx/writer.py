"""Write a network as an ONNX graph, and compare it with torch before the file is moved into place.

The network is recorded by ``torch.export``, written by torch's exporter and read back by onnxruntime. Language models
take ``input_ids`` and ``attention_mask`` and return ``logits``; the graph has a key-value cache only on request.
"""

import contextlib
import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.evaluation.forward import evaluating
from regrow.exporters.onnx.calls import (
    BATCH,
    PAST,
    SEQUENCE,
    TOTAL,
    ExportedCall,
    Labels,
    describe_call,
    label_sizes,
    resize_inputs,
    sizes_of,
)
from regrow.exporters.onnx.int8 import quantise
from regrow.exporters.onnx.placing import clear_abandoned, place_file
from regrow.exporters.onnx.reading import OnnxSession, compare_predictions, difference
from regrow.exporters.written import ExportError, Written
from regrow.nets.examples import guessed_example, image_example
from regrow.nets.loaded import needs
from regrow.store.atomic import check_output, staging_folder
from regrow.store.errors import StoreError, explain_os_errors

OPSET = 20
"""The ONNX operator set: the one that torch's exporter recommends; onnxruntime supports it since 1.17."""

LARGEST = 2_000_000_000
"""The most bytes of weights inside the file itself; protobuf is limited to 2 GiB."""

TOLERANCE = 1e-3
"""The largest allowed difference to torch, relative to the largest output."""

DTYPES = ("", "float32", "int8")

Checked = dict[str, float | int | str]

OPEN = ((BATCH, SEQUENCE, PAST, TOTAL), (BATCH,), ())
"""The sets of sizes that are tried as dynamic, one after the other."""


@dataclass(frozen=True)
class _Found:
    """A file in its temporary place, and what is known about it."""

    path: Path
    reading: OnnxSession
    labels: Labels
    checked: Checked
    fixed: Mapping[str, int]
    notes: tuple[str, ...]


def write(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str = "",
    example: Example | None = None,
    cache: bool = False,
    progress: Progress = silent,
) -> Written:
    """Write a network as ONNX, and compare its outputs in onnxruntime with those in torch.

    Args:
        model: Any network that ``torch.export`` can record: pruned, widened, with branches dropped. It is not changed.
        out: The file, ``….onnx``; its folder must exist. Weights of more than 2 GB are stored in ``….onnx.data`` beside
            it, or ``….onnx.1.data`` if there is such a file already. Only the named file and the weights that it refers
            to are replaced.
        dtype: ``""`` or ``"float32"``: float32, whatever the network's dtype is. ``"int8"``: linear layers with weights
            in 8 bits and activations rounded at run time (dynamic quantisation); all else is float32, and so are linear
            layers whose input has outliers.
        example: The input of the network; guessed from its origin or its first layer if ``None``. Batch and sequence
            sizes are dynamic if the network allows it; all others are those of the example.
        cache: For a language model of transformers: whether the graph takes the keys and values of earlier tokens
            (``past_key_values.0.key`` …) and returns all of them (``present.0.key`` …), for generating text.
        progress: Called with (steps done, steps in all, description).

    Returns:
        The file; the largest differences to torch at the example and at other sizes, and for language models how many
        next tokens on real text differ; notes on opset, inputs and outputs.

    Raises:
        ExportError: If the network cannot be recorded, the outputs differ, or the file cannot be written. An
            earlier file then stays.
    """
    out, steps = Path(out), 5 if dtype == "int8" else 4
    _check(out, dtype)
    place = _place(out)
    net, notes = _plain(model)
    tokenizer = getattr(model, "tokenizer", None)
    with _staged(place) as stage, _quiet(), evaluating(net):
        progress(0, steps, "recording the network")
        call = describe_call(net, _example(net, example), cache=cache)
        found = _recorded(call, stage / "float32" / place.name, progress, steps)
        checked: Checked = {"opset": OPSET, "dtype": dtype or "float32", **found.checked}
        notes = [*notes, *_told(found)]
        if call.text:
            progress(2, steps, "next tokens, torch and onnxruntime")
            checked |= compare_predictions(found.reading, tokenizer, found.fixed)
        path = found.path
        if dtype == "int8":
            progress(3, steps, "weights in 8 bits")
            path = stage / "int8" / place.name
            notes.append(quantise(found.path, path, call, LARGEST))
            checked |= _lost(OnnxSession(path, call), tokenizer, found.fixed)
        progress(steps - 1, steps, "writing")
        size = place_file(path, stage, _place(out))
        progress(steps, steps, "written")
    return Written(out, size, checked, tuple(notes))


def _check(out: Path, dtype: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(str(needs("export", package)))
    if dtype not in DTYPES:
        raise ExportError(f"ONNX files are written in float32 or int8, not {dtype!r}; give dtype='' or 'int8'")
    if out.suffix != ".onnx":
        raise ExportError(f"{out}: the name of an ONNX file must end in .onnx; use {out.with_suffix('.onnx')}")


def _place(out: Path) -> Path:
    """Return the file to write: ``out``, or its target if it is a symbolic link."""
    try:
        return check_output(out, (".onnx",))
    except StoreError as error:
        raise ExportError(str(error)) from error


def _plain(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the network in float32 on the CPU (itself, or a copy), and notes."""
    tensors = [*model.parameters(), *model.buffers()]
    kinds = sorted({str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()} - {"float32"})
    if not kinds and all(one.device.type == "cpu" for one in tensors):
        return model, []
    # onnxruntime lacks most operations in 16 bits on a CPU, and runs few in 64.
    said = f"the network is in {', '.join(kinds)}; the file is in float32, and was compared with it in float32"
    return copy.deepcopy(model).to("cpu", torch.float32), [said] if kinds else []


def _example(model: nn.Module, example: Example | None) -> Example:
    """Return the input of the network: the given one, or a guess."""
    shape = getattr(getattr(model, "origin", None), "config", {}).get("shape")
    result = example or (image_example(model, *shape) if shape else guessed_example(model))
    if result is None:
        raise ExportError("the network does not say what input it takes; give an example")
    return result


def _recorded(call: ExportedCall, path: Path, progress: Progress, steps: int) -> _Found:
    """Write the network with as many dynamic sizes as it allows.

    Raises:
        ExportError: If it cannot be written even without dynamic sizes.
    """
    path.parent.mkdir()
    whole = sizes_of(call, label_sizes(call, OPEN[0]))
    refused: dict[str, str] = {}
    for number, open_to in enumerate(OPEN):
        labels = label_sizes(call, open_to)
        if number and sizes_of(call, labels) == whole:
            continue
        try:
            _export(call, labels, path)
            progress(1, steps, "comparing with torch")
            reading = OnnxSession(path, call)
            checked = _compared(reading, labels)
        except Exception as error:
            reason = first_line(error)[:300]
            if open_to == () or call.cached:  # a text that goes on is longer each time
                raise ExportError(f"the network cannot be written as ONNX: {reason}") from None
            refused = {**dict.fromkeys(sizes_of(call, labels), reason), **refused}
            continue
        open_sizes = sizes_of(call, labels)
        fixed = {label: size for label, size in whole.items() if label not in open_sizes}
        notes = [f"{label} is fixed at {size}: {refused[label]}" for label, size in fixed.items()]
        return _Found(path, reading, labels, checked, fixed, tuple(notes))
    raise AssertionError("without open sizes there is a file or an error")


def _export(call: ExportedCall, labels: Labels, path: Path) -> None:
    """Record the network and write the file."""
    # A size of 1 would be taken for a constant.
    inputs = resize_inputs(call, labels, {label: max(2, size) for label, size in sizes_of(call, labels).items()})
    shapes = tuple(dict.fromkeys(labels[name], torch.export.Dim.DYNAMIC) or None for name in inputs)
    recorded = torch.export.export(
        call.run,
        tuple(inputs.values()),
        dynamic_shapes=(shapes,),
        strict=False,
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    program = torch.onnx.export(
        recorded, input_names=list(inputs), output_names=list(call.outputs), opset_version=OPSET, verbose=False
    )
    assert program is not None
    called: dict[Any, str] = {}
    for value in program.model.graph.inputs:
        for dim, label in labels.get(value.name or "", {}).items():
            if value.shape is not None and not isinstance(size := value.shape[dim], int):
                called.setdefault(str(size.value), label)
    program.rename_axes(called)
    weights = sum(one.numel() * one.element_size() for one in [*call.run.parameters(), *call.run.buffers()])
    program.save(path, external_data=weights > LARGEST)


def _compared(reading: OnnxSession, labels: Labels) -> Checked:
    """Return the differences to torch, at the example and at other sizes.

    Raises:
        ExportError: If one is too large, or the file does not run.
    """
    checked: Checked = {}
    for where, inputs in [("", reading.call.inputs), *_others(reading.call, labels)]:
        worst, largest = difference(reading, inputs)
        if not worst <= TOLERANCE * largest + 1e-6:
            raise ExportError(f"{worst:.3g} away from torch, whose largest number is {largest:.3g}{where}")
        checked[f"max_abs_diff{where}"] = worst
        checked.setdefault("largest_output", largest)
    return checked


def _others(call: ExportedCall, labels: Labels) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield further inputs for the comparison: other values of all dynamic sizes."""
    known = sizes_of(call, labels)
    for batch, more, past in ((3, 5, 7), (1, -3, 0)) if known else ():
        sizes = {label: max(1, size + more) if label.endswith(SEQUENCE) else size for label, size in known.items()}
        if call.most and past + max(sizes.values()) > call.most:
            sizes = {label: 1 if label.endswith(SEQUENCE) else size for label, size in sizes.items()}
        given = {BATCH: batch, PAST: past, TOTAL: past + sizes.get(SEQUENCE, 0)}
        sizes |= {label: size for label, size in given.items() if label in known}
        said = ", ".join(f"{label} {size}" for label, size in sizes.items() if label != TOTAL)
        yield f" at {said}", resize_inputs(call, labels, sizes)


def _told(found: _Found) -> list[str]:
    """Return notes on the inputs and outputs of the file."""
    call = found.reading.call
    takes = []
    for name, tensor in call.inputs.items():
        sizes = ", ".join(found.labels[name].get(dim, str(size)) for dim, size in enumerate(tensor.shape))
        if not name.startswith("past_key_values"):
            takes.append(f"{name} [{sizes}] {str(tensor.dtype).removeprefix('torch.')}")
    gives = [name for name in call.outputs if not name.startswith("present")]
    if call.cached:
        layers = (len(call.inputs) - 2) // 2
        takes.append(f"past_key_values.0.key … {layers - 1}.value [batch, heads, past, size of a head] float32")
        gives.append(f"present.0.key … {layers - 1}.value")
    return [f"opset {OPSET}; takes {'; '.join(takes)}; gives {', '.join(gives)}", *found.notes]


def _lost(reading: OnnxSession, tokenizer: Any, lengths: Mapping[str, int]) -> Checked:
    """Return what 8 bits cost: the same comparisons with torch, under names that begin with ``int8``."""
    worst, _ = difference(reading, reading.call.inputs)
    found = compare_predictions(reading, tokenizer, lengths) if reading.call.text else {}
    lost = {name.replace("onnx", "int8"): value for name, value in found.items() if name != "nats_torch"}
    return {"int8_max_abs_diff": worst, **{name if "int8" in name else f"int8_{name}": v for name, v in lost.items()}}


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the file for unfinished files; it is deleted at the end.

    Raises:
        ExportError: If write permission is missing.
    """
    try:
        with explain_os_errors(out):
            clear_abandoned(out)
            with staging_folder(out) as stage:
                yield stage
    except StoreError as error:
        raise ExportError(str(error)) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines of exporters in the block; results are compared afterwards."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
