"""Recognise networks that cannot be traced as they are (scripted, quantised, sharded), and say what to do instead."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from regrow.core.axes import AxisGraph, Mark
from regrow.tracing.capture import TraceError

_SCRIPTED = "torch.jit fixed its code and its shapes; trace the Python module that it was made from"
_EXPORTED = "torch.export fixed its code and its shapes; trace the Python module that it was made from"
_QUANTISED = "its weights are quantised, and packed ones cannot be cut; trace and cut the float model, then quantise it"
_OBSERVED = (
    "it measures or simulates quantisation, and what it measured belongs to the old shape; "
    "trace and cut the float model, then prepare it for quantisation again"
)
_SHARDED = "several processes share its tensors; trace the module inside it ({path}.module), before it is wrapped"
_COPYING = "it copies the module inside it to several devices; trace that ({path}.module)"

_CLASSES = {
    "ScriptModule": _SCRIPTED,
    "ObserverBase": _OBSERVED,
    "FakeQuantizeBase": _OBSERVED,
    "DistributedDataParallel": _SHARDED,
    "FullyShardedDataParallel": _SHARDED,
}
"""Name of a class or base class of torch → why its modules cannot be traced, and the remedy.

They are names, since importing the classes would take longer than most traces.
"""


def check_traceable(model: nn.Module) -> None:
    """Raise :class:`TraceError` for a network that cannot be traced, naming the module and the remedy.

    >>> check_traceable(nn.LazyLinear(3))
    Traceback (most recent call last):
    regrow.tracing.capture.TraceError: weight has no shape yet; run the model once on an example, then trace it
    """
    for path, module in model.named_modules():
        if problem := _module_problem(module):
            where = f"{path or 'the model'} is a {type(module).__name__}"
            raise TraceError(f"{where}{problem.format(path=path or 'model')}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if problem := tensor_problem(tensor):
            raise TraceError(f"{name} {problem}")


def _module_problem(module: nn.Module) -> str:
    kind = type(module)
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") and base.__name__ in _CLASSES:
            return f": {_CLASSES[base.__name__]}"
    if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")):
        return f": {_QUANTISED}"
    if isinstance(module, GraphModule) and getattr(module.train, "__module__", "").startswith("torch.export"):
        return f": {_EXPORTED}"
    if isinstance(module, nn.DataParallel) and module.device_ids:
        return f": {_COPYING}"
    packed = next((name for name, value in vars(module).items() if isinstance(value, torch.ScriptObject)), "")
    return f", and its attribute {packed!r} is not visible to Python: {_QUANTISED}" if packed else ""


def tensor_problem(tensor: Tensor) -> str:
    """Return why a parameter or buffer cannot be cut, and the remedy; empty if it can."""
    kind = type(tensor.data)
    if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
        return "has no shape yet; run the model once on an example, then trace it"
    if kind not in (Tensor, nn.Parameter, nn.Buffer, FakeTensor):
        return (
            f"is a {kind.__name__}, whose entries only its own class can read; trace the model with plain tensors, "
            "and convert it after the cut"
        )
    return f"is quantised: {_QUANTISED}" if tensor.is_quantized else ""


def unalterable(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the parameters and buffers whose shapes must not change, and why: a spectral norm, or shared memory."""
    spectral = "the weight is divided by a spectral norm, which the cut would change; remove it first"
    for path, module in model.named_modules():
        for name, remedy, is_spectral in _computed(path, module):
            if is_spectral:
                yield name, f"{spectral}: {remedy}"
    remedy = "tie them (one parameter, two names), or clone one"
    for name, other in _overlapping(model):
        yield name, f"it shares memory with {other}, which a cut would end; {remedy}"


def _overlapping(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield pairs of tensors that share entries in memory, each pair in both orders."""
    stores: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        if x.layout is torch.strided and x.numel():
            start = int(x.storage_offset()) * x.element_size()
            extent = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) + 1
            entry = (start, start + extent * x.element_size(), name, x)
            stores.setdefault(x.untyped_storage()._cdata, []).append(entry)
    for extents in stores.values():
        extents.sort(key=lambda entry: entry[:2])
        for i, (_, end, name, x) in enumerate(extents):
            for start, _, other, y in extents[i + 1 :]:
                if start >= end:
                    break
                if _meet(x, y):
                    yield from ((name, other), (other, name))


def _meet(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors in one storage have entries in common."""
    if x.dtype != y.dtype or x.numel() + y.numel() > _MOST_ENTRIES:
        return True
    return bool(torch.isin(_addresses(x), _addresses(y)).any())


def _addresses(x: Tensor) -> Tensor:
    at = torch.tensor([int(x.storage_offset())])
    for n, step in zip(x.shape, x.stride(), strict=True):
        at = (at[:, None] + torch.arange(n) * step).flatten()
    return at


_MOST_ENTRIES = 1 << 22
"""Overlapping tensors with more entries than this together are taken to share some, without a check."""


def recompute_weights(model: nn.Module) -> None:
    """Recompute the weights that hooks compute before each run (weight norm, spectral norm, pruning masks)."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))
            elif isinstance(hook, WeightNorm | BasePruningMethod):
                hook(module, None)


def with_remedies(model: nn.Module, axes: AxisGraph) -> AxisGraph:
    """Return the axes, with the call that removes the parametrisation in the reason of each axis that it froze."""
    computed = {name: remedy for path, module in model.named_modules() for name, remedy, _ in _computed(path, module)}
    reasons = {}
    for axis in axes:
        remedy = next((computed[slot.name] for slot in axis.slots if slot.name in computed), "")
        known = axis.free or axis.size == 1 or axis.reason in _OUTER or "remove it first" in axis.reason
        if remedy and not known:
            reasons[axis.key] = f"{axis.reason}; remove it first: {remedy}"
    return freeze_axes(axes, reasons)


def freeze_axes(axes: AxisGraph, reasons: Mapping[str, str]) -> AxisGraph:
    """Return the graph with some axes frozen for other reasons (axis key → reason)."""
    frozen = {key: replace(axes[key], mark=Mark.FROZEN, reason=reason) for key, reason in reasons.items()}
    return replace(axes, axes={**axes.axes, **frozen}) if frozen else axes


_OUTER = ("it is a dimension of the model's input", "it is an output of the model")


def _computed(path: str, module: nn.Module) -> Iterator[tuple[str, str, bool]]:
    """Yield the tensors from which a module computes a weight, how to end that, and whether it is a spectral norm."""
    where, dot = f"model.{path}" if path else "model", f"{path}." if path else ""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            for end in ("_g", "_v"):
                yield f"{dot}{hook.name}{end}", f"torch.nn.utils.remove_weight_norm({where}, {hook.name!r})", False
        elif isinstance(hook, SpectralNorm):
            yield f"{dot}{hook.name}_orig", f"torch.nn.utils.remove_spectral_norm({where}, {hook.name!r})", True
    chains = module.parametrizations if parametrize.is_parametrized(module) else nn.ModuleDict()
    assert isinstance(chains, nn.ModuleDict)
    for name, chain in chains.items():
        remedy = f"torch.nn.utils.parametrize.remove_parametrizations({where}, {name!r})"
        spectral = any(isinstance(child, _SpectralNorm) for child in chain.children())
        for leaf, _ in (*chain.named_parameters(), *chain.named_buffers()):
            yield f"{dot}parametrizations.{name}.{leaf}", remedy, spectral
