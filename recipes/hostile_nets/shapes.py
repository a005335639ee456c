"""Convolutions, sequences and networks whose structure is out of the ordinary."""

import types
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile_nets.build import UP, Built, Net, middle, vectors, width
from hostile_nets.masking import layer_norm, read

DOWN = "down.weight:1"

# --- pictures --------------------------------------------------------------------------------------------------------


def picture(random: Random) -> Tensor:
    """Three channels; height and width differ."""
    return torch.randn(2, 3, 6, 4)


def between_convolutions(random: Random) -> Built:
    """Something between two convolutions."""
    n = 4 * random.randint(2, 3)
    norms = (nn.BatchNorm2d(n), nn.GroupNorm(4, n), nn.InstanceNorm2d(n, affine=True), nn.Identity())
    kinds: dict[str, Any] = {
        "depthwise": nn.Conv2d(n, n, 3, padding=1, groups=n),
        "grouped": nn.Conv2d(n, n, 3, padding=1, groups=4),
        "more": nn.Conv2d(n, 2 * n, 1, groups=n),
        "transposed": nn.ConvTranspose2d(n, n, 2, stride=2),
        "transposed groups": nn.ConvTranspose2d(n, n, 2, stride=2, groups=2),
        "transposed depthwise": nn.ConvTranspose2d(n, n, 3, padding=1, groups=n),
        "shuffle": nn.PixelShuffle(2),
        "unshuffle": nn.PixelUnshuffle(2),
        "channels": nn.ChannelShuffle(2),
        "dropout": nn.Dropout2d(),
        "pool": nn.AvgPool2d(2),
        "blur": nn.Upsample(scale_factor=2, mode="bilinear"),
    }
    kind = random.choice(list(kinds))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.up(x)).sigmoid()
        if kind == "grouped" or kind.startswith("transposed"):
            h = read(h, 1, "up.weight:0")
        return m.down(read(m.act(h), 1, DOWN)).mean((2, 3))

    out = {"more": 2 * n, "shuffle": n // 4, "unshuffle": 4 * n}.get(kind, n)
    parts = {"norm": random.choice(norms), "act": kinds[kind], "down": nn.Conv2d(out, 3, 3, padding=1)}
    return Built(Net(run, up=nn.Conv2d(3, n, 3, padding=1), **parts), (picture(random),))


def to_vectors(random: Random) -> Built:
    """From channels to a linear layer: flattened, pooled, permuted, unfolded."""
    n = width(random)

    def windows(m: Any, h: Tensor) -> Tensor:
        b, c, height, wide = h.shape
        w = h.view(b, c, height // 2, 2, wide // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        return m.down(read(w, -1, UP))

    def gram(m: Any, h: Tensor) -> Tensor:
        flat = read(h, 1, UP).flatten(2)
        return m.tail((flat.transpose(1, 2) @ flat).mean(1))

    kinds = {
        "flatten": lambda m, h: m.down(read(h, 1, UP).flatten(1)),
        "pool": lambda m, h: m.down(read(h.mean((2, 3)), -1, UP)),
        "permute": lambda m, h: m.down(read(h.permute(0, 2, 3, 1).reshape(len(h), -1, h.shape[1]), -1, UP)),
        "unfold": lambda m, h: m.down(F.unfold(read(h, 1, UP), 2, stride=2).transpose(1, 2)),
        "windows": windows,
        "max": lambda m, h: m.down(read(F.adaptive_max_pool2d(h, 1).flatten(1), -1, UP)),
        "gram": gram,
    }
    kind = random.choice(list(kinds))
    outs = {"flatten": 24 * n, "unfold": 4 * n}
    parts = {"down": nn.Linear(outs.get(kind, n), 3), "tail": nn.Linear(24, 3)}
    up = nn.Conv2d(3, n, 3, padding=1)
    return Built(Net(lambda m, x: kinds[kind](m, m.up(x).relu()), up=up, **parts), (picture(random),))


def channels_weighed(random: Random) -> Built:
    """Squeeze and excite, ECA, CBAM, a softmax over channels, selective kernels."""
    n = width(random)

    def excite(m: Any, x: Tensor, h: Tensor) -> Tensor:
        inner = read(m.a(read(h.mean((2, 3)), -1, UP)).relu(), -1, "a.weight:0")
        return h * m.b(inner).sigmoid()[..., None, None]

    def select(m: Any, x: Tensor, h: Tensor) -> Tensor:
        other = m.other(x).relu()
        share = torch.stack([m.gate(read(part.mean((2, 3)), -1, UP)) for part in (h, other)]).softmax(0)
        return h * share[0][..., None, None] + other * share[1][..., None, None]

    def softmax(m: Any, x: Tensor, h: Tensor) -> Tensor:
        gate = m.gate(read(h.mean((2, 3)), -1, UP))
        return h * read(gate, -1, UP, -torch.inf).softmax(1)[..., None, None]

    act = random.choice(
        (
            excite,
            lambda m, x, h: h * m.along(h.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None],
            lambda m, x, h: h * m.look(torch.cat([h.mean(1, True), h.amax(1, True)], 1)).sigmoid(),
            softmax,
            select,
            lambda m, x, h: torch.cat([h[:, :2].roll(1, 2), h[:, 2:]], 1),
        )
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(act(m, x, m.up(x).relu()), 1, UP)).mean((2, 3))

    parts: dict[str, Any] = {"a": nn.Linear(n, 5), "b": nn.Linear(5, n), "along": nn.Conv1d(1, 1, 3, padding=1)}
    parts |= {"gate": nn.Linear(n, n), "look": nn.Conv2d(2, 1, 3, padding=1), "other": nn.Conv2d(3, n, 1)}
    parts["down"] = nn.Conv2d(n, 3, 1)
    return Built(Net(run, up=nn.Conv2d(3, n, 3, padding=1), **parts), (picture(random),))


def joined_and_added(random: Random) -> Built:
    """Dense blocks, U-shapes, inceptions: concatenations and sums mixed."""
    n, k = width(random), width(random)
    kind = random.choice(("dense", "unet", "inception", "both"))

    def join(m: Any, x: Tensor) -> Tensor:
        first = m.one(x).relu()
        if kind == "dense":
            second = m.two(read(torch.cat([x, first], 1), 1, "two.weight:1")).relu()
            return torch.cat([x, first, second], 1)
        if kind == "unet":
            low = m.two(read(F.max_pool2d(first, 2), 1, "two.weight:1")).relu()
            return torch.cat([first, F.interpolate(low, scale_factor=2)], 1)
        other = m.other(x).tanh()
        if kind == "inception":
            return torch.cat([other, first], 1) + m.three(x)
        joined = torch.cat([first, other], 1)
        return joined + torch.cat([other.flip(2), first], 1) if n == k else joined

    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(read(join(m, x), 1, "out.weight:1")).mean((2, 3))

    extra = 3 * (kind == "dense")
    one, two = nn.Conv2d(3, n, 3, padding=1), nn.Conv2d(n + extra, k, 3, padding=1)
    parts = {"one": one, "two": two, "other": nn.Conv2d(3, k, 1), "three": nn.Conv2d(3, n + k, 1)}
    return Built(Net(run, **parts, out=nn.Conv2d(n + k + extra, 3, 1)), (picture(random),))


def other_spaces(random: Random) -> Built:
    """One and three dimensions, dilation, sampling by a grid, a kernel that is computed."""
    n = width(random)
    kind = random.choice(("line", "volume", "grid", "kernel", "causal"))

    def run(m: Any, x: Tensor) -> Tensor:
        if kind == "line":
            return m.down(read(m.up(x).relu(), 1, UP)).mean(-1)
        if kind == "volume":
            return m.down(read(m.up(x).relu(), 1, UP)).mean((2, 3, 4))
        if kind == "causal":
            return m.down(F.pad(read(m.up(F.pad(x, (2, 0))).relu(), 1, UP), (2, 0)))
        h = m.up(x).relu()
        if kind == "grid":
            grid = F.affine_grid(m.move[None].expand(len(x), -1, -1), [len(x), 1, 5, 5], align_corners=False)
            return m.down(read(F.grid_sample(h, grid, align_corners=False), 1, UP)).mean((2, 3))
        kernel = m.down.weight.softmax(0)
        return F.conv2d(read(h, 1, UP), kernel).mean((2, 3))

    conv = {"line": nn.Conv1d, "causal": nn.Conv1d, "volume": nn.Conv3d}.get(kind, nn.Conv2d)
    x = {"line": torch.randn(2, 3, 7), "causal": torch.randn(2, 3, 7), "volume": torch.randn(2, 3, 4, 3, 5)}
    dilation = 1 if kind in ("causal", "kernel", "grid") else 2
    up = conv(3, n, 3, padding=0 if kind == "causal" else dilation, dilation=dilation)
    parts = {"down": conv(n, 3, 3 if kind == "causal" else 1), "move": nn.Parameter(torch.zeros(2, 3))}
    return Built(Net(run, up=up, **parts), (x.get(kind, picture(random)),))


# --- sequences -------------------------------------------------------------------------------------------------------


def recurrent_modules(random: Random) -> Built:
    """LSTM, GRU and RNN of torch, with layers, directions, projections; cells in a loop."""
    n = width(random)
    kind = random.choice(("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell"))
    layers, both = random.choice((1, 2)), random.random() < 0.5

    def run(m: Any, x: Tensor) -> Any:
        if kind.endswith("Cell"):
            state = None
            for step in x.unbind(1):
                state = m.core(step, state)
            return m.down(state[0] if isinstance(state, tuple) else state)
        return m.down(m.core(x)[0])

    if kind.endswith("Cell"):
        core, out = getattr(nn, kind)(4, n), n
    else:
        core, out = getattr(nn, kind)(4, n, layers, batch_first=True, bidirectional=both), n * (1 + both)
    return Built(Net(run, core=core, down=nn.Linear(out, 3)), (torch.randn(2, 3, 4),))


def tokens(random: Random) -> Built:
    """Tables of words and positions, bags, one-hot products, a tied head."""
    n = width(random)
    kind = random.choice(("tied", "bag", "onehot", "positions", "padding", "numbers"))

    def run(m: Any, ids: Tensor) -> Tensor:
        if kind == "bag":
            h = m.bag(ids)
            return m.down(read(m.mix(read(h, -1, "bag.weight:1")).relu(), -1, "mix.weight:0"))
        h = m.table(ids) if kind != "onehot" else F.one_hot(ids, 11).to(m.table.weight) @ m.table.weight
        if kind in ("positions", "numbers"):
            spots = torch.arange(ids.shape[1])
            h = h + (m.places(spots) if kind == "positions" else spots[:, None].to(h) / 10)
        h = m.mix(read(h, -1, "table.weight:1")).relu()
        if kind == "padding":
            h = h * (ids != 0)[..., None]
        h = m.back(read(h, -1, "mix.weight:0"))
        if kind == "tied":
            return F.linear(read(h, -1, "table.weight:1"), m.table.weight)
        return m.down(read(h, -1, "back.weight:0"))

    parts = {"table": nn.Embedding(11, n), "places": nn.Embedding(6, n), "mix": nn.Linear(n, n + 1)}
    if kind == "bag":
        parts["bag"] = nn.EmbeddingBag(11, n)
    parts |= {"back": nn.Linear(n + 1, n), "down": nn.Linear(n + 1 if kind == "bag" else n, 3)}
    return Built(Net(run, **parts), (torch.randint(0, 11, (2, 5)),))


def on_graphs(random: Random) -> Built:
    """Messages along edges: a dense or sparse matrix, or sums by number."""
    n = width(random)
    kind = random.choice(("dense", "sparse", "scatter"))
    edges = torch.tensor([[0, 1, 2, 3, 3, 1], [1, 2, 3, 0, 1, 0]])
    dense = torch.zeros(4, 4).index_put((edges[0], edges[1]), torch.ones(6))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).relu()
        if kind == "scatter":
            h = torch.zeros_like(h).index_add(0, m.edges[1], h[m.edges[0]])
        elif kind == "sparse":
            h = torch.sparse.mm(m.links, h)
        else:
            h = m.links @ h
        return m.down(read(h.tanh(), -1, UP))

    parts: dict[str, Any] = {"edges": nn.Buffer(edges)}
    parts["links"] = nn.Buffer(dense) if kind != "sparse" else dense.to_sparse()
    return Built(Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3), **parts), (torch.randn(4, 5),))


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
    kind = random.choice(("tuple", "dict", "object", "named", "hidden", "nested"))

    def run(m: Any, x: Tensor) -> Any:
        h = m.up(x).relu()
        a, b = m.down(read(h, -1, UP)), m.side(read(h, -1, UP))
        return {
            "tuple": (a, b),
            "dict": {"a": a, "b": [b, None]},
            "object": Found(a, {"b": b}),
            "named": Two(a, b),
            "hidden": (a, h),
            "nested": [{"x": (a,)}, ((b, 3), "text")],
        }[kind]

    return Built(Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3), side=nn.Linear(n, 2)), (vectors(random),))


