"""Networks that run otherwise than they are recorded: a cut is right or refused, whatever tells the two apart.

Each kind hides from the tracer which block is meant, or which mode it runs in. With ``flip`` the outputs show it before
a cut; with ``by width`` only a cut does.
"""

import argparse
import array
import collections
import contextvars
import copy
import ctypes
import decimal
import gc
import inspect
import io
import itertools
import logging
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regrow import Plan, apply, trace, verify
from regrow.core.plan import PlanError
from regrow.tracing.capture import TraceError

WIDTH = 12
MASK: list[Tensor | None] = [None]
"""What the hidden units are multiplied with, for masked runs."""

EFFECTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda h: h.flip(-1),
    "by width": lambda h: h * (h.shape[-1] / WIDTH),
}


class Block(nn.Module):
    """A residual block that asks whether it is the odd one."""

    def __init__(self, is_odd: Callable[["Block", Tensor], object], effect: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(7, WIDTH), nn.Linear(WIDTH, 7)
        self._is_odd, self._effect = is_odd, effect

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        h = h if MASK[0] is None else h * MASK[0]
        return x + self.down(self._effect(h) if self._is_odd(self, x) else h)


class Net(nn.Module):
    """Four blocks; before each, the network says in its hidden way which one follows."""

    def __init__(self, kind: "Kind", effect: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind.read, effect) for _ in range(4))
        self.head, self._say = nn.Linear(7, 3), kind.say
        for i, block in enumerate(self.blocks):
            kind.mark(block, i == 3)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            self._say(i == 3)
            x = block(x)
        return self.head(x)


@dataclass
class Kind:
    """A hidden way: what the network says before a block, what is written on a block, and how a block reads it."""

    read: Callable[[Any, Tensor], object]
    say: Callable[[bool], object] = lambda odd: None
    mark: Callable[[Any, bool], object] = lambda block, odd: None


@dataclass(slots=True)
class Slots:
    odd: bool


class Other:
    odd = False


class Asking:
    def __init__(self, odd: bool) -> None:
        self.__odd = odd

    def __bool__(self) -> bool:
        return self.__odd


variable: contextvars.ContextVar[bool] = contextvars.ContextVar("variable", default=False)
local = threading.local()
namespace, arguments = types.SimpleNamespace(odd=False), argparse.Namespace(odd=False)
user_dict, user_list = collections.UserDict(odd=False), collections.UserList([False])
default_dict, counter = collections.defaultdict(bool), collections.Counter()
numbers, matrix, letters = np.zeros(1), torch.zeros(1), bytearray(1)
machine_array, integer, text = array.array("b", [0]), ctypes.c_int(0), io.StringIO()
plain_list, plain_dict, plain_set, queue = [False], {"odd": False}, set(), collections.deque([False])
weak: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()
by_id: dict[int, bool] = {}
chain = collections.ChainMap({"odd": False})
slots, module = Slots(False), types.ModuleType("module")
logger = logging.getLogger("regrow.hidden")
calls = itertools.count()
flag = False


def say_in_globals(odd: bool) -> None:
    globals()["flag"] = odd


def keep(odd: bool, kept: list[bool] = [False]) -> bool:  # noqa: B006
    return kept[0]


def say_in_text(odd: bool) -> None:
    text.seek(0)
    text.write(str(int(odd)))


def counted() -> Callable[[bool], None]:
    state = {"odd": False}

    def say(odd: bool) -> None:
        state["odd"] = odd

    say.state = state  # type: ignore[attr-defined]
    return say


say_in_closure = counted()


def enclose(odd: bool) -> Callable[[], bool]:
    return lambda: odd


def say_in_set(odd: bool) -> None:
    plain_set.add("odd") if odd else plain_set.discard("odd")


def frame_is_odd() -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is Net.forward.__code__:
            return frame.f_locals["i"] == 3
        frame = frame.f_back
    return False


