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
from regrow.store.tensors import digest, read_tensors, write_tensors

FILE, FORMAT = "probe.st", "regrow-probe/1"
"""A safetensors file with another suffix: some tools take every ``*.safetensors`` for weights of the model."""
MOST = 2**16
"""The most numbers of an input tensor that are stored; a larger one is replaced by a fixed pattern of its shape."""
SAMPLED = 4096
"""The most numbers of each output tensor that are stored beside its digest."""
LAW = 3
"""How many times its own rounding error an output may differ by if it is computed on another machine or version."""
_LARGEST, _ELEMENTS = 2**28, 2**26


class ProbeHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of ``probe.st``: an input, in which a tensor is ``{"tensor": number}``, and digests of the output.

    ``patterns`` has dtype and shape of tensors that a fixed pattern replaces; ``exact``: outputs must be bit-equal.
    """

    format: str
    names: list[str]
    sha256: str
    inputs: tuple[Any, Any]
    patterns: list[tuple[str, Shape] | None]
    outputs: list[str]
    exact: bool
    conditions: dict[str, str]


class UnprobedError(ValueError):
    """Raised if no probe can be made for a network; the message is the reason."""


def write_probe(model: nn.Module, example: Example, path: Path, *, cast: bool, aligned: bool | None) -> None:
    """Run a network on an input, and write the input and the output to a file."""
    inputs: list[Tensor] = []
    shape = [_to_json(list(example.args), inputs), _to_json(dict(example.kwargs), inputs)]
    patterns: list[tuple[str, list[int]] | None] = [None] * len(inputs)
    for i, tensor in enumerate(inputs):
        if tensor.is_floating_point() and tensor.numel() > MOST:
            patterns[i] = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
            inputs[i] = _pattern(tensor.shape, tensor.dtype)
    try:
        digests, samples = compute_answer(model, shape, inputs)
    except Exception as error:
        raise UnprobedError(f"the network does not take the example input ({first_line(error)[:120]})") from None
    aligned = all(map(_is_aligned, model.parameters())) if aligned is None else aligned
    header = {
        "inputs": shape,
        "patterns": patterns,
        "outputs": digests,
        # Kernels choose by the alignment and the layout of weights, and a loaded network has both in order.
        "exact": not cast and aligned,
        "conditions": conditions(),
    }
    tensors = {f"i{i}": tensor for i, tensor in enumerate(inputs) if patterns[i] is None}
    write_tensors(path, tensors | {f"o{i}": sample for i, sample in enumerate(samples)}, header, FORMAT)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 and tensor.device.type == "cpu"


def check_probe(model: nn.Module, path: Path, *, stored: Iterable[torch.dtype], cast: bool = False) -> None:
    """Raise StoreError unless a loaded network gives the output that was recorded when it was saved."""
    header, inputs, before = _read(path)
    if cast or not header.exact:  # the weights have, or were stored in, another dtype than the recorded input
        inputs = _fitting(inputs, model)
    try:
        digests, samples = compute_answer(model, header.inputs, inputs)
    except Exception as error:
        raise StoreError(
            f"{path.parent}: the network fails on the input it was saved with ({first_line(error)[:120]}); {_REMEDY}"
        ) from None
    if digests == header.outputs:
        return
    if [x.shape for x in samples] != [x.shape for x in before]:
        raise StoreError(f"{path.parent}: the network answers in another form than the one that was saved; {_REMEDY}")
    gap, size = _distance(before, samples), max((float(x.abs().max()) for x in before if len(x)), default=0.0)
    same = header.exact and not cast and header.conditions == conditions()
    allowed = 0.0 if same else size * 64 * _epsilon(model, stored)
    if not same and not gap <= allowed:
        allowed = max(allowed, LAW * _rounding(model, header.inputs, inputs, samples))
    if not gap <= allowed or (same and gap == 0):
        raise StoreError(
            f"{path.parent}: the network answers otherwise than the one that was saved: they differ by {gap:.3g} of "
            f"{size:.3g}, allowed are {allowed:.3g}; {_REMEDY}"
        )


def read_example(path: Path, model: nn.Module) -> Example:
    """Return the input that was recorded when a network was saved, in the network's dtype."""
    header, inputs, _ = _read(path)
    try:
        args, kwargs = _from_json(header.inputs, _fitting(inputs, model))
        return Example(tuple(args), dict(kwargs))
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error!s:.60}); copy it again") from None