def many_inputs(random: Random) -> Built:
    """Several inputs: by name, in lists and dictionaries, left out, not of numbers."""
    n = width(random)
    kind = random.choice(("names", "dict", "list", "flag", "none"))

    def run(m: Any, x: Any, y: Any = None, mode: str = "relu", **more: Any) -> Tensor:
        if kind in ("dict", "list"):
            x, y = x.values() if kind == "dict" else x
        h = m.up(x) if y is None else m.up(x) + m.other(y)
        h = h.relu() if mode == "relu" else h.tanh()
        return m.down(read(h, -1, UP)) * (2 if more else 1)

    x, y = vectors(random), torch.randn(1, 4)
    args, kwargs = {
        "names": ((x,), {"y": y, "extra": 1}),
        "dict": (({"x": x, "y": y},), {}),
        "list": (([x, y],), {}),
        "flag": ((x, y), {"mode": "tanh"}),
        "none": ((x, None), {}),
    }[kind]
    parts = {"up": nn.Linear(5, n), "other": nn.Linear(4, n), "down": nn.Linear(n, 3)}
    return Built(Net(run, **parts), args, kwargs)


def modules_made_on_the_way(random: Random) -> Built:
    """Layers are made in forward: without numbers, with fixed ones, of the width."""
    n = width(random)

    def linear(h: Tensor) -> Tensor:
        torch.manual_seed(0)
        return nn.Linear(h.shape[-1], h.shape[-1]).to(h)(read(h, -1, UP))

    def fixed(h: Tensor) -> Tensor:
        layer = nn.Linear(h.shape[-1], h.shape[-1], bias=False).to(h)
        with torch.no_grad():
            layer.weight.fill_(0.1)
        return layer(read(h, -1, UP))

    act = random.choice(
        (
            lambda h: nn.Softplus()(h),
            lambda h: layer_norm(nn.LayerNorm(h.shape[-1]).to(h), h, UP),
            linear,
            fixed,
            lambda h: nn.Sequential(nn.Hardtanh(), nn.Dropout(0.5).eval())(h),
        )
    )
    return middle(lambda m, h: act(h), random, n)


