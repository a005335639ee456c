"""A zoo of networks: what each is built of, what it is called with, and which axes it must turn out to have.

Sizes differ wherever they can, so that no two dimensions match by luck; one net, ``coincidence``, has them all alike.
Weights, running statistics, gains and biases are random, so that no wrong cut hides behind a 1 or a 0.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.axes import Axis, AxisGraph, Mark

N, C, F_, R = Mark.NEUTRAL, Mark.COMPETED, Mark.FOLDED, Mark.RESTATED


# --- facts about axes -----------------------------------------------------------------------------------------------


class Fact(Protocol):
    """Something that must hold of a traced network."""

    def missed(self, axes: AxisGraph) -> str:
        """What is wrong, in words; empty if the fact holds."""
        ...


@dataclass(frozen=True)
class Has:
    """A free axis of ``size`` units and one of the ``marks`` lies in each of the places (``"name:dim"``)."""

    size: int
    at: tuple[str, ...]
    marks: tuple[Mark, ...] = (N,)
    alone: bool = False
    """Whether it lies nowhere else."""

    def missed(self, axes: AxisGraph) -> str:
        """The places in which no such axis lies."""
        for axis in axes:
            places = places_of(axis)
            if axis.free and axis.size == self.size and places >= set(self.at) and axis.mark in self.marks:
                return "" if not self.alone or places == set(self.at) else f"{axis.key} also lies in {places}"
        near = [f"{a.key} ({a.size}, {a.mark}, {a.reason!r})" for p in self.at for a in lying_at(axes, p)]
        return f"no free axis of {self.size} units in {self.at} with a mark in {self.marks}; there: {sorted(set(near))}"


@dataclass(frozen=True)
class Frozen:
    """No free axis lies in any of the places, and the axis that does says why."""

    at: tuple[str, ...]

    def missed(self, axes: AxisGraph) -> str:
        """The free axes found there, or the missing reason."""
        for place in self.at:
            found = lying_at(axes, place)
            if free := [axis.key for axis in found if axis.free]:
                return f"{free} is free at {place}"
            if not any(axis.reason for axis in found):
                return f"nothing says why {place} is frozen"
        return ""


@dataclass(frozen=True)
class NotNeutral:
    """No neutral axis lies in any of the places; another mark is welcome if the laws hold for it."""

    at: tuple[str, ...]
    size: int = 0
    """Only axes of this size, if given."""

    def missed(self, axes: AxisGraph) -> str:
        """The neutral axes found there."""
        found = [a for place in self.at for a in lying_at(axes, place) if a.mark is N and self.size in (0, a.size)]
        return f"{[axis.key for axis in found]} is called neutral" if found else ""


@dataclass(frozen=True)
class Widths:
    """The sizes of all outermost neutral axes."""

    sizes: tuple[int, ...]

    def missed(self, axes: AxisGraph) -> str:
        """The sizes found instead."""
        found = sorted(axis.size for axis in axes.free() if axis.mark is N and not axis.inside)
        return "" if found == sorted(self.sizes) else f"outermost neutral axes {found}, not {sorted(self.sizes)}"


@dataclass(frozen=True)
class SameCount:
    """The free axes of ``size`` units at two places differ but must keep equally many units."""

    size: int
    one: str
    other: str

    def missed(self, axes: AxisGraph) -> str:
        """What they say instead."""
        ones, others = (
            [a for a in lying_at(axes, p) if a.free and a.size == self.size] for p in (self.one, self.other)
        )
        if not ones or not others:
            return f"no free axis of {self.size} units at {self.one if not ones else self.other}"
        good = any(a.count and a.count == b.count and a.key != b.key for a in ones for b in others)
        return "" if good else f"{ones[0].key} and {others[0].key} are not tied by count"


@dataclass(frozen=True)
class Noted:
    """A note about what could not be read contains this word."""

    word: str

    def missed(self, axes: AxisGraph) -> str:
        """The notes found instead."""
        return "" if any(self.word in note for note in axes.notes) else f"no note on {self.word!r} in {axes.notes}"


@dataclass(frozen=True)
class Unreached:
    """A parameter that fits the pattern is listed as not reached by the example, and lies in no free axis."""

    pattern: str

    def missed(self, axes: AxisGraph) -> str:
        """Why not."""
        names = [name for name in axes.unreached if fnmatchcase(name, self.pattern)]
        if not names:
            return f"{self.pattern} is not listed as unreached"
        cut = {slot.name for axis in axes.free() for slot in axis.slots} & set(names)
        return f"unreached, yet in a free axis: {sorted(cut)}" if cut else ""


@dataclass(frozen=True)
class Tied:
    """One tensor under two names."""

    one: str
    other: str

    def missed(self, axes: AxisGraph) -> str:
        """The ties found instead."""
        known = {frozenset(pair) for pair in axes.ties.items()}
        return "" if frozenset((self.one, self.other)) in known else f"{self.one} = {self.other} not in {axes.ties}"


@dataclass(frozen=True)
class Hoped:
    """A fact that the design promises and that does not hold yet; the day it does, a test says so."""

    fact: Fact

    def missed(self, axes: AxisGraph) -> str:
        """What is wrong, in words; empty if the fact holds."""
        return self.fact.missed(axes)


def places_of(axis: Axis) -> set[str]:
    """The dimensions in which an axis lies, as ``"name:dim"``."""
    return {f"{slot.name}:{slot.dim}" for slot in axis.slots}


def lying_at(axes: AxisGraph, place: str) -> list[Axis]:
    """The axes, free or not, that lie in a dimension."""
    return [axis for axis in axes if place in places_of(axis)]


# --- networks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Net:
    """One network of the zoo.

    Args:
        name: How tests call it.
        build: Makes it, in eval mode, the same each time.
        example: What it is called with.
        expect: What tracing must find.
        zeros: Where a zero stands for a missing unit: at the weights that read it, unless sums or products of
            activations read it too. Then only a zero at its producers reaches all of them, and only if no function in
            between makes something of nothing.
        branches: Whether its Python looks at sizes, so that a plan may be refused when it is applied.
        heavy: Whether it takes seconds rather than milliseconds.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    expect: tuple[Fact, ...] = ()
    zeros: Literal["consumers", "producers", "nowhere"] = "consumers"
    branches: bool = False
    heavy: bool = False


class Wired(nn.Module):
    """A module made of named parts and a function that wires them."""

    def __init__(self, wire: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.wire = wire
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the wiring."""
        return self.wire(self, *inputs)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value that is not special, and switch to eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    norms = ("Norm", "RMS")
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("weight", "layer_scale", "gamma")) and max(parameter.shape) == parameter.numel()
            if gain and (parameter.dim() == 1 or "scale" in name):
                start = 0.0 if "Gemma" in type(owner[id(parameter)]).__name__ else 1.0
                parameter.copy_(start + 0.3 * normal(parameter))
            elif parameter.dim() < 2 or any(part in type(owner[id(parameter)]).__name__ for part in norms):
                parameter.copy_(0.3 * normal(parameter))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(normal(parameter) * (1.5 / fan_in) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def images(channels: int, height: int, width: int = 0, batch: int = 2) -> Callable[[], tuple[tuple, dict]]:
    """An example of random pictures."""
    return _random((batch, channels, height, width or height))


def vectors(*shape: int) -> Callable[[], tuple[tuple, dict]]:
    """An example of random numbers."""
    return _random(shape)


def tokens(vocabulary: int, *shape: int, name: str = "") -> Callable[[], tuple[tuple, dict]]:
    """An example of random token numbers, positional or by name."""

    def example() -> tuple[tuple, dict]:
        ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(5))
        return ((), {name: ids}) if name else ((ids,), {})

    return example


def _random(shape: tuple[int, ...]) -> Callable[[], tuple[tuple, dict]]:
    return lambda: ((torch.randn(shape, generator=torch.Generator().manual_seed(5)),), {})


def wired(
    name: str,
    wire: Callable[..., Any],
    parts: Callable[[], dict[str, Any]],
    example: Callable[[], tuple[tuple, dict]],
    *expect: Fact,
    tie: Callable[[nn.Module], None] = lambda model: None,
    **more: Any,
) -> Net:
    """A hand-made net of the zoo."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Wired(wire, **parts())
        tie(model)
        return randomised(model)

    return Net(name, build, example, expect, **more)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)


