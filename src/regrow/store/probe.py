"""A probe: an input stored with a saved network and its output, so that loading can check the output."""

import copy
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.sources import device_of
from regrow.store.convert import convert
from regrow.store.errors import StoreError
from regrow.store.schemas import Shape
from regrow.store.shapes import DTYPES
from regrow.store.tensors import digest_tensors, dtype_name, read_tensors, write_tensors

# A safetensors file with another suffix: some tools take every ``*.safetensors`` for weights of the model.
FILE, FORMAT = "probe.st", "regrow-probe/1"
# The most numbers of a floating-point input that are stored; a larger one gives way to a fixed pattern.
MAX_INPUT_NUMBERS = 2**16
MAX_SAMPLES = 4096  # the most numbers of each output tensor that are stored beside its digest
# How many times its own rounding error an output may differ by if it is computed on another machine or version.
ROUNDING_FACTOR = 3
_MAX_BYTES, _MAX_PATTERN = 2**28, 2**26  # of the file; numbers of an input that a pattern replaces


class ProbeHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of ``probe.st``: the arguments of a forward pass, and digests of the outputs for them."""

    format: str
    names: list[str]  # of the tensors in the file: i0, i1, … are inputs, o0, o1, … samples of outputs
    sha256: str  # of the tensors in the file
    inputs: tuple[Any, Any]  # positional and named arguments; in place of a tensor {"tensor": its number}
    patterns: list[tuple[str, Shape] | None]  # per input tensor: dtype and shape if a fixed pattern replaces it
    outputs: list[str]  # the digest of each output tensor
    exact: bool  # whether a loaded network must give the same bits under the same conditions
    conditions: dict[str, str]  # by read_conditions


class UnprobedError(ValueError):
    """Raised if no probe can be made for a network; the message is the reason."""


def write_probe(model: nn.Module, example: Example, path: Path, *, cast: bool, aligned: bool | None) -> None:
    """Run a network on an input, and write the input, digests of the outputs and samples of them to a file.

    ``cast``: whether some weights are stored in another dtype than they have here. ``aligned``: whether the memory of
    each weight begins at a cache line, which can change the last bits; ``None``: looked up here. Raises UnprobedError
    if the network or the format does not take the input, and nothing is written.
    """
    inputs: list[Tensor] = []
    structure = [_to_json(list(example.args), inputs), _to_json(dict(example.kwargs), inputs)]
    patterns: list[tuple[str, list[int]] | None] = [None] * len(inputs)
    for i, tensor in enumerate(inputs):
        if tensor.is_floating_point() and tensor.numel() > MAX_INPUT_NUMBERS:
            patterns[i] = dtype_name(tensor.dtype), list(tensor.shape)
            inputs[i] = _make_pattern(tensor.shape, tensor.dtype)
    try:
        digests, samples = sample_outputs(model, structure, inputs)
    except Exception as error:
        raise UnprobedError(f"the network does not take the example input ({first_line(error)})") from None
    if aligned is None:  # as loaded tensors: on the CPU, contiguous, from the begin of a cache line on
        parameters = model.parameters()
        aligned = all(x.is_contiguous() and x.data_ptr() % 64 == 0 and x.device.type == "cpu" for x in parameters)
    header = {
        "inputs": structure,
        "patterns": patterns,
        "outputs": digests,
        # Kernels choose by the alignment and the layout of weights, and a loaded network has both in order.
        "exact": not cast and aligned,
        "conditions": read_conditions(),
    }
    tensors = {f"i{i}": tensor for i, tensor in enumerate(inputs) if patterns[i] is None}
    write_tensors(path, tensors | {f"o{i}": sample for i, sample in enumerate(samples)}, header, FORMAT)


def check_probe(model: nn.Module, path: Path, *, stored: Iterable[torch.dtype], cast: bool = False) -> None:
    """Raise StoreError unless a loaded network gives the output that was recorded when it was saved.

    ``path``: the file of :func:`write_probe`; ``stored``: the dtypes of the weights in the files; ``cast``: whether
    they were converted to another one when loaded. Under other conditions (:func:`read_conditions`), or if weights were
    cast, outputs may differ by rounding.
    """
    header, inputs, before = _read_probe(path)
    if cast or not header.exact:  # the weights have, or were stored in, another dtype than the recorded input
        inputs = _cast_inputs(inputs, model)
    try:
        digests, samples = sample_outputs(model, header.inputs, inputs)
    except Exception as error:
        raise StoreError(
            f"{path.parent}: the network fails on the input it was saved with ({first_line(error)}); {_REMEDY}"
        ) from None
    if digests == header.outputs:
        return
    if [x.shape for x in samples] != [x.shape for x in before]:
        raise StoreError(f"{path.parent}: the outputs have other shapes than those of the saved network; {_REMEDY}")
    difference = max_difference(before, samples)
    magnitude = max((float(x.abs().max()) for x in before if len(x)), default=0.0)
    same = header.exact and not cast and header.conditions == read_conditions()
    allowed = 0.0 if same else magnitude * 64 * _coarsest_epsilon(model, stored)
    # Rounding is measured only where the cheap bound does not suffice; comparisons with NaN are false.
    if not same and not difference <= allowed:
        allowed = max(allowed, ROUNDING_FACTOR * _measure_rounding(model, header.inputs, inputs, samples))
    # Under the same conditions, digests that differ are enough: the difference may lie outside the samples.
    if not difference <= allowed or (same and difference == 0):
        raise StoreError(
            f"{path.parent}: the outputs differ from those of the saved network by {difference:.3g} of "
            f"{magnitude:.3g}, allowed are {allowed:.3g}; {_REMEDY}"
        )


def read_example(path: Path, model: nn.Module) -> Example:
    """Return the input in a file of :func:`write_probe`, in the dtype of ``model``; StoreError if it is damaged."""
    header, inputs, _ = _read_probe(path)
    try:
        args, kwargs = _from_json(header.inputs, _cast_inputs(inputs, model))
        return Example(tuple(args), dict(kwargs))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!s:.60}); copy it again") from None


def _cast_inputs(inputs: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Return inputs, the floating-point ones in the dtype of the first floating-point parameter of ``model``."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


_REMEDY = "build it with the code and versions it was saved with, or load it with check=False"


def sample_outputs(model: nn.Module, structure: object, inputs: Sequence[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Run a network in eval mode with a fixed random seed; return, per output tensor, its SHA-256 and a sample.

    ``structure``: the arguments by :func:`_to_json`, of which ``inputs`` are the tensors. A sample is at most
    :data:`MAX_SAMPLES` numbers of an output, evenly spaced, in float64. The network is left as it was. Its own
    errors pass; ValueError if it gives no tensor.
    """
    device = device_of(model)
    args, kwargs = _from_json(structure, [x.to(device) for x in inputs])
    with _preserve_modules(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = tree_leaves(model.eval()(*args, **kwargs))
        outputs = [leaf.detach().cpu().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        if not outputs:
            raise ValueError("it gives no tensor")
        samples = []
        for output in outputs:
            sample = output.flatten()[:: max(1, -(-output.numel() // MAX_SAMPLES))]
            sample = torch.view_as_real(sample).flatten() if sample.is_complex() else sample
            samples.append(sample.to(torch.float64).clone())
        return [digest_tensors({"": output}) for output in outputs], samples


@contextmanager
def _preserve_modules(model: nn.Module) -> Iterator[None]:
    """Context manager: restores, at its end, attributes and hooks of modules, and buffers of up to 2^20 entries.

    What modules reach besides is left alone: a network that is read block by block keeps what it has read.
    """
    states = [(vars(module), dict(vars(module))) for module in model.modules()]
    kept = [value for _, before in states for name, value in before.items() if name == "_buffers" or "_hooks" in name]
    states += [(value, dict(value)) for value in kept if isinstance(value, dict)]
    small = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.numel() <= 2**20]
    try:
        yield
    finally:
        for holder, kept_entries in states:
            holder.clear()
            holder.update(kept_entries)
        with torch.no_grad():
            for buffer, before in small:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def read_conditions() -> dict[str, str]:
    """Return name → value of what the last bits of an output depend on, such as torch's version and the threads."""
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": f"{_processor()} {torch.backends.cpu.get_cpu_capability()}",
        "matmul": torch.get_float32_matmul_precision(),
    }


def _processor() -> str:
    """Return the model name of the CPU, or its architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read_probe(path: Path) -> tuple[ProbeHeader, list[Tensor], list[Tensor]]:
    """Return the header, the input tensors and the samples of the outputs; raise StoreError for a damaged file."""
    if path.is_file() and path.stat().st_size > _MAX_BYTES:
        raise StoreError(f"{path} is larger than any probe; restore it")
    data, tensors = read_tensors(path, FORMAT)
    header = convert(data, ProbeHeader, path)
    try:
        inputs = [
            tensors[f"i{i}"] if pattern is None else _make_pattern(pattern[1], DTYPES[pattern[0]])
            for i, pattern in enumerate(header.patterns)
        ]
        return header, inputs, [tensors[f"o{i}"] for i in range(len(header.outputs))]
    except (KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged ({error!s:.60}); copy it again") from None


def _to_json(value: Any, tensors: list[Tensor]) -> Any:
    """Return an argument as JSON data, tensors as indices in ``tensors``, where they are added; or UnprobedError."""
    match value:
        case Tensor():
            tensors.append(value.detach())
            return {"tensor": len(tensors) - 1}
        case list() | tuple():
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [_to_json(part, tensors) for part in value]}
        case Mapping():
            return {"dict": {str(key): _to_json(part, tensors) for key, part in value.items()}}
        case None | bool() | int() | float() | str():
            return {"value": value}
    raise UnprobedError(f"the example input holds a {type(value).__name__}, which is not written down")


def _from_json(structure: Any, tensors: Sequence[Tensor]) -> Any:
    """Undo :func:`_to_json`; a list of two converted values gives a pair. Raises ValueError for anything else."""
    match structure:
        case {"tensor": int(i)} if 0 <= i < len(tensors):
            return tensors[i]
        case {"tuple": [*parts]}:
            return tuple(_from_json(part, tensors) for part in parts)
        case {"list": [*parts]}:
            return [_from_json(part, tensors) for part in parts]
        case {"dict": dict(parts)}:
            return {key: _from_json(part, tensors) for key, part in parts.items()}
        case {"value": None | bool() | int() | float() | str() as value}:
            return value
        case [args, kwargs]:
            return _from_json(args, tensors), _from_json(kwargs, tensors)
    raise ValueError(f"not an argument: {structure!s:.60}")


def _make_pattern(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of numbers from -1 to 1, the same on every machine; ValueError beyond 2^26 numbers."""
    count = prod(shape)
    if not 0 <= count <= _MAX_PATTERN:
        raise ValueError(f"a tensor of {count} numbers")

    return (torch.arange(count) * 7919 % 257).to(torch.float32).div(128).sub(1).to(dtype).reshape(tuple(shape))


def max_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the largest absolute difference of two rows of tensors, pair by pair; NaN equals NaN, infinity itself."""
    result = 0.0
    for x, y in zip(a, b, strict=True):
        different = ~((x == y) | (x.isnan() & y.isnan()))
        gaps = (x - y)[different].abs()
        result = max(result, float(gaps.nan_to_num(torch.inf).max()) if len(gaps) else 0.0)
    return result


def _coarsest_epsilon(model: nn.Module, stored: Iterable[torch.dtype]) -> float:
    """Return the machine epsilon of the coarsest dtype of the parameters of ``model`` and among ``stored``."""
    dtypes = {dtype for dtype in (*stored, *(p.dtype for p in model.parameters())) if dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _measure_rounding(model: nn.Module, structure: Any, inputs: Sequence[Tensor], samples: Sequence[Tensor]) -> float:
    """Return the largest difference of ``samples`` (by :func:`sample_outputs`) to a run in float64; 0 if that fails."""
    try:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        _, exact = sample_outputs(copy.deepcopy(model).double(), structure, wide)
        return max_difference(exact, samples)
    except Exception:
        return 0.0