class Magic(nn.Module):
    """Finds its parts by names that are made on the way, and answers for names that it does not have."""

    def __init__(self, n: int, kind: str) -> None:
        super().__init__()
        self.kind, self.names = kind, ("up", "down")
        for name, layer in zip(self.names, (nn.Linear(5, n), nn.Linear(n, 3)), strict=True):
            setattr(self, name, layer)
        self.width = n

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
        if self.kind == "vars":
            h = h * len(vars(self)["_modules"])
        if self.kind == "size":
            h = h.view(-1, self.width) * 2
        if self.kind == "state":
            return F.linear(read(h, -1, UP), self.state_dict()["down.weight"])
        return self.layer_1(read(h, -1, UP))


def names_made_on_the_way(random: Random) -> Built:
    """``__getattr__``, properties, ``vars``, ``state_dict`` in forward."""
    return Built(
        Magic(width(random), random.choice(("plain", "property", "vars", "size", "state"))), (vectors(random),)
    )


class Odd(nn.Linear):
    """A linear layer that does more than one."""

    def __init__(self, *sizes: int, kind: str) -> None:
        super().__init__(*sizes)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """By the kind."""
        if self.kind == "scaled":
            return super().forward(x) * self.out_features**-0.5
        if self.kind == "fan":
            return super().forward(x) / self.in_features
        if self.kind == "twice":
            return super().forward(x) + self.bias
        if self.kind == "own":
            return (x[..., None, :] * self.weight).sum(-1) + self.bias
        if self.kind == "centred":
            return F.linear(x, self.weight - self.weight.mean(0), self.bias)
        return F.linear(x, self.weight.abs(), self.bias.exp())