STATES: dict[str, Kind] = {
    "context variable": Kind(lambda b, x: variable.get(), variable.set),
    "thread local": Kind(lambda b, x: getattr(local, "odd", False), lambda odd: setattr(local, "odd", odd)),
    "namespace": Kind(lambda b, x: namespace.odd, lambda odd: setattr(namespace, "odd", odd)),
    "arguments": Kind(lambda b, x: arguments.odd, lambda odd: setattr(arguments, "odd", odd)),
    "user dict": Kind(lambda b, x: user_dict["odd"], lambda odd: user_dict.__setitem__("odd", odd)),
    "user list": Kind(lambda b, x: user_list[0], lambda odd: user_list.__setitem__(0, odd)),
    "default dict": Kind(lambda b, x: default_dict["odd"], lambda odd: default_dict.__setitem__("odd", odd)),
    "counter": Kind(lambda b, x: counter["odd"], lambda odd: counter.__setitem__("odd", int(odd))),
    "chain map": Kind(lambda b, x: chain["odd"], lambda odd: chain.__setitem__("odd", odd)),
    "numpy array": Kind(lambda b, x: numbers[0], lambda odd: numbers.__setitem__(0, odd)),
    "bytearray": Kind(lambda b, x: letters[0], lambda odd: letters.__setitem__(0, int(odd))),
    "array": Kind(lambda b, x: machine_array[0], lambda odd: machine_array.__setitem__(0, int(odd))),
    "ctypes": Kind(lambda b, x: integer.value, lambda odd: setattr(integer, "value", int(odd))),
    "text": Kind(lambda b, x: text.getvalue() == "1", say_in_text),
    "list": Kind(lambda b, x: plain_list[0], lambda odd: plain_list.__setitem__(0, odd)),
    "dict": Kind(lambda b, x: plain_dict["odd"], lambda odd: plain_dict.__setitem__("odd", odd)),
    "set": Kind(lambda b, x: "odd" in plain_set, say_in_set),
    "deque": Kind(lambda b, x: queue[0], lambda odd: queue.__setitem__(0, odd)),
    "global": Kind(lambda b, x: flag, say_in_globals),
    "class attribute": Kind(lambda b, x: Other.odd, lambda odd: setattr(Other, "odd", odd)),
    "slots": Kind(lambda b, x: slots.odd, lambda odd: setattr(slots, "odd", odd)),
    "module": Kind(lambda b, x: getattr(module, "odd", False), lambda odd: setattr(module, "odd", odd)),
    "environment": Kind(lambda b, x: os.environ.get("ODD") == "1", lambda odd: os.environ.update(ODD=str(int(odd)))),
    "logger": Kind(lambda b, x: logger.level == 10, lambda odd: logger.setLevel(10 if odd else 20)),
    "default argument": Kind(lambda b, x: keep(False), lambda odd: keep.__defaults__[0].__setitem__(0, odd)),
    "function attribute": Kind(lambda b, x: getattr(keep, "odd", False), lambda odd: setattr(keep, "odd", odd)),
    "closure": Kind(lambda b, x: say_in_closure.state["odd"], say_in_closure),  # type: ignore[attr-defined]
    "decimal context": Kind(
        lambda b, x: decimal.getcontext().prec == 9, lambda odd: setattr(decimal.getcontext(), "prec", 9 if odd else 28)
    ),
    "recursion limit": Kind(
        lambda b, x: sys.getrecursionlimit() == 3001, lambda odd: sys.setrecursionlimit(3001 if odd else 3000)
    ),
    "warning filters": Kind(
        lambda b, x: warnings.filters and warnings.filters[0][3] == 4242,
        lambda odd: warnings.filterwarnings("ignore", lineno=4242 if odd else 4241),
    ),
    "torch flag": Kind(
        lambda b, x: torch.backends.cudnn.benchmark, lambda odd: setattr(torch.backends.cudnn, "benchmark", odd)
    ),
    "torch flag by function": Kind(
        lambda b, x: torch.are_deterministic_algorithms_enabled(), torch.use_deterministic_algorithms
    ),
    "autocast cache": Kind(
        lambda b, x: not torch.is_autocast_cache_enabled(), lambda odd: torch.set_autocast_cache_enabled(not odd)
    ),
    "garbage collector": Kind(
        lambda b, x: gc.get_threshold()[0] == 701, lambda odd: gc.set_threshold(701 if odd else 700)
    ),
    "calling frame": Kind(lambda b, x: frame_is_odd()),
    "calls": Kind(lambda b, x: next(calls) % 4 == 3),
    "identity": Kind(lambda b, x: by_id.get(id(b)), mark=lambda b, odd: by_id.__setitem__(id(b), odd)),
    "weak reference": Kind(lambda b, x: weak.get(b), mark=lambda b, odd: weak.__setitem__(b, odd)),
    "parameter attribute": Kind(lambda b, x: b.up.weight.odd, mark=lambda b, odd: setattr(b.up.weight, "odd", odd)),
    "slots attribute": Kind(lambda b, x: b.held.odd, mark=lambda b, odd: setattr(b, "held", Slots(odd))),
    "array attribute": Kind(lambda b, x: b.held[0], mark=lambda b, odd: setattr(b, "held", np.array([odd]))),
    "namespace attribute": Kind(
        lambda b, x: b.held.odd, mark=lambda b, odd: setattr(b, "held", types.SimpleNamespace(odd=odd))
    ),
    "object attribute": Kind(lambda b, x: bool(b.held), mark=lambda b, odd: setattr(b, "held", Asking(odd))),
    "partial attribute": Kind(lambda b, x: b.held(), mark=lambda b, odd: setattr(b, "held", partial(bool, odd))),
    "function of a block": Kind(lambda b, x: b.held(), mark=lambda b, odd: setattr(b, "held", lambda odd=odd: odd)),
    "closure of a block": Kind(lambda b, x: b.held(), mark=lambda b, odd: setattr(b, "held", enclose(odd))),
    "path attribute": Kind(
        lambda b, x: b.held.name == "1", mark=lambda b, odd: setattr(b, "held", PurePath(str(int(odd))))
    ),
    "complex attribute": Kind(lambda b, x: b.held.imag, mark=lambda b, odd: setattr(b, "held", complex(0, odd))),
    "frozenset attribute": Kind(lambda b, x: len(b.held), mark=lambda b, o: setattr(b, "held", frozenset(range(o)))),
    "range attribute": Kind(lambda b, x: len(b.held), mark=lambda b, odd: setattr(b, "held", range(int(odd)))),
    "bytearray attribute": Kind(lambda b, x: b.held[0], mark=lambda b, odd: setattr(b, "held", bytearray([odd]))),
    "dict key": Kind(lambda b, x: "odd" in b.held, mark=lambda b, o: setattr(b, "held", {"odd" if o else "even": 1})),
    "hook of a child": Kind(
        lambda b, x: bool(b.down._forward_pre_hooks),
        mark=lambda b, odd: b.down.register_forward_pre_hook(lambda m, a: None) if odd else None,
    ),
    "mode of a child": Kind(lambda b, x: getattr(b.down, "mode", 0), mark=lambda b, odd: setattr(b.down, "mode", odd)),
    "order of names": Kind(
        lambda b, x: next(iter(b.held)) == "odd",
        mark=lambda b, o: setattr(b, "held", {"odd": 0, "a": 0} if o else {"a": 0, "odd": 0}),
    ),
    "subclass": Kind(
        lambda b, x: getattr(type(b), "odd", False),
        mark=lambda b, odd: setattr(b, "__class__", type("Block", (Block,), {"odd": odd})),
    ),
}  # fmt: skip
MODES: dict[str, Kind] = {
    "is_compiling": Kind(lambda b, x: not torch.compiler.is_compiling()),
    "is_exporting": Kind(lambda b, x: not torch.compiler.is_exporting()),
    "gradients are enabled": Kind(lambda b, x: not torch.is_grad_enabled()),
    "gradients are wanted": Kind(lambda b, x: not b.up(x).requires_grad),
    "there is a gradient function": Kind(lambda b, x: b.up(x).grad_fn is None),
    "type of the input": Kind(lambda b, x: type(x) is Tensor),
    "name of the type": Kind(lambda b, x: type(x).__name__ == "Tensor"),
    "type of the weight": Kind(lambda b, x: type(b.up.weight) is nn.Parameter),
    "attribute of fake tensors": Kind(lambda b, x: not hasattr(x, "fake_mode")),
    "device of the storage": Kind(lambda b, x: x.untyped_storage().device.type == "cpu"),
    "dispatch modes": Kind(lambda b, x: not torch._C._len_torch_dispatch_stack()),
    "function modes": Kind(lambda b, x: not torch._C._len_torch_function_stack()),
    "global hooks": Kind(lambda b, x: not nn.modules.module._global_forward_hooks),
    "training": Kind(lambda b, x: not b.training),
}


