"""Export to ONNX: a graph for onnxruntime and many other tools, compared with torch before it is moved into place.

The network is recorded by ``torch.export``, written by torch's exporter and read back by onnxruntime. Language models
take ``input_ids`` and ``attention_mask`` and return ``logits``.
"""

import contextlib
import copy
import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.evaluation.measure import evaluating
from regrow.exporters import ExportError, ExportResult, Results
from regrow.exporters.onnx.calls import (
    BATCH,
    SEQUENCE,
    ExportedCall,
    Labels,
    OnnxSession,
    compare_predictions,
    describe_call,
    label_sizes,
    quantise,
    resize_inputs,
    sizes_of,
)
from regrow.nets.loaded import guess_example, log_guess, missing_package, noise_example
from regrow.store.atomic import check_output, stage_folder, sync
from regrow.store.errors import explain_os_errors

__all__ = ["OPSET", "write"]

OPSET = 20  # the operator set that torch's exporter recommends; onnxruntime supports it since 1.17
LARGEST = 2_000_000_000  # bytes of weights inside the file itself; protobuf is limited to 2 GiB
TOLERANCE = 1e-3  # the largest allowed difference to torch, relative to the largest output
DYNAMIC = ((BATCH, SEQUENCE), (BATCH,), ())  # sets of sizes that are tried as dynamic, until one can be exported


@dataclass(frozen=True)
class _CheckedFile:
    """An ONNX file in its temporary place, opened and compared with torch."""

    session: OnnxSession  # the opened file
    results: Results  # what was compared → result
    fixed: Mapping[str, int]  # name of a size that is not dynamic → its value
    notes: list[str]  # what a user of the file must know


def write(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str = "float32",
    example: Example | None = None,
    progress: Progress = silent,
) -> ExportResult:
    """Write a network as ONNX in ``"float32"`` or ``"int8"``, and compare its outputs in onnxruntime and in torch.

    ``out``: a path that ends in ``.onnx``; large weights are written beside it, as ``NAME.data``. ``example``: an input
    of the network; ``None``: noise in a guessed shape. Raise ExportError if the network cannot be written, or the
    outputs differ; ``out`` then stays as it was.
    """
    out = Path(out)
    total_steps = 5 if dtype == "int8" else 4
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise ExportError(str(missing_package("export", package)))
    if out.suffix != ".onnx":
        raise ExportError(f"{out}: the name of an ONNX file must end in .onnx; use {out.with_suffix('.onnx')}")
    target = check_output(out, (".onnx",))
    net, notes = _to_float32(model)
    tokenizer = getattr(model, "tokenizer", None)
    example = _choose_example(net, example)
    with explain_os_errors(target), stage_folder(target) as stage, _quiet(), evaluating(net):
        progress(0, total_steps, "recording the network")
        call = describe_call(net, example)
        path = stage / "float32" / unused_name(target)
        file = _export_and_compare(call, path, progress, total_steps)
        checked = {"opset": OPSET, "dtype": dtype, **file.results}
        notes += file.notes
        if call.text:
            progress(2, total_steps, "next tokens, torch and onnxruntime")
            checked |= compare_predictions(file.session, tokenizer, file.fixed)
        if dtype == "int8":
            progress(3, total_steps, "weights in 8 bits")
            source, path = path, stage / "int8" / path.name
            notes.append(quantise(source, path, call, LARGEST))
            checked |= _compare_int8(OnnxSession(path, call), tokenizer, file.fixed)
        progress(total_steps - 1, total_steps, "writing")
        size = place_file(path, check_output(out, (".onnx",)))
        progress(total_steps, total_steps, "written")
    return ExportResult(out, size, checked, tuple(notes))