def layers_of_its_own(random: Random) -> Built:
    """Subclasses of nn.Linear with further computation."""
    n = width(random)
    kind = random.choice(("scaled", "fan", "twice", "own", "centred", "abs"))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).relu(), -1, UP))

    return Built(
        Net(run, up=Odd(5, n, kind=kind), down=Odd(n, 3, kind=random.choice((kind, "abs")))), (vectors(random),)
    )


def changed_instances(random: Random) -> Built:
    """A forward of one's own on an instance, a class made on the way, parts exchanged after they were made."""
    n = width(random)
    kind = random.choice(("method", "function", "class", "closure", "delegate"))
    built = middle(lambda m, h: m.act(h), random, n, act=nn.Tanh())
    act = built.model.act
    if kind == "method":
        act.forward = types.MethodType(lambda self, h: h.relu() + 0.5, act)
    elif kind == "function":
        act.forward = lambda h: h.sigmoid()
    elif kind == "class":
        act.__class__ = type("Made", (nn.Tanh,), {"forward": lambda self, h: h.square()})
    elif kind == "closure":
        up = built.model.up
        act.forward = lambda h: h.relu() * up.bias
    else:
        inner, outer = act, nn.Module()
        outer.forward = inner.forward
        built.model.act = outer
    return built


def different_precision(random: Random) -> Built:
    """Casts to other precisions and back, in places; autocast."""
    n = width(random)
    act = random.choice(
        (
            lambda h: h.to(torch.float32).relu().to(h.dtype),
            lambda h: h.bfloat16().relu().to(h.dtype),
            lambda h: (h * 10).int().to(h.dtype) / 10,
            lambda h: (h > 0).to(h.dtype),
        )
    )
    return middle(lambda m, h: act(h), random, n)