@contextmanager
def unchanged() -> Iterator[None]:
    """What kinds change in the interpreter is restored."""
    filters, limit, threshold = list(warnings.filters), sys.getrecursionlimit(), gc.get_threshold()
    precision, deterministic = decimal.getcontext().prec, torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        warnings.filters[:] = filters
        sys.setrecursionlimit(limit)
        gc.set_threshold(*threshold)
        decimal.getcontext().prec = precision
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = False
        torch.set_autocast_cache_enabled(True)
        os.environ.pop("ODD", None)


def run(net: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The network as users run it, or with masked hidden units."""
    MASK[0] = mask
    try:
        with torch.no_grad():
            return net(x)
    finally:
        MASK[0] = None


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("name", [*STATES, *MODES])
def test_a_cut_is_right_or_refused(name: str, effect: str) -> None:
    torch.manual_seed(0)
    kind = {**STATES, **MODES}[name]
    x = torch.randn(3, 7, dtype=torch.float64)
    with unchanged():
        net = Net(kind, EFFECTS[effect]).double().eval()
        try:
            axes = trace(net, x)
        except TraceError as error:
            assert "\n" not in str(error) and "does not run as it is recorded" in str(error)
            return
        free = [f"blocks.{i}.up.weight:0" for i in range(4) if axes[f"blocks.{i}.up.weight:0"].free]
        for kept in (WIDTH - 1, 6) if free else ():
            plan = Plan.keeping(axes, {key: range(kept) for key in free})
            mask = (torch.arange(WIDTH) < kept).double()
            masked, before = run_masked(net, x, mask, free), run(net, x)
            try:
                holds = verify(net, axes, plan).ok
            except PlanError as error:
                assert "\n" not in str(error)
                holds = False
            weight = net.blocks[3].up.weight
            try:
                apply(net, axes, plan)
            except PlanError as error:
                assert "\n" not in str(error) and not holds
                assert net.blocks[3].up.weight is weight and torch.equal(run(net, x), before)
                continue
            assert holds and (run(net, x) - masked).abs().max() <= 1e-9 * masked.abs().max()
            return


def run_masked(net: nn.Module, x: Tensor, mask: Tensor, keys: list[str]) -> Tensor:
    """The outputs with hidden units masked in the blocks of the axes that are cut."""
    blocks = {int(key.split(".")[1]) for key in keys}
    hooks = []
    for i, block in enumerate(net.blocks):
        hooks.append(
            block.register_forward_pre_hook(lambda m, a, i=i: MASK.__setitem__(0, mask if i in blocks else None))
        )
    try:
        return run(net, x)
    finally:
        for hook in hooks:
            hook.remove()


def test_a_copy_of_a_refused_network_is_what_it_was() -> None:
    """A cut that is refused leaves parameters, integers and attributes as they were, the same objects."""
    net = Net(STATES["global"], EFFECTS["by width"]).double().eval()
    x = torch.randn(3, 7, dtype=torch.float64)
    axes = trace(net, x)
    before, state = copy.deepcopy(net.state_dict()), {name: id(p) for name, p in net.named_parameters()}
    keys = [f"blocks.{i}.up.weight:0" for i in range(4) if axes[f"blocks.{i}.up.weight:0"].free]
    if keys:
        with pytest.raises(PlanError):
            apply(net, axes, Plan.keeping(axes, {key: range(6) for key in keys}))
    assert state == {name: id(p) for name, p in net.named_parameters()}
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert {block.up.out_features for block in net.blocks} == {WIDTH}