def _fitting(inputs: Sequence[Tensor], model: nn.Module) -> list[Tensor]:
    """Return floating-point inputs in the dtype of a network."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


_REMEDY = "build it with the code and versions it was saved with, or load it with check=False"


def compute_answer(model: nn.Module, shape: object, inputs: Sequence[Tensor]) -> tuple[list[str], list[Tensor]]:
    """Run a network in eval mode with a fixed random seed, and return digests and samples of its outputs.

    A sample is at most :data:`SAMPLED` numbers of an output, evenly spaced, in float64.
    """
    device = device_of(model)
    args, kwargs = _from_json(shape, [x.to(device) for x in inputs])
    with _preserve_modules(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = tree_leaves(model.eval()(*args, **kwargs))
        outputs = [leaf.detach().cpu().contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        if not outputs:
            raise ValueError("it gives no tensor")
        samples = []
        for output in outputs:
            sample = output.flatten()[:: max(1, -(-output.numel() // SAMPLED))]
            sample = torch.view_as_real(sample).flatten() if sample.is_complex() else sample
            samples.append(sample.to(torch.float64).clone())
        return [digest({"": output}) for output in outputs], samples


@contextmanager
def _preserve_modules(model: nn.Module) -> Iterator[None]:
    """Restore, when the block ends, all attributes of modules and their small buffers.

    What modules reach besides is left alone: a network that is read block by block keeps what it has read.
    """
    states = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    small = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if buffer.numel() <= 2**20]
    try:
        yield
    finally:
        for module, attributes, buffers in states:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, before in small:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def conditions() -> dict[str, str]:
    """Return what the last bits of an output depend on besides network and input: torch, threads, CPU, precision."""
    return {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": f"{_processor()} {torch.backends.cpu.get_cpu_capability()}",
        "matmul": torch.get_float32_matmul_precision(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _read(path: Path) -> tuple[ProbeHeader, list[Tensor], list[Tensor]]:
    if path.is_file() and path.stat().st_size > _LARGEST:
        raise StoreError(f"{path} is larger than any probe; restore it")
    data, tensors = read_tensors(path, FORMAT)
    header = convert(data, ProbeHeader, path)
    try:
        inputs = [
            tensors[f"i{i}"] if pattern is None else _pattern(pattern[1], DTYPES[pattern[0]])
            for i, pattern in enumerate(header.patterns)
        ]
        return header, inputs, [tensors[f"o{i}"] for i in range(len(header.outputs))]
    except (KeyError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged ({error!s:.60}); copy it again") from None


def _to_json(value: Any, tensors: list[Tensor]) -> Any:
    """Convert arguments to JSON data; their tensors are appended to ``tensors``."""
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


def _from_json(shape: Any, tensors: Sequence[Tensor]) -> Any:
    match shape:
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
    raise ValueError(f"not an argument: {shape!s:.60}")


def _pattern(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return numbers from -1 to 1 that are the same on every machine."""
    count = prod(shape)
    if not 0 <= count <= _ELEMENTS:
        raise ValueError(f"a tensor of {count} numbers")
    return (torch.arange(count) * 7919 % 257).to(torch.float32).div(128).sub(1).to(dtype).reshape(tuple(shape))


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return the largest absolute difference; NaN equals NaN, and infinity equals infinity."""
    result = 0.0
    for x, y in zip(a, b, strict=True):
        different = ~((x == y) | (x.isnan() & y.isnan()))
        gaps = (x - y)[different].abs()
        result = max(result, float(gaps.nan_to_num(torch.inf).max()) if len(gaps) else 0.0)
    return result


def _epsilon(model: nn.Module, stored: Iterable[torch.dtype]) -> float:
    """Return the machine epsilon of the coarsest dtype that a network has or was stored in."""
    dtypes = {dtype for dtype in (*stored, *(p.dtype for p in model.parameters())) if dtype.is_floating_point}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)


def _rounding(model: nn.Module, shape: Any, inputs: Sequence[Tensor], samples: Sequence[Tensor]) -> float:
    """Return how far a network's output is from its output in float64."""
    try:
        wide = [x.double() if x.is_floating_point() else x for x in inputs]
        return _distance(compute_answer(copy.deepcopy(model).double(), shape, wide)[1], samples)
    except Exception:
        return 0.0
