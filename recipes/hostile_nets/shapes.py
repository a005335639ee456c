"""Convolutions, sequences and networks whose structure is out of the ordinary."""

import types
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile_nets.build import DOWN, UP, Built, Net, middle, perceptron, vectors, width
from hostile_nets.masking import layer_norm, read

# --- pictures --------------------------------------------------------------------------------------------------------


def picture() -> Tensor:
    """Three channels; height and width differ."""
    return torch.randn(2, 3, 6, 4)


def between_convolutions(random: Random) -> Built:
    """Something between two convolutions."""
    n = 4 * random.randint(2, 3)
    act, out = random.choice(
        (
            (nn.Conv2d(n, n, 3, padding=1, groups=n), n),
            (nn.Conv2d(n, n, 3, padding=1, groups=4), n),
            (nn.Conv2d(n, 2 * n, 1, groups=n), 2 * n),
            (nn.ConvTranspose2d(n, n, 2, stride=2), n),
            (nn.ConvTranspose2d(n, n, 2, stride=2, groups=2), n),
            (nn.PixelShuffle(2), n // 4),
            (nn.PixelUnshuffle(2), 4 * n),
            (nn.ChannelShuffle(2), n),
            (nn.Upsample(scale_factor=2, mode="bilinear"), n),
        )
    )
    norm = random.choice((nn.BatchNorm2d(n), nn.GroupNorm(4, n), nn.InstanceNorm2d(n, affine=True), nn.Identity()))
    mixes = getattr(act, "groups", n) < n

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.up(x)).sigmoid()
        h = read(h, 1, UP) if mixes else h
        return m.down(read(m.act(h), 1, DOWN)).mean((2, 3))

    parts = {"norm": norm, "act": act, "down": nn.Conv2d(out, 3, 3, padding=1)}
    return Built(Net(run, up=nn.Conv2d(3, n, 3, padding=1), **parts), (picture(),))


def to_vectors(random: Random) -> Built:
    """From channels to a linear layer: flattened, pooled, permuted, unfolded, multiplied with one another."""
    n = width(random)

    def gram(m: Any, h: Tensor) -> Tensor:
        flat = h.flatten(2)
        return m.down((flat.transpose(1, 2) @ flat).mean(1))

    act, size = random.choice(
        (
            (lambda m, h: m.down(h.flatten(1)), 24 * n),
            (lambda m, h: m.down(h.mean((2, 3))), n),
            (lambda m, h: m.down(h.permute(0, 2, 3, 1).reshape(len(h), -1, h.shape[1])), n),
            (lambda m, h: m.down(F.unfold(h, 2, stride=2).transpose(1, 2)), 4 * n),
            (lambda m, h: m.down(F.adaptive_max_pool2d(h, 1).flatten(1)), n),
            (gram, 24),
        )
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return act(m, read(m.up(x).relu(), 1, UP))

    return Built(Net(run, up=nn.Conv2d(3, n, 3, padding=1), down=nn.Linear(size, 3)), (picture(),))


# --- sequences -------------------------------------------------------------------------------------------------------


def recurrent_modules(random: Random) -> Built:
    """LSTM, GRU and RNN of torch, with layers and directions; cells in a loop."""
    n, kind = width(random), random.choice(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"))
    layers, both = random.choice((1, 2)), random.random() < 0.5

    def run(m: Any, x: Tensor) -> Any:
        if not kind.endswith("Cell"):
            return m.down(m.core(x)[0])
        state = None
        for step in x.unbind(1):
            state = m.core(step, state)
        return m.down(state[0] if isinstance(state, tuple) else state)

    if kind.endswith("Cell"):
        core, out = getattr(nn, kind)(4, n), n
    else:
        core, out = getattr(nn, kind)(4, n, layers, batch_first=True, bidirectional=both), n * (1 + both)
    return Built(Net(run, core=core, down=nn.Linear(out, 3)), (torch.randn(2, 3, 4),))


def tokens(random: Random) -> Built:
    """Tables of words and positions, bags, one-hot products, a tied head."""
    n = width(random)
    kind = random.choice(("tied", "bag", "onehot", "positions", "padding"))

    def run(m: Any, ids: Tensor) -> Tensor:
        table = m.table.weight
        h = F.one_hot(ids, 11).to(table) @ table if kind == "onehot" else m.table(ids)
        if kind == "positions":
            h = h + m.places(torch.arange(ids.shape[1]))
        h = m.mix(read(h, -1, "table.weight:1")).relu()
        if kind == "padding":
            h = h * (ids != 0)[..., None]
        h = m.back(read(h, -1, "mix.weight:0"))
        if kind == "tied":
            return F.linear(read(h, -1, "table.weight:1"), table)
        return m.down(read(h, -1, "back.weight:0"))

    table = (nn.EmbeddingBag if kind == "bag" else nn.Embedding)(11, n)
    parts = {"places": nn.Embedding(6, n), "mix": nn.Linear(n, n + 1), "back": nn.Linear(n + 1, n)}
    return Built(Net(run, table=table, **parts, down=nn.Linear(n, 3)), (torch.randint(0, 11, (2, 5)),))


def on_graphs(random: Random) -> Built:
    """Messages along edges: a dense or sparse matrix, or sums by number."""
    edges = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 0]])
    dense = torch.zeros(4, 4).index_put((edges[0], edges[1]), torch.ones(6))
    links, send = random.choice(
        (
            (nn.Buffer(dense), lambda m, h: m.links @ h),
            (dense.to_sparse(), lambda m, h: torch.sparse.mm(m.links, h)),
            (nn.Buffer(edges), lambda m, h: torch.zeros_like(h).index_add(0, m.links[1], h[m.links[0]])),
        )
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(send(m, m.up(x).relu()).tanh(), -1, UP))

    n = width(random)
    return Built(Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3), links=links), (torch.randn(4, 5),))