def residual_streams(random: Random) -> Built:
    """Several blocks on one stream, with gains, sums of earlier ones, and blocks that share."""
    n = width(random)
    kind = random.choice(("plain", "gains", "all", "parallel", "reversible", "highway"))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x)
        if kind == "reversible":
            a, b = h, h.flip(0)
            for i in range(2):
                a, b = a + block(m, i, b), b
                a, b = b, a
            return m.down(read(a + b, -1, UP))
        past = [h]
        for i in range(2):
            y = block(m, i, h)
            if kind == "gains":
                y = y * m.gains[i]
            if kind == "highway":
                gate = m.gate(read(h, -1, UP)).sigmoid()
                y = gate * y + (1 - gate) * h
            h = h + y + (block(m, 1 - i, h) if kind == "parallel" else 0)
            past.append(h)
        if kind == "all":
            h = torch.stack(past).mul(m.mix.softmax(0)[:, None, None]).sum(0)
        return m.down(read(h, -1, UP))

    def block(m: Any, i: int, h: Tensor) -> Tensor:
        return m.outs[i](read(m.ins[i](read(h, -1, UP)).relu(), -1, f"ins.{i}.weight:0"))

    parts: dict[str, Any] = {"ins": nn.ModuleList(nn.Linear(n, n + 1 + i) for i in range(2))}
    parts |= {"outs": nn.ModuleList(nn.Linear(n + 1 + i, n) for i in range(2)), "gate": nn.Linear(n, n)}
    parts |= {"gains": nn.Parameter(torch.zeros(2, n)), "mix": nn.Parameter(torch.zeros(3)), "down": nn.Linear(n, 3)}
    return Built(Net(run, up=nn.Linear(5, n), **parts), (vectors(random),))