# --- plain nets -----------------------------------------------------------------------------------------------------

PLAIN = (
    wired(
        "mlp",
        lambda m, x: m.fc3(F.gelu(m.fc2(m.fc1(x).relu()))),
        lambda: {"fc1": nn.Linear(6, 10), "fc2": nn.Linear(10, 7), "fc3": nn.Linear(7, 5)},
        vectors(3, 6),
        Widths((10, 7)),
        Has(10, ("fc1.weight:0", "fc1.bias:0", "fc2.weight:1"), alone=True),
        Has(7, ("fc2.weight:0", "fc2.bias:0", "fc3.weight:1"), alone=True),
        Frozen(("fc1.weight:1", "fc3.weight:0", "fc3.bias:0")),
    ),
    wired(
        "conv_residual",
        lambda m, x: m.head(F.relu(m.block(h := m.stem(x)) + h).mean((2, 3))),
        lambda: {
            "stem": nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            "block": nn.Sequential(
                conv(8, 12, bias=False), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 8, bias=False), nn.BatchNorm2d(8)
            ),
            "head": nn.Linear(8, 5),
        },
        images(3, 9, 7),
        Widths((8, 12)),
        Has(8, ("stem.0.weight:0", "stem.1.running_var:0", "block.0.weight:1", "block.3.weight:0", "head.weight:1")),
        Has(12, ("block.0.weight:0", "block.1.running_mean:0", "block.1.bias:0", "block.3.weight:1")),
        Frozen(("stem.0.weight:1", "head.weight:0")),
    ),
    wired(
        "depthwise",
        lambda m, x: m.head(m.point(F.relu6(m.norm(m.depth(m.stem(x))))).amax((2, 3))),
        lambda: {
            "stem": conv(3, 9),
            "depth": conv(9, 9, groups=9, stride=2),
            "norm": nn.BatchNorm2d(9),
            "point": conv(9, 7, 1),
            "head": nn.Linear(7, 5),
        },
        images(3, 8),
        Widths((9, 7)),
        Has(9, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "norm.weight:0", "point.weight:1")),
    ),
    wired(
        "depth_multiplier",
        lambda m, x: m.head(m.depth(m.stem(x)).relu().mean((2, 3))),
        lambda: {"stem": conv(3, 5), "depth": conv(5, 15, groups=5), "head": nn.Linear(15, 4)},
        images(3, 6),
        Has(5, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "head.weight:1")),
    ),
    wired(
        "concat",
        lambda m, x: m.head(m.join(torch.cat([m.one(x).relu(), m.two(x).sigmoid()], 1)).relu().mean((2, 3))),
        lambda: {"one": conv(3, 5), "two": conv(3, 7), "join": conv(12, 6), "head": nn.Linear(6, 4)},
        images(3, 8),
        Widths((5, 7, 6)),
        Has(5, ("one.weight:0", "one.bias:0", "join.weight:1"), alone=True),
        Has(7, ("two.weight:0", "two.bias:0", "join.weight:1"), alone=True),
    ),
    wired(
        "concat_flatten",
        lambda m, x: m.head(torch.cat([m.one(x), m.two(x)], 1).tanh().flatten(1)),
        lambda: {"one": conv(3, 5), "two": conv(3, 7), "head": nn.Linear(12 * 6, 4)},
        images(3, 3, 2),
        Widths((5, 7)),
        Has(5, ("one.weight:0", "head.weight:1")),
        Has(7, ("two.weight:0", "head.weight:1")),
    ),
    wired(
        "flatten",
        lambda m, x: m.fc2(m.fc1(m.norm(m.stem(x)).relu().flatten(1)).tanh()),
        lambda: {"stem": conv(3, 5), "norm": nn.BatchNorm2d(5), "fc1": nn.Linear(60, 11), "fc2": nn.Linear(11, 4)},
        images(3, 4, 3),
        Widths((5, 11)),
        Has(5, ("stem.weight:0", "norm.bias:0", "fc1.weight:1")),
    ),
    wired(
        "grouped",
        lambda m, x: m.head(m.last(m.group(m.stem(x).relu()).relu()).mean((2, 3))),
        lambda: {
            "stem": conv(3, 12),
            "group": conv(12, 18, groups=3),
            "last": conv(18, 7),
            "head": nn.Linear(7, 5),
        },
        images(3, 6),
        Has(3, ("stem.weight:0", "group.weight:0", "group.bias:0", "last.weight:1")),
        Has(4, ("stem.weight:0", "stem.bias:0", "group.weight:1")),
        Has(6, ("group.weight:0", "group.bias:0", "last.weight:1")),
        Has(7, ("last.weight:0", "head.weight:1")),
    ),
    wired(
        "transposed",
        lambda m, x: m.head(m.up(m.stem(x).relu()).relu().mean((2, 3))),
        lambda: {"stem": conv(3, 6), "up": nn.ConvTranspose2d(6, 9, 2, stride=2), "head": nn.Linear(9, 4)},
        images(3, 5),
        Widths((6, 9)),
        Has(6, ("stem.weight:0", "up.weight:0")),
        Has(9, ("up.weight:1", "up.bias:0", "head.weight:1")),
    ),
    wired(
        "conv1d",
        lambda m, x: m.head(m.act(m.two(F.silu(m.one(x)))).transpose(1, 2)),
        lambda: {
            "one": nn.Conv1d(3, 6, 3),
            "two": nn.Conv1d(6, 8, 3, stride=2),
            "act": nn.PReLU(8),
            "head": nn.Linear(8, 4),
        },
        vectors(2, 3, 13),
        Widths((6, 8)),
        Has(8, ("two.weight:0", "act.weight:0", "head.weight:1")),
    ),
    wired(
        "unused_branch",
        lambda m, x: (m.unused(h := m.fc(x).sigmoid()), m.out(h))[1],
        lambda: {"fc": nn.Linear(6, 10), "unused": nn.Linear(10, 4), "out": nn.Linear(10, 3)},
        vectors(2, 6),
        Widths((10,)),
        Has(10, ("fc.weight:0", "unused.weight:1", "out.weight:1")),
    ),
    wired(
        "returned",
        lambda m, x: {"features": (h := m.fc(x).sigmoid()), "logits": m.two(m.one(h).sigmoid())},
        lambda: {"fc": nn.Linear(6, 10), "one": nn.Linear(10, 7), "two": nn.Linear(7, 3)},
        vectors(2, 6),
        Widths((7,)),
        Frozen(("fc.weight:0", "one.weight:1")),
    ),
    wired(
        "bilinear",
        lambda m, x: m.out(m.both(m.one(x), m.two(x))),
        lambda: {
            "one": nn.Linear(6, 5),
            "two": nn.Linear(6, 7),
            "both": nn.Bilinear(5, 7, 8),
            "out": nn.Linear(8, 3),
        },
        vectors(2, 6),
    ),
    wired(
        "einsum",
        lambda m, x: m.out(torch.einsum("bij,bkj->bik", m.one(x), m.two(x)).softmax(-1) @ m.three(x)),
        lambda: {"one": nn.Linear(6, 5), "two": nn.Linear(6, 5), "three": nn.Linear(6, 7), "out": nn.Linear(7, 3)},
        vectors(2, 4, 6),
        Has(7, ("three.weight:0", "out.weight:1")),
        zeros="producers",
    ),
    wired(
        "lstm",
        lambda m, x: m.out(m.cell(m.fc(x))[0]),
        lambda: {"fc": nn.Linear(6, 5), "cell": nn.LSTM(5, 7, batch_first=True), "out": nn.Linear(7, 3)},
        vectors(2, 4, 6),
    ),
    wired(
        "multihead",
        lambda m, x: m.fc2(F.gelu(m.fc1(m.mix(h := m.fc(x), h, h, need_weights=False)[0]))),
        lambda: {
            "fc": nn.Linear(6, 12),
            "mix": nn.MultiheadAttention(12, 3, batch_first=True),
            "fc1": nn.Linear(12, 10),
            "fc2": nn.Linear(10, 3),
        },
        vectors(2, 4, 6),
        Has(10, ("fc1.weight:0", "fc2.weight:1")),
    ),
    wired(
        "circular",
        lambda m, x: m.head(m.two(m.one(x).sigmoid()).sigmoid().mean((2, 3))),
        lambda: {
            "one": conv(3, 5, padding_mode="circular"),
            "two": conv(5, 7, padding_mode="reflect"),
            "head": nn.Linear(7, 4),
        },
        images(3, 6),
        Widths((5, 7)),
    ),
    wired(
        "norm1d",
        lambda m, x: m.fc2(m.norm(m.fc1(x)).relu()),
        lambda: {"fc1": nn.Linear(6, 10, bias=False), "norm": nn.BatchNorm1d(10), "fc2": nn.Linear(10, 5)},
        vectors(3, 6),
        Widths((10,)),
    ),
    wired(
        "layernorm_block",
        lambda m, x: m.head(m.fc2(F.gelu(m.fc1(m.norm(h := m.stem(x))))) + h),
        lambda: {
            "stem": nn.Linear(6, 9),
            "norm": nn.LayerNorm(9),
            "fc1": nn.Linear(9, 14),
            "fc2": nn.Linear(14, 9),
            "head": nn.Linear(9, 5),
        },
        vectors(2, 4, 6),
        Has(14, ("fc1.weight:0", "fc1.bias:0", "fc2.weight:1")),
        NotNeutral(("stem.weight:0", "norm.weight:0", "fc1.weight:1", "fc2.weight:0")),
    ),
    wired(
        "rmsnorm_block",
        lambda m, x: m.head(m.last(m.fc2(F.silu(m.fc1(m.norm(h := m.stem(x))))) + h)),
        lambda: {
            "stem": nn.Linear(6, 9, bias=False),
            "norm": nn.RMSNorm(9, eps=0.1),
            "fc1": nn.Linear(9, 14, bias=False),
            "fc2": nn.Linear(14, 9, bias=False),
            "last": nn.RMSNorm(9, eps=1e-3),
            "head": nn.Linear(9, 5),
        },
        vectors(2, 4, 6),
        Has(14, ("fc1.weight:0", "fc2.weight:1")),
        Has(9, ("stem.weight:0", "norm.weight:0", "fc1.weight:1", "fc2.weight:0", "last.weight:0"), (F_,)),
    ),
    wired(
        "rmsnorm_default_epsilon",
        lambda m, x: m.head(m.norm(m.stem(x))),
        lambda: {"stem": nn.Linear(6, 9, bias=False), "norm": nn.RMSNorm(9), "head": nn.Linear(9, 5)},
        vectors(2, 4, 6),
        Has(9, ("stem.weight:0", "norm.weight:0", "head.weight:1"), (F_,)),
    ),
    wired(
        "tied",
        lambda m, x: m.head(F.gelu(m.two(m.one(m.embed(x)).relu())) + m.embed(x)),
        lambda: {
            "embed": nn.Embedding(11, 6),
            "one": nn.Linear(6, 8),
            "two": nn.Linear(8, 6),
            "head": nn.Linear(6, 11, bias=False),
        },
        tokens(11, 2, 5),
        Widths((6, 8)),
        Has(6, ("embed.weight:1", "one.weight:1", "two.weight:0", "two.bias:0")),
        Tied("embed.weight", "head.weight"),
        tie=lambda m: setattr(m.head, "weight", m.embed.weight),
    ),
    wired(
        "two_consumers",
        lambda m, x: (m.one(h := m.fc(x).relu()), {"two": m.two(h)}),
        lambda: {"fc": nn.Linear(6, 10), "one": nn.Linear(10, 3), "two": nn.Linear(10, 4)},
        vectors(3, 6),
        Widths((10,)),
        Has(10, ("fc.weight:0", "one.weight:1", "two.weight:1")),
    ),
    wired(
        "shared_layer",
        lambda m, x: m.head(m.both(m.one(x).relu()) + m.both(m.two(x).sigmoid()).relu()),
        lambda: {
            "one": nn.Linear(6, 10),
            "two": nn.Linear(6, 10),
            "both": nn.Linear(10, 7),
            "head": nn.Linear(7, 4),
        },
        vectors(3, 6),
        Widths((10, 7)),
        Has(10, ("one.weight:0", "two.weight:0", "both.weight:1")),
    ),
    wired(
        "auxiliary",
        lambda m, x: m.head(h := m.stem(x).tanh()) + (m.aux(h) if m.training else 0),
        lambda: {"stem": nn.Linear(5, 9), "head": nn.Linear(9, 3), "aux": nn.Linear(9, 3)},
        vectors(2, 5),
        Has(9, ("stem.weight:0", "head.weight:1", "aux.weight:1")),
    ),
    wired(
        "recurrent",
        lambda m, x: m.out(_unroll(m, x)),
        lambda: {"read": nn.Linear(5, 8), "again": nn.Linear(8, 8), "out": nn.Linear(8, 3)},
        vectors(2, 4, 5),
        Widths((8,)),
        Has(8, ("read.weight:0", "again.weight:0", "again.weight:1", "out.weight:1")),
    ),
    wired(
        "squeeze_excite",
        lambda m, x: m.head(_excited(m, m.stem(x).relu()).mean((2, 3))),
        lambda: {"stem": conv(3, 9), "down": conv(9, 4, 1), "up": conv(4, 9, 1), "head": nn.Linear(9, 5)},
        images(3, 6),
        Widths((9, 4)),
        Has(9, ("stem.weight:0", "down.weight:1", "up.weight:0", "head.weight:1")),
    ),
    wired(
        "outer_product",
        lambda m, x: m.out((m.one(x)[:, :, None] * m.two(x)[:, None, :]).tanh().flatten(1)),
        lambda: {"one": nn.Linear(6, 4), "two": nn.Linear(6, 7), "out": nn.Linear(28, 3)},
        vectors(2, 6),
        Has(4, ("one.weight:0", "out.weight:1")),
        Has(7, ("two.weight:0", "out.weight:1")),
    ),
    wired(
        "repeated",
        lambda m, x: m.out(m.fc(x).sigmoid().repeat(1, 2)),
        lambda: {"fc": nn.Linear(6, 5), "out": nn.Linear(10, 3)},
        vectors(2, 6),
    ),
    wired(
        "positions",
        lambda m, x: m.out((m.embed(x) + m.place[: x.shape[1]]).relu()),
        lambda: {
            "embed": nn.Embedding(11, 6),
            "place": nn.Parameter(torch.zeros(9, 6)),
            "out": nn.Linear(6, 3),
        },
        tokens(11, 2, 5),
        Widths((6,)),
        Has(6, ("embed.weight:1", "place:1", "out.weight:1")),
        Frozen(("embed.weight:0", "place:0")),
    ),
    wired(
        "attention",
        lambda m, x: m.out(_attend(m, x)),
        lambda: {
            "heads": 3,
            "query": nn.Linear(10, 12),
            "key": nn.Linear(10, 12),
            "value": nn.Linear(10, 21),
            "out": nn.Linear(21, 6),
        },
        vectors(2, 5, 10),
        Has(3, ("query.weight:0", "key.weight:0", "value.weight:0", "out.weight:1")),
        Has(7, ("value.weight:0", "out.weight:1")),
    ),
    wired(
        "attention_unscaled",
        lambda m, x: m.out(torch.bmm(torch.bmm(m.query(x), m.key(x).transpose(1, 2)).softmax(-1), m.value(x))),
        lambda: {
            "query": nn.Linear(10, 6),
            "key": nn.Linear(10, 6),
            "value": nn.Linear(10, 7),
            "out": nn.Linear(7, 4),
        },
        vectors(2, 5, 10),
        Has(7, ("value.weight:0", "out.weight:1")),
        Has(6, ("query.weight:0", "key.weight:0")),
        zeros="producers",
    ),
    wired(
        "coincidence",
        lambda m, x: m.head((m.point(m.depth(m.stem(x)).relu()) + x).mean(3).flatten(1)),
        lambda: {
            "stem": conv(4, 4),
            "depth": conv(4, 4, groups=4),
            "point": conv(4, 4, 1),
            "head": nn.Linear(16, 4),
        },
        images(4, 4, batch=4),
        Widths((4,)),
        Has(4, ("stem.weight:0", "depth.weight:0", "depth.bias:0", "point.weight:1"), alone=False),
        Frozen(("stem.weight:1", "point.weight:0", "head.weight:1")),
    ),
)