# --- structure -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What a network answers."""

    scores: Tensor
    more: Any = None


class Two(NamedTuple):
    """Two answers."""

    first: Tensor
    second: Tensor


def many_answers(random: Random) -> Built:
    """Tuples, dictionaries, objects; answers of the hidden units themselves."""
    n = width(random)
    answer = random.choice(
        (
            lambda a, b, h: {"a": a, "b": [b, None]},
            lambda a, b, h: Found(a, {"b": b}),
            lambda a, b, h: Two(a, b),
            lambda a, b, h: (a, h),
            lambda a, b, h: [{"x": (a,)}, ((b, 3), "text")],
        )
    )

    def run(m: Any, x: Tensor) -> Any:
        h = m.up(x).relu()
        return answer(m.down(read(h, -1, UP)), m.side(read(h, -1, UP)), h)

    return perceptron(run, random, n, side=nn.Linear(n, 2))


def many_inputs(random: Random) -> Built:
    """Several inputs: by name, in lists and dictionaries, left out, not of numbers."""
    n = width(random)

    def run(m: Any, x: Any, y: Any = None, mode: str = "relu", **more: Any) -> Tensor:
        if isinstance(x, dict | list):
            x, y = x.values() if isinstance(x, dict) else x
        h = m.up(x) if y is None else m.up(x) + m.other(y)
        h = h.relu() if mode == "relu" else h.tanh()
        return m.down(read(h, -1, UP)) * (2 if more else 1)

    built = perceptron(run, random, n, other=nn.Linear(4, n))
    x, y = built.args[0], torch.randn(1, 4)
    built.args, built.kwargs = random.choice(
        (
            ((x,), {"y": y, "extra": 1}),
            (({"x": x, "y": y},), {}),
            (([x, y],), {}),
            ((x, y), {"mode": "tanh"}),
            ((x, None), {}),
        )
    )
    return built


