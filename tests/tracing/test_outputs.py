"""Forms of output: every tensor that a network returns is found, or the network is refused in one line."""

import collections
import copy
import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers.modeling_outputs import BaseModelOutput

from regrow import Plan, apply, trace, verify
from regrow.tracing.capture import TraceError


@dataclasses.dataclass
class Plain:
    logits: Tensor
    features: Tensor


@dataclasses.dataclass(slots=True)
class Slotted:
    logits: Tensor
    features: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    logits: Tensor
    features: Tensor


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


class Private:
    __slots__ = ("__features", "logits")

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.__features = logits, features


class Derived(Private):
    __slots__ = ("more",)


class OneSlot:
    __slots__ = "pair"

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.pair = (logits, features)


class UnsetSlot:
    __slots__ = ("features", "logits", "unset")

    def __init__(self, logits: Tensor, features: Tensor) -> None:
        self.logits, self.features = logits, features


class Rows(Sequence[Tensor]):
    def __init__(self, *rows: Tensor) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)


class Table(Mapping[str, Tensor]):
    def __init__(self, **rows: Tensor) -> None:
        self._rows = rows

    def __getitem__(self, key: str) -> Tensor:
        return self._rows[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class ListOfMine(list[Tensor]):
    pass


class DictWithAttribute(dict[str, Tensor]):
    pass


def linked(logits: Tensor, features: Tensor) -> Any:
    node = types.SimpleNamespace(value=logits)
    node.next = types.SimpleNamespace(value=features, next=node)
    return node


def packed(logits: Tensor, features: Tensor) -> Any:
    return logits, pack_padded_sequence(features[:, None].expand(-1, 2, -1), torch.tensor([2, 1, 1]), batch_first=True)


FOUND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda y, h: (y, h),
    "list": lambda y, h: [y, h],
    "dict": lambda y, h: {"y": y, "h": h},
    "ordered dict": lambda y, h: collections.OrderedDict(y=y, h=h),
    "default dict": lambda y, h: collections.defaultdict(list, y=y, h=h),
    "nested": lambda y, h: {"a": [y, {"b": (h, None)}]},
    "named tuple": Named,
    "dataclass": Plain,
    "dataclass with slots": Slotted,
    "frozen dataclass": Frozen,
    "private slot": Private,
    "inherited slots": Derived,
    "one slot": OneSlot,
    "unset slot": UnsetSlot,
    "namespace": lambda y, h: types.SimpleNamespace(y=y, h=h),
    "model output": lambda y, h: BaseModelOutput(last_hidden_state=y, hidden_states=(h,)),
    "deque": lambda y, h: collections.deque([y, h]),
    "user dict": lambda y, h: collections.UserDict(y=y, h=h),
    "user list": lambda y, h: collections.UserList([y, h]),
    "sequence": Rows,
    "mapping": lambda y, h: Table(y=y, h=h),
    "list of its own": lambda y, h: ListOfMine([y, h]),
    "dict of its own": lambda y, h: DictWithAttribute(y=y, h=h),
    "mapping proxy": lambda y, h: types.MappingProxyType({"y": y, "h": h}),
    "values": lambda y, h: {"y": y, "h": h}.values(),
    "cycle": linked,
    "distribution": lambda y, h: (y, torch.distributions.Normal(h, torch.ones_like(h))),
    "object in a list": lambda y, h: [y, Slotted(y, h)],
    "the same twice": lambda y, h: (y, h, h, y),
    "packed sequence": packed,
    "complex": lambda y, h: (y, torch.complex(h, h)),
    "integers": lambda y, h: (y.argmax(-1), (h > 0.1).long()),
    "booleans": lambda y, h: (y > 0, h > 0.1),
    "one number": lambda y, h: (y.flatten()[0], h),
}
REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "generator": lambda y, h: (x for x in (y, h)),
    "map": lambda y, h: map(torch.neg, (y, h)),
    "zip": lambda y, h: zip((y,), (h,), strict=True),
    "iterator": lambda y, h: iter([y, h]),
    "set": lambda y, h: {y, h},
    "frozenset": lambda y, h: (y, frozenset([h])),
    "function": lambda y, h: (y, lambda: h),
    "nothing": lambda y, h: None,
    "number": lambda y, h: 1.0,
    "string": lambda y, h: "a",
    "array": lambda y, h: np.zeros(3),
    "empty list": lambda y, h: [],
    "partial": lambda y, h: partial(print, 1),
}


class Net(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.form = nn.Linear(7, 12), nn.Linear(12, 12), nn.Linear(12, 5), form

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x).relu()).relu()
        return self.form(self.c(h), h)


@pytest.mark.parametrize("name", FOUND)
def test_every_tensor_in_it_is_an_output(name: str) -> None:
    net, x = Net(FOUND[name]).double().eval(), torch.randn(3, 7, dtype=torch.float64)
    axes = trace(net, x)
    assert [axis.key for axis in axes.free()] == ["a.weight:0"], "features are an output, so they keep their width"
    plan = Plan.keeping(axes, {"a.weight:0": range(5)})
    report = verify(net, axes, plan)
    assert report.ok and report.positions > 0
    assert apply(copy.deepcopy(net), axes, plan)[0].a.out_features == 5


@pytest.mark.parametrize("name", REFUSED)
def test_what_hides_its_tensors_is_refused(name: str) -> None:
    with pytest.raises(TraceError) as error:
        trace(Net(REFUSED[name]).eval(), torch.randn(3, 7))
    assert "it returns" in str(error.value) and "\n" not in str(error.value)