def _excited(m: Any, x: Tensor) -> Tensor:
    return x * m.up(F.silu(m.down(x.mean((2, 3), keepdim=True)))).sigmoid()


def _unroll(m: Any, x: Tensor) -> Tensor:
    state = m.read(x[:, 0]).tanh()
    for step in range(1, x.shape[1]):
        state = (m.read(x[:, step]) + m.again(state)).tanh()
    return state


def _attend(m: Any, x: Tensor) -> Tensor:
    def split(y: Tensor) -> Tensor:
        return y.view(*y.shape[:2], m.heads, -1).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(split(m.query(x)), split(m.key(x)), split(m.value(x)))
    return mixed.transpose(1, 2).flatten(2)


# --- nets that look as if a plain cut were right, and most of them are not -------------------------------------------


def fooling(
    name: str,
    wire: Callable[..., Tensor],
    *expect: Fact,
    width: int = 8,
    after: int = 0,
    size: tuple[int, int] = (5, 4),
    **more: Any,
) -> Net:
    """Conv–BatchNorm, something odd along its channels, then a conv and a head."""
    parts = more.pop("parts", dict)
    whole = more.pop("wire_whole", lambda m, x: m.head(m.last(wire(m, m.norm(m.stem(x)))).relu().mean((2, 3))))
    return wired(
        name,
        whole,
        lambda: {
            "stem": conv(3, width, bias=False),
            "norm": nn.BatchNorm2d(width),
            "last": conv(after or width, 6),
            "head": nn.Linear(6, 5),
            **parts(),
        },
        images(3, *size),
        Has(6, ("last.weight:0", "last.bias:0", "head.weight:1"), alone=True),
        *expect,
        **more,
    )


