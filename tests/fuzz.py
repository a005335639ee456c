"""Random small networks from a seed: a program of operations on vectors, token sequences and pictures.

Sums and products *of activations* are left out (attention aside), so that for every neutral axis a zero in the weights
that read it is exactly what masking means; the zoo holds nets with such sums.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import Wired, randomise

CHANNEL = {2: 1, 3: 2, 4: 1}
"""Number of dimensions → where the channels are."""

WEIGHTS = {
    "layer": 5,
    "activation": 3,
    "norm": 3,
    "residual": 2,
    "join": 3,
    "concat": 2,
    "split": 1,
    "gated_linear": 1,
    "attention": 2,
    "fused": 1,
    "cross": 1,
    "experts": 1,
    "factored": 1,
    "grouped": 2,
    "gate": 2,
    "odd": 2,
    "shuffle": 1,
    "reform": 2,
    "recurrent": 2,
}
"""How often each operation is tried."""

Made = tuple[nn.Module, tuple[int, ...]] | None
"""A new step and the values it reads; ``None`` where the operation does not fit."""


class Program(nn.Module):
    """Steps one after the other; each reads earlier values and adds one or more."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        self.reads: list[tuple[int, ...]] = []
        self.kinds: list[str] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All values that no step reads."""
        values = list(inputs)
        for step, reads in zip(self.steps, self.reads, strict=True):
            made = step(*(values[i] for i in reads))
            values.extend(made if isinstance(made, tuple) else (made,))
        read = {i for reads in self.reads for i in reads}
        return tuple(value for i, value in enumerate(values) if i not in read)


class Generator:
    """Grows a program step by step and runs it as it grows, so that it always knows the shapes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.program = Program()
        torch.manual_seed(seed)
        batch = self.random.choice((1, 2, 3))
        shapes = ((batch, 5), (batch, 4, 6), (batch, 4, 6), (batch, 3, 4, 6), (batch, 3, 4, 6))
        self.values: list[Tensor] = [torch.randn(self.random.choice(shapes))]

    # What to build on ----------------------------------------------------------------------------------------------

    def pick(self, *dims: int) -> int | None:
        """A value with so many dimensions, the latest most likely."""
        fitting = [i for i, value in enumerate(self.values) if value.dim() in dims]
        return self.random.choice((*fitting, *fitting[-2:], fitting[-1])) if fitting else None

    def width(self) -> int:
        """A number of channels."""
        return self.random.randint(3, 9)

    def channels(self, index: int) -> int:
        """How many channels a value has."""
        return self.values[index].shape[CHANNEL[self.values[index].dim()]]

    def add(self, kind: str, made: Made) -> bool:
        """Add a step and run it; a step that does not fit is left out."""
        if made is None:
            return False
        step, reads = made
        step = randomise(step, self.random.randrange(1 << 30))
        with torch.no_grad():
            new = step(*(self.values[i] for i in reads))
        new = new if isinstance(new, tuple) else (new,)
        assert all(value.isfinite().all() for value in new)
        self.program.steps.append(step)
        self.program.reads.append(reads)
        self.program.kinds.append(kind)
        self.values.extend(new)
        return True

    def dense(self, index: int, outputs: int, bias: bool = True) -> nn.Module:
        """A layer from a value's channels to others, where it is."""
        inputs = self.channels(index)
        if self.values[index].dim() == 4:
            return nn.Conv2d(inputs, outputs, self.random.choice((1, 3)), padding="same", bias=bias)
        return nn.Linear(inputs, outputs, bias=bias)

    # Operations ----------------------------------------------------------------------------------------------------

    def layer(self) -> Made:
        """Linear or convolution."""
        index = self.pick(2, 3, 4)
        return self.dense(index, self.width(), self.random.random() < 0.7), (index,)

    def activation(self) -> Made:
        """A function of each number, often one that makes something of nothing."""
        act = self.random.choice((torch.relu, torch.sigmoid, torch.tanh, F.gelu, F.silu, torch.cos))
        return Wired(lambda m, x: act(x)), (self.pick(2, 3, 4),)

    def norm(self) -> Made:
        """A norm that fits."""
        index = self.pick(2, 3, 4)
        n = self.channels(index)
        match self.values[index].dim():
            case 2:
                kinds: tuple[Callable[[], nn.Module], ...] = (lambda: nn.BatchNorm1d(n), lambda: nn.LayerNorm(n))
            case 3:
                kinds = (lambda: nn.LayerNorm(n), *2 * (lambda: nn.RMSNorm(n, eps=0.01),))
            case _:
                groups = self.random.choice([g for g in range(1, n + 1) if n % g == 0])
                kinds = (
                    lambda: nn.BatchNorm2d(n),
                    lambda: nn.BatchNorm2d(n),
                    lambda: nn.GroupNorm(groups, n),
                    lambda: nn.InstanceNorm2d(n, affine=True),
                )
        return self.random.choice(kinds)(), (index,)

    def residual(self) -> Made:
        """A value plus a small net of it."""
        index = self.pick(2, 3, 4)
        hidden, n = self.width(), self.channels(index)
        inner = self.dense(index, hidden)
        outer = nn.Conv2d(hidden, n, 1) if self.values[index].dim() == 4 else nn.Linear(hidden, n)
        return Wired(lambda m, x: x + m.outer(m.inner(x).sigmoid()), inner=inner, outer=outer), (index,)

    def join(self) -> Made:
        """Two values added or multiplied, after a projection where their channels differ."""
        one = self.pick(2, 3, 4)
        alike = [
            i
            for i, value in enumerate(self.values)
            if i != one and _without_channels(value) == _without_channels(self.values[one])
        ]
        if not alike:
            return None
        other = self.random.choice(alike)
        times = self.random.random() < 0.3
        if self.channels(one) == self.channels(other):
            return Wired(lambda m, x, y: x * y if times else x + y), (one, other)
        fit = self.dense(other, self.channels(one))
        return Wired(lambda m, x, y: x * m.fit(y) if times else x + m.fit(y), fit=fit), (one, other)

    def concat(self) -> Made:
        """Two or three values side by side; the same one twice, now and then."""
        one = self.pick(2, 3, 4)
        alike = [i for i, v in enumerate(self.values) if _without_channels(v) == _without_channels(self.values[one])]
        reads = (one, *self.random.choices(alike, k=self.random.choice((1, 1, 2))))
        dim = CHANNEL[self.values[one].dim()]
        return Wired(lambda m, *x: torch.cat(x, dim)), reads

    def split(self) -> Made:
        """Channels cut in two: where a number says, in the middle by the size, or by chunk."""
        index = self.pick(2, 3, 4)
        n, dim = self.channels(index), CHANNEL[self.values[index].dim()]
        at = self.random.randint(1, n - 1) if n > 1 else 0
        how = self.random.choice(("at", "half", "chunk"))
        if n < 3 or (how != "at" and n % 2):
            return None

        def wire(m: Any, x: Tensor) -> tuple[Tensor, ...]:
            if how == "chunk":
                return tuple(x.chunk(2, dim))
            where = x.shape[dim] // 2 if how == "half" else at
            return x.narrow(dim, 0, where), x.narrow(dim, where, x.shape[dim] - where)

        return Wired(wire), (index,)

    def gated_linear(self) -> Made:
        """One layer, two halves, one the gate of the other."""
        index = self.pick(2, 3, 4)
        dim = CHANNEL[self.values[index].dim()]
        first = self.dense(index, 2 * self.width())
        return Wired(lambda m, x: F.glu(m.first(x), dim), first=first), (index,)

    def attention(self) -> Made:
        """Grouped queries; sizes of queries and values differ; scaled by the default, by a constant, or not."""
        index = self.pick(3)
        if index is None:
            return None
        n = self.channels(index)
        kv, rep, head, value = (self.random.choice(c) for c in ((1, 2, 3), (1, 2, 3), (2, 4, 5), (3, 4)))
        scale, manual = self.random.choice((None, 0.3, 1.0)), self.random.random() < 0.4

        def wire(m: Any, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            q = m.q(x).view(batch, length, -1, head).transpose(1, 2)
            k = m.k(x).view(batch, length, -1, head).transpose(1, 2).repeat_interleave(rep, 1)
            v = m.v(x).view(batch, length, -1, value).transpose(1, 2).repeat_interleave(rep, 1)
            if manual:
                mixed = (q @ k.transpose(2, 3) * (scale or head**-0.5)).softmax(-1) @ v
            else:
                mixed = F.scaled_dot_product_attention(q, k, v, scale=scale)
            return m.o(mixed.transpose(1, 2).reshape(batch, length, -1))

        parts = {
            "q": nn.Linear(n, kv * rep * head),
            "k": nn.Linear(n, kv * head),
            "v": nn.Linear(n, kv * value),
            "o": nn.Linear(kv * rep * value, self.width()),
        }
        return Wired(wire, **parts), (index,)

    def recurrent(self) -> Made:
        """A recurrent layer over the tokens: all its outputs, or the last state of its last layer and direction."""
        index = self.pick(3)
        if index is None:
            return None
        kind, many, both = (self.random.choice(c) for c in ((nn.LSTM, nn.GRU, nn.RNN), (1, 2), (False, True)))
        layer = kind(self.channels(index), self.width(), many, batch_first=True, bidirectional=both)

        def last(m: Any, x: Tensor) -> Tensor:
            state = m.layer(x)[1]
            return (state[0] if isinstance(state, tuple) else state)[-1]

        wire = last if self.random.random() < 0.3 else lambda m, x: m.layer(x)[0]
        return Wired(wire, layer=layer), (index,)

    def fused(self) -> Made:
        """Attention whose queries, keys and values come from one layer; turned by their places, or not."""
        index = self.pick(3)
        if index is None:
            return None
        heads, head = self.random.choice((1, 2, 3)), self.random.choice((2, 4, 6))
        how, turned = self.random.choice(("chunk", "slice", "outer", "inner")), self.random.random() < 0.5
        causal = self.random.random() < 0.5

        def turn(x: Tensor, by: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return x * by.cos() + torch.cat([-two, one], -1) * by.sin()

        def wire(m: Any, x: Tensor) -> Tensor:
            batch, length, _ = x.shape
            y = m.qkv(x)
            if how in ("chunk", "slice"):
                n = heads * head
                parts = y.chunk(3, -1) if how == "chunk" else (y[..., :n], y[..., n : 2 * n], y[..., 2 * n :])
                q, k, v = (part.view(batch, length, -1, head).transpose(1, 2) for part in parts)
            else:
                table = y.view(batch, length, 3, -1, head) if how == "outer" else y.view(batch, length, -1, 3, head)
                q, k, v = (part.transpose(1, 2) for part in table.unbind(2 if how == "outer" else 3))
            if turned:
                angles = torch.outer(torch.arange(length, dtype=x.dtype), m.frequencies)
                q, k = (turn(part, torch.cat([angles, angles], -1)) for part in (q, k))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
            return m.o(mixed.transpose(1, 2).flatten(2))

        parts: dict[str, Any] = {
            "qkv": nn.Linear(self.channels(index), 3 * heads * head, bias=self.random.random() < 0.5),
            "o": nn.Linear(heads * head, self.width()),
        }
        if turned:
            parts["frequencies"] = nn.Parameter(torch.zeros(head // 2))
        return Wired(wire, **parts), (index,)

    def cross(self) -> Made:
        """One sequence asks another, of another length perhaps; the answer is added to it, or replaces it."""
        index = self.pick(3)
        if index is None:
            return None
        alike = [i for i, v in enumerate(self.values) if v.dim() == 3 and len(v) == len(self.values[index])]
        other, n = self.random.choice(alike), self.channels(index)
        heads, head, added = self.random.choice((1, 2, 3)), self.random.choice((2, 3)), self.random.random() < 0.5

        def wire(m: Any, x: Tensor, y: Tensor) -> Tensor:
            split = lambda part: part.unflatten(-1, (-1, head)).transpose(1, 2)  # noqa: E731
            mixed = F.scaled_dot_product_attention(split(m.q(x)), split(m.k(y)), split(m.v(y)))
            out = m.o(mixed.transpose(1, 2).flatten(2))
            return x + out if added else out

        width = heads * head
        parts = {"q": nn.Linear(n, width), "o": nn.Linear(width, n)}
        parts |= {name: nn.Linear(self.channels(other), width) for name in "kv"}
        return Wired(wire, **parts), (index, other)

    def experts(self) -> Made:
        """Several nets side by side in one tensor, mixed by a softmax over them, or by its largest two."""
        index = self.pick(2, 3)
        if index is None:
            return None
        n, hidden, experts, out = self.channels(index), self.width(), self.random.randint(2, 5), self.width()
        chosen = self.random.random() < 0.5

        def wire(m: Any, x: Tensor) -> Tensor:
            share = m.router(x).softmax(-1)
            if chosen:
                share = share * (share >= share.topk(2, -1).values[..., -1:])
            each = torch.einsum("...n,enh->...eh", x, m.up).relu()
            return (torch.einsum("...eh,eho->...eo", each, m.down) * share[..., None]).sum(-2)

        return Wired(
            wire,
            router=nn.Linear(n, experts),
            up=nn.Parameter(torch.zeros(experts, n, hidden)),
            down=nn.Parameter(torch.zeros(experts, hidden, out)),
        ), (index,)

    def factored(self) -> Made:
        """Channels seen as a table, mixed along one side of it, and flattened again; or seen as another table."""
        index = self.pick(2, 3)
        if index is None:
            return None
        rows, columns, new = self.random.randint(2, 4), self.random.randint(2, 4), self.random.randint(2, 4)
        left, sizes = self.random.random() < 0.5, self.random.random() < 0.5

        def wire(m: Any, x: Tensor) -> Tensor:
            x = m.first(x)
            table = x.unflatten(-1, (-1, columns) if sizes else (rows, columns))
            table = m.mix(table.transpose(-1, -2)).transpose(-1, -2) if left else m.mix(table)
            return table.flatten(-2)

        mix = nn.Linear(rows if left else columns, new)
        return Wired(wire, first=self.dense(index, rows * columns), mix=mix), (index,)

    def grouped(self) -> Made:
        """A grouped or depthwise convolution."""
        index = self.pick(4)
        if index is None:
            return None
        n = self.channels(index)
        groups = self.random.choice([g for g in range(1, n + 1) if n % g == 0])
        return nn.Conv2d(n, groups * self.random.choice((1, 1, 2)), 3, padding=1, groups=groups), (index,)

    def gate(self) -> Made:
        """A picture's channels weighed by a small net: squeeze–excite, ECA, a softmax, CBAM."""
        index = self.pick(4)
        if index is None:
            return None
        n, hidden = self.channels(index), self.width()
        match self.random.choice(("excite", "excite", "eca", "softmax", "softmax", "cbam")):
            case "excite":
                return Wired(
                    lambda m, x: x * m.up(m.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None],
                    down=nn.Linear(n, hidden),
                    up=nn.Linear(hidden, n),
                ), (index,)
            case "eca":
                return Wired(
                    lambda m, x: x * m.along(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None],
                    along=nn.Conv1d(1, 1, 3, padding=1),
                ), (index,)
            case "softmax":
                return Wired(
                    lambda m, x: x * m.gate(x.mean((2, 3))).softmax(1)[:, :, None, None], gate=nn.Linear(n, n)
                ), (index,)
            case _:
                return Wired(
                    lambda m, x: x * m.look(torch.cat([x.mean(1, True), x.amax(1, True)], 1)).sigmoid(),
                    look=nn.Conv2d(2, 1, 3, padding=1),
                ), (index,)

    def odd(self) -> Made:
        """Something that depends on the order or the number of channels."""
        index = self.pick(2, 3, 4)
        dim, n = CHANNEL[self.values[index].dim()], self.channels(index)
        wires: tuple[Callable[[Any, Tensor], Tensor], ...] = (
            lambda m, x: x.cumsum(dim),
            lambda m, x: x.flip(dim),
            lambda m, x: x.roll(1, dim),
            lambda m, x: x.sort(dim).values,
            lambda m, x: x - x.mean(dim, keepdim=True),
            lambda m, x: x.softmax(dim),
            lambda m, x: x / x.shape[dim] ** 0.5,
            lambda m, x: x * torch.tensor(float(x.shape[dim])).log(),
            lambda m, x: x - x.amax(dim, keepdim=True),
            lambda m, x: x.index_select(dim, torch.arange(n - 1, -1, -1)),
            lambda m, x: x.narrow(dim, 1, n - 1) if n > 2 else x,
            lambda m, x: x * x.narrow(dim, n // 2, 1),
            lambda m, x: torch.cat([x, torch.ones_like(x.narrow(dim, 0, 1))], dim),
        )
        wire = self.random.choice(wires)
        return Wired(wire), (index,)

    def shuffle(self) -> Made:
        """Channels shuffled between groups, or folded into the picture."""
        index = self.pick(4)
        if index is None:
            return None
        n = self.channels(index)
        if n % 4 == 0 and self.random.random() < 0.4:
            return Wired(lambda m, x: F.pixel_shuffle(x, 2)), (index,)
        groups = self.random.choice([g for g in range(1, n + 1) if n % g == 0])
        return Wired(lambda m, x: x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)), (
            index,
        )

    def reform(self) -> Made:
        """A picture becomes a sequence or a vector, a sequence becomes a vector or is mixed along its length."""
        index = self.pick(3, 4)
        if index is None:
            return None
        value = self.values[index]
        if value.dim() == 4:
            wires: tuple[Callable[[Any, Tensor], Tensor], ...] = (
                lambda m, x: x.flatten(2).transpose(1, 2),
                lambda m, x: x.flatten(1),
                lambda m, x: x.mean((2, 3)),
                lambda m, x: F.max_pool2d(x, 2, ceil_mode=True),
                lambda m, x: x.mean(3).transpose(1, 2),
            )
            return Wired(self.random.choice(wires)), (index,)
        if self.random.random() < 0.3:
            mix = nn.Linear(value.shape[1], self.random.randint(2, 5))
            return Wired(lambda m, x: m.mix(x.transpose(1, 2)).transpose(1, 2), mix=mix), (index,)
        wires = (lambda m, x: x.mean(1), lambda m, x: x.flatten(1), lambda m, x: x[:, -1], lambda m, x: x.amax(1))
        return Wired(self.random.choice(wires)), (index,)

    # The whole -----------------------------------------------------------------------------------------------------

    def grow(self) -> Program:
        """A layer, random steps, and a layer on every value that nothing reads."""
        self.add("layer", self.layer())
        wanted = self.random.randint(3, 7)
        while len(self.program.steps) < wanted:
            name = self.random.choices(tuple(WEIGHTS), tuple(WEIGHTS.values()))[0]
            self.add(name, getattr(self, name)())
        read = {i for reads in self.program.reads for i in reads}
        for index in range(1, len(self.values)):
            if index not in read:
                self.add("layer", (self.dense(index, 3), (index,)))
        return self.program.eval()


def _without_channels(value: Tensor) -> tuple[int, ...]:
    shape = list(value.shape)
    shape.pop(CHANNEL[value.dim()])
    return (value.dim(), *shape)


def network(seed: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network of a seed and an example for it."""
    generator = Generator(seed)
    example = (generator.values[0],)
    return generator.grow(), example
