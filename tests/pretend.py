"""A pretend accelerator: device ``acc:0`` computes on the CPU, refuses mixed devices, and counts host synchronisations.

A tensor of the device wraps a CPU tensor. Every operation passes :func:`_call`, which raises where a GPU would raise
for tensors on different devices, and counts where the host waits for a value.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map_only

import regrow
from regrow import tracing
from regrow.nets import devices
from regrow.tracing.meta_copy import fake_like

ROOT = Path(regrow.__file__).parent
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip
"""Operations whose value, or the shape of whose result, the host waits for."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPYING = {"copy_", "_to_copy"}


class DeviceTensor(Tensor):
    """A tensor on the pretend device; ``held`` has its numbers."""

    __slots__ = ("held",)  # not in vars(), which a successor of a parameter copies

    @staticmethod
    def __new__(cls, held):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device("acc", 0),
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _call(function, args, kwargs or {})

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value):
        Tensor.data.__set__(self, value)
        self.held = value.held

    def __repr__(self, *, tensor_contents=None):
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = DeviceTensor(self.held.detach().clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def tolist(self):
        _count("tolist")
        return self.held.tolist()

    def numpy(self, *, force=False):
        raise TypeError("can't convert acc:0 tensor to numpy; use Tensor.cpu() first")


def _empty(size, **kwargs):
    return DeviceTensor(torch.empty(size, **kwargs | {"device": "cpu", "pin_memory": False}))


def _empty_strided(size, stride, **kwargs):
    return DeviceTensor(torch.empty_strided(size, stride, **kwargs | {"device": "cpu", "pin_memory": False}))


def _copy_from(source, to, non_blocking=False):
    to.held.copy_(source.held if isinstance(source, DeviceTensor) else source)
    return to


def _call(function, args, kwargs):
    leaves = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    fake = next((one for one in leaves if isinstance(one, FakeTensor)), None)
    if fake is not None:
        return function(*_faked(args, fake.fake_mode), **_faked(kwargs, fake.fake_mode))
    inside = [one for one in leaves if isinstance(one, DeviceTensor)]
    name, to = str(function._overloadpacket).removeprefix("aten."), kwargs.get("device")
    to = torch.device(to).type if to is not None else None
    if inside:
        _check(name, args, leaves)
        _count_wait(name, args, to, f"{name}.{function._overloadname}")
    here = {**kwargs, "device": torch.device("cpu")} if to == "acc" else kwargs
    result = function(*tree_map_only(DeviceTensor, _held, args), **tree_map_only(DeviceTensor, _held, here))
    if name == "copy_":
        return args[0]
    if to == "cpu":
        return tree_map_only(Tensor, Tensor.clone, result) if inside else result
    if not inside and to != "acc":
        return result
    known = {id(one.held): one for one in inside}
    return tree_map_only(Tensor, lambda one: known.get(id(one)) if id(one) in known else DeviceTensor(one), result)


def _faked(values, mode):
    return tree_map_only(DeviceTensor, lambda one: fake_like(mode, tuple(one.shape), one), values)


def _held(tensor):
    return tensor.held


def _check(name, args, leaves):
    """Raise for tensors on different devices, except where torch allows it: copies, indices, and single numbers."""
    outside = [one for one in leaves if not isinstance(one, DeviceTensor) and one.dim()]
    if name in COPYING or not outside:
        return
    if name not in INDEXING or not isinstance(args[0], DeviceTensor):
        shape = list(outside[0].shape)
        raise RuntimeError(f"{name}: expected all tensors on one device, got acc:0 and {outside[0].device} {shape}")
    if name != "index" and isinstance(args[2], Tensor) and not isinstance(args[2], DeviceTensor) and args[2].dim():
        raise RuntimeError(f"{name}: expected the values on acc:0, got {args[2].device}")


def _count_wait(name, args, to, overload):
    masks = name in INDEXING and any(isinstance(one, Tensor) and one.dtype == torch.bool for one in args[1])
    host = name in COPYING and (to == "cpu" or (name == "copy_" and not isinstance(args[0], DeviceTensor)))
    if masks or host or name in WAITING or overload in WAITING:
        _count("to the host" if host else name.removeprefix("_"))


def _count(what):
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)):
            for counter in _COUNTERS:
                counter[f"{Path(path).relative_to(ROOT)}:{frame.f_lineno} {what}"] += 1
            return
        frame = frame.f_back
    for counter in _COUNTERS:
        counter[f"elsewhere {what}"] += 1


_COUNTERS: list[Counter[str]] = []
_LIBRARIES: list[torch.library.Library] = []
_PRETENDING: list[bool] = []


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Context manager that returns where the host waits: ``file:line operation`` → how often."""
    counter: Counter[str] = Counter()
    _COUNTERS.append(counter)
    try:
        yield counter
    finally:
        _COUNTERS.remove(counter)


def _register() -> None:
    """Register the device with torch: on import, since autograd counts devices in its first backward pass."""
    backend_registration._setup_privateuseone_for_python_backend("acc")
    kernels = torch.library.Library("aten", "IMPL", "PrivateUse1")
    kernels.impl("empty.memory_format", _empty)
    kernels.impl("empty_strided", _empty_strided)
    kernels.impl("_copy_from", _copy_from)
    _LIBRARIES.append(kernels)
    module = torch.acc
    module.get_rng_state = lambda *_: torch.get_rng_state()
    module.set_rng_state = lambda *_: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.is_available = lambda: bool(_PRETENDING)  # to torch's DataParallel, outside of `pretending`, it is not there


_register()


@contextmanager
def pretending() -> Iterator[torch.device]:
    """Context manager in which the device ``acc:0`` exists and networks on it can be traced."""
    before = devices.list_devices, tracing.tensor_problem
    devices.list_devices = lambda: ["cpu", "acc:0"]
    tracing.tensor_problem = lambda tensor: ""
    _PRETENDING.append(True)
    try:
        yield torch.device("acc", 0)
    finally:
        devices.list_devices, tracing.tensor_problem = before
        _PRETENDING.pop()