def _spread(m: Any, x: Tensor) -> Tensor:
    gate = m.along(x.mean((2, 3))[:, None])[:, 0].sigmoid()
    return x * gate[:, :, None, None]


def _cbam(m: Any, x: Tensor) -> Tensor:
    seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * m.look(seen).sigmoid()


def _shuffle(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.view(batch, 3, channels // 3, height, width).transpose(1, 2).flatten(1, 2)


def _halves(m: Any, x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return m.one(x[:, :half]).relu() + m.two(x[:, half:]).tanh()


def _chunks(m: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=1)
    return m.one(one).relu() + m.two(two).tanh()


def _gated(m: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=1)
    return one * two.sigmoid()


def _standardised(m: Any, x: Tensor) -> Tensor:
    weight = m.mid.weight
    weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.std((1, 2, 3), keepdim=True) + 0.1)
    return F.conv2d(x, weight, m.mid.bias, padding=1)


def _in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:5].mul_(3)
    x[:, 6] = 1
    return x


def _by_size(m: Any, x: Tensor) -> Tensor:
    return x.relu() if x.shape[1] >= 6 else x.tanh()


STEM = ("stem.weight:0", "norm.weight:0", "norm.running_mean:0")
FOOLING = (
    # Nothing wrong with these: a tracer that freezes them is too shy.
    fooling("sigmoid_after_norm", lambda m, x: x.sigmoid(), Has(8, (*STEM, "last.weight:1"))),
    fooling("exp_shift", lambda m, x: (x + 3).exp(), Has(8, (*STEM, "last.weight:1"))),
    fooling("softmax_over_space", lambda m, x: x.softmax(-1), Has(8, (*STEM, "last.weight:1"))),
    fooling("mean_over_space", lambda m, x: x - x.mean((2, 3), keepdim=True), Has(8, (*STEM, "last.weight:1"))),
    fooling(
        "instance_norm",
        lambda m, x: m.each(x).relu(),
        Has(8, (*STEM, "each.weight:0", "last.weight:1")),
        parts=lambda: {"each": nn.InstanceNorm2d(8, affine=True)},
    ),
    fooling("flip_space", lambda m, x: x.flip(2).roll(1, 3), Has(8, (*STEM, "last.weight:1"))),
    fooling("glu", lambda m, x: F.glu(x, 1), Has(5, (*STEM, "last.weight:1")), width=10, after=5),
    fooling("chunk_gate", _gated, Has(5, (*STEM, "last.weight:1")), width=10, after=5),
    fooling(
        "chunk_apart",
        _chunks,
        Has(5, (*STEM, "one.weight:1")),
        Has(5, (*STEM, "two.weight:1")),
        SameCount(5, "one.weight:1", "two.weight:1"),
        width=10,
        after=7,
        parts=lambda: {"one": conv(5, 7), "two": conv(5, 7)},
    ),
    fooling(
        "half_split",
        _halves,
        Has(5, (*STEM, "one.weight:1")),
        Has(5, (*STEM, "two.weight:1")),
        SameCount(5, "one.weight:1", "two.weight:1"),
        width=10,
        after=7,
        parts=lambda: {"one": conv(5, 7), "two": conv(5, 7)},
    ),
    fooling("pixel_shuffle", lambda m, x: F.pixel_shuffle(x, 2), Has(5, (*STEM, "last.weight:1")), width=20, after=5),
    fooling("channel_shuffle", _shuffle, Has(4, (*STEM, "last.weight:1")), width=12),
    # These change the function of the whole when a plain cut is made.
    fooling(
        "eca",
        _spread,
        Frozen(STEM),
        parts=lambda: {"along": nn.Conv1d(1, 1, 3, padding=1, bias=False)},
    ),
    fooling("cbam", _cbam, NotNeutral(STEM), parts=lambda: {"look": conv(2, 1)}),
    fooling(
        "softmax_gate",
        lambda m, x: x * m.gate(x.mean((2, 3))).softmax(1)[:, :, None, None],
        Has(8, (*STEM, "gate.weight:0", "gate.weight:1", "last.weight:1"), (C,)),
        parts=lambda: {"gate": nn.Linear(8, 8)},
    ),
    fooling(
        "group_norm",
        lambda m, x: m.group(x).relu(),
        NotNeutral((*STEM, "group.weight:0"), 12),
        NotNeutral((*STEM, "group.weight:0"), 4),
        width=12,
        parts=lambda: {"group": nn.GroupNorm(3, 12)},
    ),
    fooling(
        "group_norm_one",
        lambda m, x: m.group(x).relu(),
        NotNeutral((*STEM, "group.weight:0"), 8),
        parts=lambda: {"group": nn.GroupNorm(1, 8)},
    ),
    fooling("cumsum", lambda m, x: x.cumsum(1), Frozen(STEM)),
    fooling("flip", lambda m, x: x.flip(1), Frozen(STEM)),
    fooling("roll", lambda m, x: x.roll(2, 1), Frozen(STEM)),
    fooling("roll_two", lambda m, x: x.roll((1, 2), (1, 2)), Frozen(STEM)),
    fooling("roll_back", lambda m, x: x.roll(-1, -3), Frozen(STEM)),
    fooling("deviation", lambda m, x: x / (x.std(dim=1, keepdim=True, correction=0) + 1), NotNeutral(STEM)),
    fooling("diff", lambda m, x: x.diff(dim=1), Frozen(STEM), after=7),
    fooling("renorm", lambda m, x: x.transpose(0, 1).renorm(2, 0, 0.5).transpose(0, 1), Has(8, STEM)),
    fooling("mean_over_all", lambda m, x: x - x.mean((1, 2, 3), keepdim=True), NotNeutral(STEM)),
    fooling(
        "norm_over_all",
        lambda m, x: m.whole(x),
        NotNeutral(STEM),
        parts=lambda: {"whole": nn.LayerNorm((8, 5, 4))},
    ),
    fooling("max_norm", lambda m, x: x / (1 + torch.linalg.vector_norm(x, torch.inf, 1, keepdim=True)), Frozen(STEM)),
    fooling("order_one", lambda m, x: x / (1 + x.norm(1, 1, keepdim=True)), zeros="producers"),
    fooling("log_sum", lambda m, x: x - x.logsumexp(1, keepdim=True), NotNeutral(STEM)),
    fooling("minimum", lambda m, x: x - x.amin(1, keepdim=True), NotNeutral(STEM)),
    fooling("inplace_slice", lambda m, x: _in_place(x)),
    fooling("pool_channels", lambda m, x: F.max_pool3d(x, (2, 1, 1)), Frozen(STEM), after=4),
    fooling("resize_channels", lambda m, x: F.interpolate(x.flatten(2).mT, 5).mT.unflatten(2, (5, 4)), after=5),
    fooling("cosine", lambda m, x: x * F.cosine_similarity(x, x.sigmoid(), dim=1)[:, None], zeros="nowhere"),
    fooling("distance", lambda m, x: x * torch.cdist(x.flatten(2), x.flatten(2)).mean(2)[:, :, None, None]),
    fooling("unfold", lambda m, x: F.unfold(x, 1).unflatten(2, (5, 4))),
    fooling("take_along", lambda m, x: x.gather(1, x.argsort(1)), Frozen(STEM)),
    fooling("where_index", lambda m, x: torch.where((torch.arange(8) < 3)[:, None, None], x, 0.0), Frozen(STEM)),
    fooling(
        "softmax_parameter",
        lambda m, x: x * m.share.softmax(0)[:, None, None],
        NotNeutral(STEM),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
    ),
    fooling(
        "mean_of_parameter",
        lambda m, x: x * (m.share / m.share.mean())[:, None, None],
        NotNeutral(STEM),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
    ),
    fooling(
        "channel_weights",
        lambda m, x: x * (x * m.share[:, None, None]).sum(1, keepdim=True),
        parts=lambda: {"share": nn.Parameter(torch.zeros(8))},
        zeros="producers",
    ),
    fooling(
        "buffer_of_size",
        lambda m, x: x * m.scale,
        Has(8, STEM),
        parts=lambda: {"scale": nn.Buffer(torch.tensor(8**-0.5))},
    ),
    fooling("sort", lambda m, x: x.sort(1).values, Frozen(STEM)),
    fooling("topk", lambda m, x: x.topk(5, 1).values, Has(8, STEM, (C,)), after=5),
    fooling("topk_smallest", lambda m, x: x.topk(5, 1, largest=False).values, Frozen(STEM), after=5),
    fooling("topk_positions", lambda m, x: x[:, x.mean((0, 2, 3)).topk(5).indices], Frozen(STEM), after=5),
    fooling(
        "topk_counted", lambda m, x: x * x.mean((2, 3)).topk(3).indices.float().histc(8, 0, 7).sum(), NotNeutral(STEM)
    ),
    fooling("constant_of_size", lambda m, x: x * x.new_full(x.shape[1:], 0.3), Has(8, STEM)),
    fooling("written_over", lambda m, x: x + torch.zeros_like(x).copy_(x.sigmoid()), Has(8, STEM)),
    fooling(
        "einsum",
        lambda m, x: torch.einsum("bchw,oc->bohw", x, m.mix),
        Has(8, (*STEM, "mix:1")),
        Has(7, ("mix:0", "last.weight:1")),
        after=7,
        parts=lambda: {"mix": nn.Parameter(torch.zeros(7, 8))},
    ),
    fooling(
        "einsum_entrywise",
        lambda m, x: torch.einsum("b...,...b->b...", x, x.sigmoid().movedim(0, -1)),
        Has(8, STEM),
    ),
    fooling(
        "einsum_inner",
        lambda m, x: x * torch.einsum("bchw,bchw->bhw", x, x.sigmoid())[:, None],
        Has(8, STEM),
        zeros="producers",
    ),
    fooling(
        "weight_norm",
        lambda m, x: m.normed(x),
        Frozen(STEM),
        Has(7, ("normed.parametrizations.weight.original1:0", "normed.bias:0", "last.weight:1")),
        after=7,
        parts=lambda: {"normed": nn.utils.parametrizations.weight_norm(conv(8, 7))},
    ),
    fooling("median", lambda m, x: x - x.median(1, keepdim=True).values, Frozen(STEM)),
    fooling("index", lambda m, x: x[:, [3, 1, 0, 2, 7, 5, 6, 4]], Frozen(STEM)),
    fooling("every_second", lambda m, x: x[:, ::2], NotNeutral(STEM, 8), after=4),
    fooling("pick_one", lambda m, x: x * x[:, 2:3], NotNeutral(STEM, 8)),
    fooling("pick_some", lambda m, x: x[:, 3:5].amax(1, keepdim=True) + x),
    fooling(
        "returned_slice",
        lambda m, x: x,
        NotNeutral(STEM, 8),
        wire_whole=lambda m, x: (m.head(m.last(h := m.norm(m.stem(x))).mean((2, 3))), h[:, 3:5]),
    ),
    fooling("overlap", lambda m, x: torch.cat([x[:, :6], x[:, 4:]], 1), NotNeutral(STEM, 8), after=10),
    fooling("differences", lambda m, x: x[:, 1:] - x[:, :-1], Frozen(STEM), after=7),
    fooling("padded", lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)), after=11),
    fooling("mean_over_channels", lambda m, x: x - x.mean(1, keepdim=True), NotNeutral(STEM)),
    fooling("mean_of_sigmoid", lambda m, x: x - x.sigmoid().mean(1, keepdim=True), NotNeutral(STEM), zeros="nowhere"),
    fooling("energy", lambda m, x: x * x.square().sum(1, keepdim=True), Has(8, STEM), zeros="producers"),
    fooling("variance", lambda m, x: x / (x.var(1, keepdim=True) + 1), NotNeutral(STEM)),
    fooling("maximum", lambda m, x: x - x.amax(1, keepdim=True), NotNeutral(STEM)),
    fooling("product_over_channels", lambda m, x: x + x.prod(1, keepdim=True), NotNeutral(STEM)),
    fooling("unit_length", lambda m, x: F.normalize(x, dim=1), zeros="producers"),
    fooling("response_norm", lambda m, x: F.local_response_norm(x, 3, alpha=1.0), Frozen(STEM)),
    fooling("size_constant", lambda m, x: x / x.shape[1] ** 0.5, NotNeutral(STEM)),
    fooling("count_zeros", lambda m, x: x * (x > 0).sum(1, keepdim=True), zeros="producers"),
    fooling("any_over_channels", lambda m, x: x * (x > 1).any(1, keepdim=True), zeros="producers"),
    fooling("argmax", lambda m, x: x * x.argmax(1, keepdim=True), Frozen(STEM)),
    fooling("fft", lambda m, x: torch.fft.fft(x, dim=1).real, Frozen(STEM), Noted("fft")),
    fooling(
        "standardised_weight",
        _standardised,
        NotNeutral(STEM),
        after=7,
        parts=lambda: {"mid": conv(8, 7)},
    ),
    fooling(
        "weight_norm",
        lambda m, x: m.mid(x).relu(),
        after=7,
        parts=lambda: {"mid": nn.utils.parametrizations.weight_norm(conv(8, 7))},
    ),
    fooling(
        "arange",
        lambda m, x: x + torch.arange(x.shape[1])[None, :, None, None],
        Frozen(STEM),
    ),
    fooling(
        "random_buffer",
        lambda m, x: x * torch.linspace(0, 1, x.shape[1])[None, :, None, None],
        Frozen(STEM),
    ),
    fooling("size_in_a_tensor", lambda m, x: x / torch.tensor(float(x.shape[1])).sqrt(), Frozen(STEM)),
    fooling("size_branch", _by_size, branches=True),
    wired(
        "mixed_reshape",
        lambda m, x: m.head(m.two(m.one(m.fc(x).view(-1, 4, 6)).relu().view(-1, 6, 4)).flatten(1)),
        lambda: {
            "fc": nn.Linear(5, 24),
            "one": nn.Linear(6, 6),
            "two": nn.Linear(4, 3),
            "head": nn.Linear(18, 2),
        },
        vectors(2, 5),
        Frozen(("one.weight:0", "two.weight:1")),
    ),
    wired(
        "softmax_classes",
        lambda m, x: m.out(m.mix(x).softmax(-1)),
        lambda: {"mix": nn.Linear(6, 9), "out": nn.Linear(9, 4)},
        vectors(3, 6),
        Has(9, ("mix.weight:0", "mix.bias:0", "out.weight:1"), (C,)),
    ),
    wired(
        "log_softmax",
        lambda m, x: m.out(m.mix(x).log_softmax(-1)),
        lambda: {"mix": nn.Linear(6, 9), "out": nn.Linear(9, 4)},
        vectors(3, 6),
        NotNeutral(("mix.weight:0",)),
    ),
    wired(
        "softmax_twice",
        lambda m, x: m.out((2 * m.mix(x).softmax(-1) + 1).softmax(-1)),
        lambda: {"mix": nn.Linear(6, 9), "out": nn.Linear(9, 4)},
        vectors(3, 6),
        NotNeutral(("mix.weight:0",)),
    ),
    wired(
        "dot_scaled",
        lambda m, x: (m.query(x) @ m.key(x).mT / m.query.out_features**0.5).softmax(-1) @ x,
        lambda: {"query": nn.Linear(10, 6), "key": nn.Linear(10, 6)},
        vectors(2, 5, 10),
        NotNeutral(("query.weight:0",)),
        zeros="producers",
    ),
    wired(
        "transposed_use",
        lambda m, x: F.linear(m.down(x).relu(), m.down.weight.mT),
        lambda: {"down": nn.Linear(9, 5)},
        vectors(3, 9),
        Has(5, ("down.weight:0", "down.bias:0")),
        Frozen(("down.weight:1",)),
    ),
    wired(
        "gram",
        lambda m, x: m.out((f := m.fc(x).relu()).mT @ f),
        lambda: {"fc": nn.Linear(6, 5), "out": nn.Linear(5, 3)},
        vectors(2, 4, 6),
        Frozen(("out.weight:0",)),
        zeros="producers",
    ),
    wired(
        "bilinear_self",
        lambda m, x: m.out((f := m.fc(x))[:, :, None].mul(f[:, None, :]).flatten(1)),
        lambda: {"fc": nn.Linear(6, 5), "out": nn.Linear(25, 3)},
        vectors(2, 6),
        zeros="producers",
    ),
)