def _to_float32(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the network in float32 on the CPU (itself, or a copy), and notes for the user."""
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.is_floating_point()}
    others = ", ".join(sorted(dtypes - {"float32"}))
    if not others and all(tensor.device.type == "cpu" for tensor in tensors):
        return model, []
    # onnxruntime lacks most operations in 16 bits on a CPU, and runs few in 64.
    note = f"the network is in {others}; the file is in float32, and was compared with it in float32"
    return copy.deepcopy(model).to("cpu", torch.float32), [note] if others else []


def _choose_example(model: nn.Module, example: Example | None) -> Example:
    """Return the given example, or noise in a guessed shape; raise ExportError if none can be guessed."""
    shape = getattr(getattr(model, "origin", None), "config", {}).get("shape")
    result = example or (noise_example(model, (1, *shape)) if shape else guess_example(model))
    if result is None:
        raise ExportError("the network does not say what input it takes; give an example")
    if not (example or shape):
        log_guess(result)
    return result


def _export_and_compare(call: ExportedCall, path: Path, progress: Progress, total_steps: int) -> _CheckedFile:
    """Write ``path``, in a new folder, with as many dynamic sizes as possible, and compare it; or raise ExportError."""
    path.parent.mkdir()
    all_sizes = sizes_of(call, label_sizes(call, DYNAMIC[0]))
    reasons: dict[str, str] = {}  # name of a size → why it cannot be dynamic
    for attempt, dynamic in enumerate(DYNAMIC):
        labels = label_sizes(call, dynamic)
        sizes = sizes_of(call, labels)
        if attempt and sizes == all_sizes:  # the same as before, of inputs without a sequence
            continue
        try:
            _export(call, labels, path)
            progress(1, total_steps, "comparing with torch")
            session = OnnxSession(path, call)
            results = _compare(session, labels)
        except Exception as error:
            reason = first_line(error)
            if dynamic == ():
                raise ExportError(f"the network cannot be written as ONNX: {reason}") from None
            reasons = {**dict.fromkeys(sizes, reason), **reasons}
            continue
        fixed = {label: size for label, size in all_sizes.items() if label not in sizes}
        notes = [f"{label} is fixed at {size}: {reasons[label]}" for label, size in fixed.items()]
        return _CheckedFile(session, results, fixed, [_describe_signature(call, labels), *notes])
    raise AssertionError("without dynamic sizes there is a file or an error")


def _export(call: ExportedCall, labels: Labels, path: Path) -> None:
    """Export the network to ``path`` by torch, with the sizes in ``labels`` dynamic; torch's errors pass."""
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
    names: dict[Any, str] = {}
    for value in program.model.graph.inputs:
        for dim, label in labels.get(value.name or "", {}).items():
            if value.shape is not None and not isinstance(size := value.shape[dim], int):
                names.setdefault(str(size.value), label)
    program.rename_axes(names)
    weights = sum(tensor.nbytes for tensor in [*call.run.parameters(), *call.run.buffers()])
    program.save(path, external_data=weights > LARGEST)


def _compare(session: OnnxSession, labels: Labels) -> Results:
    """Return ``max_abs_diff`` to torch, at the example and at other sizes, and ``largest_output`` of torch there.

    Raises ExportError if a difference is more than ``TOLERANCE`` times the largest output.
    """
    results: Results = {}
    for where, inputs in [("", session.call.inputs), *_other_inputs(session.call, labels)]:
        worst, largest = session.compare(inputs)
        if not worst <= TOLERANCE * largest + 1e-6:  # nor NaN
            raise ExportError(f"{worst:.3g} away from torch, whose largest number is {largest:.3g}{where}")
        results[f"max_abs_diff{where}"] = worst
        results.setdefault("largest_output", largest)
    return results


def _other_inputs(call: ExportedCall, labels: Labels) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (words for errors, inputs) at two other values of all dynamic sizes; nothing if no size is dynamic."""
    example_sizes = sizes_of(call, labels)
    for batch, difference in ((3, 5), (1, -3)) if example_sizes else ():
        sizes = {label: max(1, size + difference) for label, size in example_sizes.items()}
        if call.max_length and max(sizes.values()) > call.max_length:
            sizes = dict.fromkeys(example_sizes, 1)
        if BATCH in example_sizes:
            sizes[BATCH] = batch
        words = ", ".join(f"{label} {size}" for label, size in sizes.items())
        yield f" at {words}", resize_inputs(call, labels, sizes)


def _describe_signature(call: ExportedCall, labels: Labels) -> str:
    """Return a note for the user on the file's inputs, with sizes and dtypes, and its outputs."""
    takes = []
    for name, tensor in call.inputs.items():
        sizes = ", ".join(labels[name].get(dim, str(size)) for dim, size in enumerate(tensor.shape))
        takes.append(f"{name} [{sizes}] {str(tensor.dtype).removeprefix('torch.')}")
    return f"opset {OPSET}; takes {'; '.join(takes)}; gives {', '.join(call.outputs)}"


def _compare_int8(session: OnnxSession, tokenizer: Any, lengths: Mapping[str, int]) -> Results:
    """Return what an int8 file costs, named ``int8_…``: comparisons with torch, without a limit."""
    worst, _ = session.compare(session.call.inputs)
    results: Results = {"int8_max_abs_diff": worst}
    predictions = compare_predictions(session, tokenizer, lengths) if session.call.text else {}
    for name, value in predictions.items():
        if name != "nats_torch":
            results["nats_int8" if name == "nats_onnx" else f"int8_{name}"] = value
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Context manager: suppresses warnings, and log lines up to warnings, of the whole process."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def unused_name(out: Path) -> str:
    """Return ``out``'s name, or that and ``.N``, such that no file ``NAME.data``, for large weights, is beside it."""
    names = (f"{out.name}.{n}" if n else out.name for n in count())
    return next(name for name in names if not os.path.lexists(out.with_name(f"{name}.data")))


def place_file(path: Path, out: Path) -> int:
    """Move an ONNX file from ``path`` to ``out``, with ``NAME.data`` beside it, if any; return their size in bytes.

    Weights come first, under a name from :func:`unused_name`, so that the old file stays whole until the new one
    replaces it; then the weights of the old one are deleted.
    """
    weights, old_weights = path.with_name(f"{path.name}.data"), _find_weights(out)
    size = path.stat().st_size
    if weights.exists():
        size += weights.stat().st_size
        sync(weights)
        weights.replace(out.with_name(weights.name))
        sync(out.parent)
    sync(path)
    path.replace(out)
    sync(out.parent)
    for file in old_weights:
        file.unlink(missing_ok=True)
    return size


def _find_weights(out: Path) -> list[Path]:
    """Return the ``.data`` files of an ONNX file that an export wrote; none if it does not exist or is damaged."""
    import onnx

    names: set[str] = set()
    with contextlib.suppress(Exception):  # whatever else the file is, it is replaced
        for tensor in onnx.load(out, load_external_data=False).graph.initializer:
            names |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    ours = re.compile(rf"{re.escape(out.name)}(\.\d+)?\.data")
    return [out.with_name(name) for name in sorted(names) if ours.fullmatch(name)]