def modules_made_on_the_way(random: Random) -> Built:
    """Layers are made in forward: without numbers, with fixed ones, of the width."""

    def fixed(m: Any, h: Tensor) -> Tensor:
        layer = nn.Linear(h.shape[-1], h.shape[-1], bias=False).to(h)
        with torch.no_grad():
            layer.weight.fill_(0.1)
        return layer(read(h, -1, UP))

    act = random.choice(
        (
            lambda m, h: nn.Sequential(nn.Softplus(), nn.Dropout(0.5).eval())(h),
            lambda m, h: layer_norm(nn.LayerNorm(h.shape[-1]).to(h), h, UP),
            fixed,
        )
    )
    return middle(act, random)


class Magic(nn.Module):
    """Finds its parts by names that are made on the way, and answers for names that it does not have."""

    def __init__(self, n: int, kind: str) -> None:
        super().__init__()
        self.kind, self.names, self.width = kind, ("up", "down"), n
        for name, layer in zip(self.names, (nn.Linear(5, n), nn.Linear(n, 3)), strict=True):
            setattr(self, name, layer)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("layer_"):
            return super().__getattr__(self.names[int(name[6:])])
        return super().__getattr__(name)

    @property
    def gain(self) -> Tensor:
        """Computed of a weight when it is asked for."""
        return self.up.weight.mean(1)

    def forward(self, x: Tensor) -> Tensor:
        """By name."""
        h = self.layer_0(x).relu()
        if self.kind == "property":
            h = h * self.gain
        if self.kind == "size":
            h = h.view(-1, self.width) * 2
        if self.kind == "state":
            return F.linear(read(h, -1, UP), self.state_dict()["down.weight"])
        return self.layer_1(read(h, -1, UP))


def names_made_on_the_way(random: Random) -> Built:
    """``__getattr__``, properties, ``state_dict`` in forward."""
    return Built(Magic(width(random), random.choice(("property", "size", "state"))), (vectors(random),))


class Odd(nn.Linear):
    """A linear layer that does more than one."""

    def __init__(self, *sizes: int, kind: str) -> None:
        super().__init__(*sizes)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """By the kind."""
        if self.kind == "scaled":
            return super().forward(x) * self.out_features**-0.5 / self.in_features
        if self.kind == "twice":
            return super().forward(x) + self.bias
        if self.kind == "own":
            return (x[..., None, :] * self.weight).sum(-1) + self.bias
        if self.kind == "centred":
            return F.linear(x, self.weight - self.weight.mean(0), self.bias)
        return F.linear(x, self.weight.abs(), self.bias.exp())


def layers_of_its_own(random: Random) -> Built:
    """Subclasses of nn.Linear with further computation."""
    n, kind = width(random), random.choice(("scaled", "twice", "own", "centred", "abs"))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).relu(), -1, UP))

    return perceptron(run, random, n, up=Odd(5, n, kind=kind), down=Odd(n, 3, kind=random.choice((kind, "abs"))))


def changed_instances(random: Random) -> Built:
    """A forward of one's own on an instance, a class made on the way, parts exchanged after they were made."""
    kind = random.choice(("method", "class", "closure", "delegate"))
    built = middle(lambda m, h: m.act(h), random, act=nn.Tanh())
    act, up = built.model.act, built.model.up
    if kind == "method":
        act.forward = types.MethodType(lambda self, h: h.relu() + 0.5, act)
    elif kind == "class":
        act.__class__ = type("Made", (nn.Tanh,), {"forward": lambda self, h: h.square()})
    elif kind == "closure":
        act.forward = lambda h: h.relu() * up.bias
    else:
        built.model.act = nn.Module()
        built.model.act.forward = act.forward
    return built


def different_precision(random: Random) -> Built:
    """Casts to other precisions and back."""
    act = random.choice(
        (
            lambda m, h: h.to(torch.float32).relu().to(h.dtype),
            lambda m, h: h.bfloat16().relu().to(h.dtype),
            lambda m, h: (h * 10).int().to(h.dtype) / 10,
            lambda m, h: (h > 0).to(h.dtype),
        )
    )
    return middle(act, random)