# --- recurrent nets -------------------------------------------------------------------------------------------------


def _decode(m: Any, source: Tensor, target: Tensor) -> Tensor:
    _, (hidden, cells) = m.reader(m.words(source))
    hidden, cells, said = hidden[-1], cells[-1], []
    for word in target.unbind(1):
        hidden, cells = m.writer(m.words(word), (hidden, cells))
        said.append(m.head(hidden))
    return torch.stack(said, 1)


def _cells(m: Any, x: Tensor) -> Tensor:
    first, second = x.new_zeros(x.shape[1], m.hidden_dim), x.new_zeros(x.shape[1], 6)
    for step in x:
        first = m.first(step, first)
        second = m.second(first, second)
    return m.head(second)


def _begun(m: Any, x: Tensor) -> Tensor:
    start = m.start(x[:, 0]).tanh().unsqueeze(0)
    return m.head(m.rnn(x, (start, start * 0.5))[0])


def _pairs(vocabulary: int) -> Callable[[], tuple[tuple, dict]]:
    def example() -> tuple[tuple, dict]:
        (source,), _ = tokens(vocabulary, 3, 5)()
        return (source, source.flip(1)[:, :4]), {}

    return example


def _rows(cells: str, *parts: str, layer: str = "rnn") -> tuple[str, ...]:
    """Where the hidden units of one direction of one layer lie."""
    own = (f"{kind}_{part}_{cells}:0" for kind in ("weight", "bias") for part in ("ih", "hh"))
    return (*(f"{layer}.{place}" for place in own), f"{layer}.weight_hh_{cells}:1", *parts)


RECURRENT = (
    wired(
        "lstm_language",
        lambda m, x: m.head(m.rnn(m.words(x))[0]),
        lambda: {"words": nn.Embedding(23, 6), "rnn": nn.LSTM(6, 9, 2, batch_first=True), "head": nn.Linear(9, 23)},
        tokens(23, 3, 5),
        Widths((6, 9, 9)),
        Has(6, ("words.weight:1", "rnn.weight_ih_l0:1"), alone=True),
        Has(9, _rows("l0", "rnn.weight_ih_l1:1"), alone=True),
        Has(9, _rows("l1", "head.weight:1"), alone=True),
        SameCount(9, "rnn.weight_hh_l0:1", "rnn.weight_hh_l1:1"),
    ),
    wired(
        "gru_speech",
        lambda m, x: m.head(m.rnn(m.stem(x).relu().transpose(1, 2))[0]),
        lambda: {
            "stem": nn.Conv1d(5, 8, 3, padding=1),
            "rnn": nn.GRU(8, 7, 2, batch_first=True, bidirectional=True),
            "head": nn.Linear(14, 4),
        },
        vectors(2, 5, 6),
        Has(8, ("stem.weight:0", "rnn.weight_ih_l0:1", "rnn.weight_ih_l0_reverse:1")),
        *(Has(7, _rows(way, "rnn.weight_ih_l1:1", "rnn.weight_ih_l1_reverse:1")) for way in ("l0", "l0_reverse")),
        *(Has(7, _rows(way, "head.weight:1"), alone=True) for way in ("l1", "l1_reverse")),
        Widths((7, 7, 7, 7, 8)),
    ),
    wired(
        "seq2seq",
        _decode,
        lambda: {
            "words": nn.Embedding(19, 5),
            "reader": nn.LSTM(5, 8, 2, batch_first=True),
            "writer": nn.LSTMCell(5, 8),
            "head": nn.Linear(8, 19),
        },
        _pairs(19),
        Has(5, ("words.weight:1", "reader.weight_ih_l0:1", "writer.weight_ih:1")),
        Has(8, (*_rows("l1", layer="reader"), "writer.weight_ih:0", "writer.weight_hh:1", "head.weight:1")),
        Has(8, _rows("l0", "reader.weight_ih_l1:1", layer="reader"), alone=True),
    ),
    wired(
        "gru_handed_on",
        lambda m, x: m.head(m.writer(x, m.reader(x)[1])[0]),
        lambda: {"reader": nn.GRU(4, 7, 2), "writer": nn.GRU(4, 7, 2, bias=False), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Has(7, ("reader.weight_hh_l0:0", "writer.weight_hh_l0:0", "reader.weight_ih_l1:1", "writer.weight_ih_l1:1")),
        Has(7, ("reader.weight_hh_l1:0", "writer.weight_hh_l1:0", "head.weight:1")),
        Widths((7, 7)),
    ),
    wired(
        "last_states",
        lambda m, x: m.head(torch.cat([m.rnn(x)[1][0][-2], m.rnn(x)[1][0][-1]], 1)),
        lambda: {"rnn": nn.LSTM(4, 6, 2, bidirectional=True, dropout=0.3), "head": nn.Linear(12, 3)},
        vectors(5, 2, 4),
        *(Has(6, _rows(way, "head.weight:1"), alone=True) for way in ("l1", "l1_reverse")),
        Widths((6, 6, 6, 6)),
    ),
    wired(
        "all_states",
        lambda m, x: m.head(m.rnn(x)[1].transpose(0, 1).flatten(1)),
        lambda: {"rnn": nn.RNN(4, 6, 3, nonlinearity="relu"), "head": nn.Linear(18, 3)},
        vectors(5, 2, 4),
        Has(6, (*_rows("l0", "rnn.weight_ih_l1:1"), *_rows("l1", "rnn.weight_ih_l2:1"), *_rows("l2", "head.weight:1"))),
        Widths((6,)),
    ),
    wired(
        "lstm_projected",
        lambda m, x: m.head(m.rnn(x)[0]),
        lambda: {"rnn": nn.LSTM(4, 7, 2, proj_size=5, bidirectional=True), "head": nn.Linear(10, 3)},
        vectors(5, 2, 4),
        Has(7, ("rnn.weight_ih_l0:0", "rnn.weight_hh_l0:0", "rnn.bias_hh_l0:0", "rnn.weight_hr_l0:1")),
        Has(5, ("rnn.weight_hr_l1:0", "rnn.weight_hh_l1:1", "head.weight:1"), alone=True),
        branches=True,
    ),
    wired(
        "recurrent_cells",
        _cells,
        lambda: {
            "first": nn.GRUCell(4, 7),
            "second": nn.RNNCell(7, 6, bias=False),
            "hidden_dim": 7,
            "head": nn.Linear(6, 3),
        },
        vectors(4, 2, 4),
        Has(7, ("first.weight_ih:0", "first.weight_hh:1", "second.weight_ih:1")),
        Frozen(("second.weight_hh:1",)),
        Widths((7,)),
    ),
    wired(
        "unbatched_rnn",
        lambda m, x: m.head(m.rnn(x)[0]),
        lambda: {"rnn": nn.RNN(4, 6), "head": nn.Linear(6, 3)},
        vectors(5, 4),
        Has(6, _rows("l0", "head.weight:1"), alone=True),
    ),
    wired(
        "states_from_a_layer",
        _begun,
        lambda: {"start": nn.Linear(4, 7), "rnn": nn.LSTM(4, 7, batch_first=True), "head": nn.Linear(7, 3)},
        vectors(3, 5, 4),
        Has(7, ("start.weight:0", "start.bias:0", *_rows("l0", "head.weight:1")), alone=True),
    ),
    wired(
        "learned_states",
        lambda m, x: m.head(m.rnn(x, m.start.expand(-1, x.shape[1], -1))[0]),
        lambda: {"start": nn.Parameter(torch.zeros(2, 1, 7)), "rnn": nn.GRU(4, 7, 2), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Has(7, ("start:2", *_rows("l0"), *_rows("l1", "head.weight:1"))),
    ),
    wired(
        "given_states",
        lambda m, x, state: m.head(m.rnn(x, state)[0]),
        lambda: {"rnn": nn.GRU(4, 7), "head": nn.Linear(7, 3)},
        lambda: ((torch.ones(5, 2, 4), torch.ones(1, 2, 7)), {}),
        Frozen(("rnn.weight_hh_l0:0", "rnn.weight_hh_l0:1", "head.weight:1")),
    ),
    wired(
        "returned_states",
        lambda m, x: (m.head(m.rnn(x)[0]), m.rnn(x)[1][1]),
        lambda: {"rnn": nn.LSTM(4, 7, 2), "head": nn.Linear(7, 3)},
        vectors(5, 2, 4),
        Frozen(("rnn.weight_hh_l0:0", "rnn.weight_hh_l1:0", "head.weight:1")),
    ),
    wired(
        "units_along_time",
        lambda m, x: m.head(m.rnn(m.stem(x).permute(2, 0, 1))[1][0][-1]) + m.other(m.stem(x)).sum(1),
        lambda: {"stem": nn.Linear(4, 6), "rnn": nn.LSTM(5, 7), "head": nn.Linear(7, 3), "other": nn.Linear(6, 3)},
        vectors(2, 5, 4),
        Frozen(("stem.weight:0",)),
        Has(7, _rows("l0", "head.weight:1"), alone=True),
    ),
)


# --- language models ------------------------------------------------------------------------------------------------

VOCABULARY = 53
SMALL = {
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {
    "hidden_size": 36,
    "intermediate_size": 56,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}


MIXER = "backbone.layers.0.mixer"


def language(name: str, family: str, settings: dict[str, Any], *expect: Fact, attention: str = "sdpa") -> Net:
    """A small causal language model of transformers, built from its configuration."""

    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**SMALL | settings, attn_implementation=attention)
        kind = family.removesuffix("Text")
        model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config)
        return randomised(model)

    return Net(name, build, tokens(VOCABULARY, 2, 7, name="input_ids"), expect)


def rotary(
    kv: int = 3,
    rep: int = 2,
    head: int = 8,
    width: int = 36,
    neurons: int = 56,
    bias: bool = False,
    shared: bool = True,
) -> tuple:
    """What a decoder with rotary positions, grouped queries, a gated MLP and RMSNorm must have.

    ``shared``: whether all layers rotate by the same frequencies, and so share their rotary pairs.
    """

    def per_layer(i: int) -> Iterable[Fact]:
        layer = f"model.layers.{i}."
        q, k, v, o = (f"{layer}self_attn.{part}_proj.weight:{int(part == 'o')}" for part in "qkvo")
        biases = tuple(f"{layer}self_attn.{part}_proj.bias:0" for part in "qkv") if bias else ()
        mlp = tuple(f"{layer}mlp.{part}_proj.weight:{int(part == 'down')}" for part in ("gate", "up", "down"))
        yield Has(neurons, mlp, alone=True)
        if kv > 1:
            yield Has(kv, (q, k, v, o, *biases), alone=True)
        if rep > 1:
            yield Has(rep, (q, o)) if rep > 2 else Hoped(Has(rep, (q, o)))
        yield Has(head, (v, o))
        if not shared:
            yield Has(head // 2, (q, k), (N, F_))

    pairs = tuple(f"model.layers.{i}.self_attn.{part}_proj.weight:0" for i in (0, 1) for part in "qk")
    widths = (neurons,) * 2 + (kv if kv > 1 else rep,) * 2
    return (
        *(fact for i in (0, 1) for fact in per_layer(i)),
        Widths(widths),
        *((Has(head // 2, pairs, (N, F_)),) if shared else ()),
        Has(
            width,
            (
                "model.embed_tokens.weight:1",
                "model.norm.weight:0",
                *(
                    f"model.layers.{i}.{place}"
                    for i in (0, 1)
                    for place in (
                        "input_layernorm.weight:0",
                        "self_attn.q_proj.weight:1",
                        "self_attn.o_proj.weight:0",
                        "mlp.up_proj.weight:1",
                        "mlp.down_proj.weight:0",
                    )
                ),
            ),
            (F_,),
        ),
        Frozen(("model.embed_tokens.weight:0",)),
    )


def per_layer(prefix: str, *facts: tuple[int, tuple[str, ...]]) -> tuple[Fact, ...]:
    """Neutral axes that each of two layers must have, and no other."""
    return tuple(
        Has(size, tuple(f"{prefix}.{i}.{place}" for place in places), alone=True)
        for i in (0, 1)
        for size, places in facts
    )


GEMMA = {"hidden_size": 36, "intermediate_size": 56, "head_dim": 8, "query_pre_attn_scalar": 11, "sliding_window": 4}
GEMMA["layer_types"] = ["sliding_attention", "full_attention"]
LANGUAGE = (
    language(
        "llama", "Llama", GROUPED | {"tie_word_embeddings": False}, *rotary(), Has(36, ("lm_head.weight:1",), (F_,))
    ),
    language(
        "llama_tied",
        "Llama",
        GROUPED | {"tie_word_embeddings": True, "attention_bias": True},
        *rotary(bias=True),
        Tied("model.embed_tokens.weight", "lm_head.weight"),
    ),
    language("llama_eager", "Llama", GROUPED, *rotary(), attention="eager"),
    language(
        "llama_single",
        "Llama",
        GROUPED | {"num_attention_heads": 3, "num_key_value_heads": 3},
        *rotary(rep=1),
    ),
    language("qwen2", "Qwen2", GROUPED | {"head_dim": 8}, *rotary(bias=True)),
    language("qwen3", "Qwen3", GROUPED, *rotary()),
    language("mistral", "Mistral", GROUPED | {"sliding_window": 4}, *rotary()),
    language(
        "gemma3",
        "Gemma3Text",
        GEMMA | {"num_attention_heads": 6, "num_key_value_heads": 2},
        *rotary(kv=2, rep=3, shared=False),
        Tied("model.embed_tokens.weight", "lm_head.weight"),
    ),
    language(
        "phi3",
        "Phi3",
        GROUPED,
        Has(3, tuple(f"model.layers.0.self_attn.{place}" for place in ("qkv_proj.weight:0", "o_proj.weight:1"))),
        Has(8, tuple(f"model.layers.0.self_attn.{place}" for place in ("qkv_proj.weight:0", "o_proj.weight:1"))),
        Has(56, ("model.layers.0.mlp.gate_up_proj.weight:0", "model.layers.0.mlp.down_proj.weight:1")),
    ),
    language(
        "mamba",
        "Mamba",
        {"hidden_size": 24, "state_size": 6, "time_step_rank": 5},
        Has(48, tuple(f"{MIXER}.{place}" for place in ("A_log:0", "D:0", "conv1d.weight:0", "out_proj.weight:1"))),
        Has(6, (f"{MIXER}.A_log:1", f"{MIXER}.x_proj.weight:0")),
        Has(5, (f"{MIXER}.x_proj.weight:0", f"{MIXER}.dt_proj.weight:1")),
        attention="eager",
    ),
    language(
        "gemma3_single_kv",
        "Gemma3Text",
        GEMMA | {"num_attention_heads": 3, "num_key_value_heads": 1},
        *rotary(kv=1, rep=3, shared=False),
    ),
    language(
        "gpt2",
        "GPT2",
        {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 16, "n_inner": 34},
        *per_layer(
            "transformer.h",
            (34, ("mlp.c_fc.weight:1", "mlp.c_fc.bias:0", "mlp.c_proj.weight:0")),
            (3, ("attn.c_attn.weight:1", "attn.c_attn.bias:0", "attn.c_proj.weight:0")),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("transformer.wte.weight:1", "transformer.ln_f.weight:0")),
        Frozen(("transformer.wte.weight:0", "transformer.wpe.weight:0")),
        Tied("transformer.wte.weight", "lm_head.weight"),
    ),
    language(
        "gpt_neox",
        "GPTNeoX",
        {"hidden_size": 24, "intermediate_size": 34, "num_attention_heads": 3, "rotary_pct": 0.5},
        *per_layer(
            "gpt_neox.layers",
            (34, ("mlp.dense_h_to_4h.weight:0", "mlp.dense_h_to_4h.bias:0", "mlp.dense_4h_to_h.weight:1")),
            (
                3,
                (
                    "attention.query_key_value.weight:0",
                    "attention.query_key_value.bias:0",
                    "attention.dense.weight:1",
                ),
            ),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("gpt_neox.embed_in.weight:1",)),
    ),
    language(
        "opt",
        "OPT",
        {"hidden_size": 24, "ffn_dim": 34, "num_attention_heads": 3, "word_embed_proj_dim": 24},
        *per_layer(
            "model.decoder.layers",
            (34, ("fc1.weight:0", "fc1.bias:0", "fc2.weight:1")),
            (
                3,
                (
                    *(f"self_attn.{part}_proj.{kind}:0" for part in "qkv" for kind in ("weight", "bias")),
                    "self_attn.out_proj.weight:1",
                ),
            ),
        ),
        Widths((34, 34, 3, 3)),
        NotNeutral(("model.decoder.embed_tokens.weight:1",)),
        Frozen(("model.decoder.embed_positions.weight:0",)),
    ),
)


# --- vision ---------------------------------------------------------------------------------------------------------


def vision(name: str, make: Callable[[Any], nn.Module], size: int, *expect: Fact, heavy: bool = True) -> Net:
    """A network of torchvision with random weights."""

    def build() -> nn.Module:
        import torchvision

        torch.manual_seed(0)
        return randomised(make(torchvision.models))

    return Net(name, build, images(3, size), expect, heavy=heavy)


def _convnext(models: Any) -> nn.Module:
    settings = models.convnext.CNBlockConfig
    return models.ConvNeXt([settings(12, 18, 1), settings(18, 26, 2), settings(26, None, 1)], num_classes=7)


def _vit(models: Any) -> nn.Module:
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=34, num_classes=7
    )


MOBILE = (32, 96, 144, 144, *(192,) * 3, *(384,) * 4, *(576,) * 3, *(960,) * 3, 16, 24, 32, 64, 96, 160, 320, 1280)
VISION = (
    vision(
        "resnet18",
        lambda models: models.resnet18(num_classes=7),
        64,
        Widths(tuple(width for width in (64, 128, 256, 512) for _ in range(3))),
        Has(64, ("layer1.0.conv1.weight:0", "layer1.0.bn1.running_var:0", "layer1.0.conv2.weight:1")),
        Has(128, ("layer2.0.downsample.0.weight:0", "layer2.1.conv2.weight:0", "layer3.0.downsample.0.weight:1")),
    ),
    vision(
        "mobilenet_v2",
        lambda models: models.mobilenet_v2(num_classes=7),
        64,
        Widths(MOBILE),
        Has(32, ("features.0.0.weight:0", "features.1.conv.0.0.weight:0", "features.1.conv.1.weight:1")),
    ),
    vision(
        "densenet121",
        lambda models: models.densenet121(num_classes=7),
        64,
        Widths((64, 128, 256, 512, *(128,) * 58, *(32,) * 58)),
        Has(
            32,
            ("features.denseblock1.denselayer1.conv2.weight:0", "features.denseblock1.denselayer3.conv1.weight:1"),
        ),
    ),
    vision(
        "efficientnet_b0",
        lambda models: models.efficientnet_b0(num_classes=7),
        64,
        Has(
            32,
            ("features.0.0.weight:0", "features.1.0.block.1.fc1.weight:1", "features.1.0.block.1.fc2.weight:0"),
        ),
        Has(8, ("features.1.0.block.1.fc1.weight:0", "features.1.0.block.1.fc2.weight:1"), alone=False),
    ),
    vision(
        "convnext",
        _convnext,
        32,
        Widths((48, 72, 72, 104)),
        Has(48, ("features.1.0.block.3.weight:0", "features.1.0.block.5.weight:1")),
        NotNeutral(("features.0.0.weight:0", "features.1.0.layer_scale:0")),
        heavy=False,
    ),
    vision(
        "shufflenet",
        lambda models: models.shufflenet_v2_x0_5(num_classes=7),
        64,
        *(
            Has(size, (f"{unit}.branch2.0.weight:0", f"{unit}.branch2.3.weight:0", f"{unit}.branch2.5.weight:1"))
            for unit, size in (("stage2.0", 24), ("stage2.1", 24), ("stage3.0", 48), ("stage4.3", 96))
        ),
        Has(1024, ("conv5.0.weight:0", "fc.weight:1")),
    ),
    vision(
        "googlenet",
        lambda models: models.googlenet(num_classes=7, init_weights=False, aux_logits=True),
        64,
        Has(96, ("inception3a.branch2.0.conv.weight:0", "inception3a.branch2.1.conv.weight:1")),
        Has(
            128,
            (
                "inception3a.branch2.1.conv.weight:0",
                *(
                    f"inception3b.branch{i}{p}:1"
                    for i, p in (
                        (1, ".conv.weight"),
                        (2, ".0.conv.weight"),
                        (3, ".0.conv.weight"),
                        (4, ".1.conv.weight"),
                    )
                ),
            ),
        ),
        Has(192, ("inception4a.branch1.conv.weight:0", "aux1.conv.conv.weight:1")),
    ),
    vision(
        "vit",
        _vit,
        32,
        *per_layer(
            "encoder.layers.encoder_layer",
        ),
        *(
            Has(
                34, tuple(f"encoder.layers.encoder_layer_{i}.mlp.{p}" for p in ("0.weight:0", "0.bias:0", "3.weight:1"))
            )
            for i in (0, 1)
        ),
        NotNeutral(("conv_proj.weight:0", "class_token:2", "encoder.ln.weight:0")),
        heavy=False,
    ),
)

ZOO: dict[str, Net] = {net.name: net for net in (*PLAIN, *FOOLING, *RECURRENT, *LANGUAGE, *VISION)}
