"""Small networks with their axes written down by hand, so that scores and budgets can be tested without tracing."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Cache, Dim, Product, Role, Slot, Work
from regrow.core.budget import Timing
from regrow.core.sources import Batch, Source

P, C, S = Role.PRODUCES, Role.CONSUMES, Role.SCALES


def slot(name: str, dim: int, role: Role, inner: int = 1, outer: int = 1, stride: int = 1, offset: int = 0) -> Slot:
    return Slot(name, dim, outer, stride, inner, offset, role)


def graph(
    model: nn.Module, axes: Sequence[Axis], dims: Mapping[str, tuple[Dim, ...]], work: Sequence[Work] = ()
) -> AxisGraph:
    """A graph whose tensors have their own fixed shapes, but for those in ``dims``."""
    names = dict(model.named_parameters(remove_duplicate=False))
    first = {id(p): name for name, p in model.named_parameters()}
    return AxisGraph(
        axes={axis.key: axis for axis in axes},
        shapes={name: dims.get(name, tuple(p.shape)) for name, p in names.items()},
        parameters=frozenset(names),
        counted=tuple(name for name, p in names.items() if p.dim() > 1 and first[id(p)] == name),
        itemsize={name: p.element_size() for name, p in names.items()},
        ties={name: first[id(p)] for name, p in names.items() if first[id(p)] != name},
        work=tuple(work),
    )


def mlp(width: int = 6, second: int = 5, seed: int = 0) -> tuple[nn.Module, AxisGraph]:
    """Linear, ReLU, Linear, ReLU, Linear: two axes, whose product is the middle weight."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, second), nn.ReLU(), nn.Linear(second, 3))
    a = Axis("0.weight:0", width, (slot("0.weight", 0, P), slot("0.bias", 0, P), slot("2.weight", 1, C)))
    b = Axis("2.weight:0", second, (slot("2.weight", 0, P), slot("2.bias", 0, P), slot("4.weight", 1, C)))
    dims = {"0.weight": (a.key, 4), "0.bias": (a.key,), "2.weight": (b.key, a.key), "2.bias": (b.key,)}
    dims["4.weight"] = (3, b.key)
    work = [Work("0", "linear", (a.key, 4)), Work("2", "linear", (b.key, a.key)), Work("4", "linear", (3, b.key))]
    return model, graph(model, [a, b], dims, work)


class Block(nn.Module):
    """Grouped-query attention and a gated MLP over a residual stream, and a head."""

    def __init__(self, d: int, kv: int, rep: int, size: int, ff: int) -> None:
        super().__init__()
        self.kv, self.rep, self.size = kv, rep, size
        self.q = nn.Linear(d, kv * rep * size, bias=False)
        self.k = nn.Linear(d, kv * size, bias=False)
        self.v = nn.Linear(d, kv * size, bias=False)
        self.o = nn.Linear(kv * rep * size, d, bias=False)
        self.gate = nn.Linear(d, ff, bias=False)
        self.up = nn.Linear(d, ff, bias=False)
        self.down = nn.Linear(ff, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (m(x).view(b, t, -1, self.size).transpose(1, 2) for m in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(self.rep, 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)
        x = x + self.o(y)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """An embedding and blocks."""

    def __init__(self, vocab: int, d: int, blocks: int, **sizes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(d, **sizes) for _ in range(blocks))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x


class LM(nn.Module):
    """A decoder with a tied head behind the seam that transformers has."""

    def __init__(self, vocab: int = 11, d: int = 8, blocks: int = 2, **sizes: int) -> None:
        super().__init__()
        self.decoder = Decoder(vocab, d, blocks, **(sizes or {"kv": 3, "rep": 2, "size": 4, "ff": 10}))
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.decoder.embed.weight
        self.head_ran = 0

    @property
    def base_model(self) -> nn.Module:
        return self.decoder

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        self.head_ran += 1
        return (self.head(self.decoder(ids, attention_mask)),)


def lm(seed: int = 0, **sizes: int) -> tuple[LM, AxisGraph]:
    """A small language model: per block one axis of MLP neurons and one of key-value groups."""
    torch.manual_seed(seed)
    model = LM(**sizes)
    axes, dims, caches = [], {}, []
    d = model.head.in_features
    for i, block in enumerate(model.decoder.blocks):
        n, ff = f"decoder.blocks.{i}", block.gate.out_features
        wide = block.rep * block.size
        ends = [slot(f"{n}.q.weight", 0, P, wide), slot(f"{n}.k.weight", 0, P, block.size)]
        ends += [slot(f"{n}.v.weight", 0, P, block.size), slot(f"{n}.o.weight", 1, C, wide)]
        kv = Axis(f"{n}.q.weight:0", block.kv, tuple(ends))
        ends = [slot(f"{n}.gate.weight", 0, P), slot(f"{n}.up.weight", 0, P), slot(f"{n}.down.weight", 1, C)]
        neurons = Axis(f"{n}.gate.weight:0", ff, tuple(ends))
        axes += [kv, neurons]
        caches.append(Cache(n, (kv.key, block.size), (kv.key, block.size), 4))
        heads = Product((kv.key, wide))
        dims |= {f"{n}.q.weight": (heads, d), f"{n}.o.weight": (d, heads)}
        dims |= {f"{n}.{m}.weight": (Product((kv.key, block.size)), d) for m in "kv"}
        dims |= {f"{n}.{m}.weight": (neurons.key, d) for m in ("gate", "up")} | {f"{n}.down.weight": (d, neurons.key)}
    return model, replace(graph(model, axes, dims), caches=tuple(caches))


def timed(axes: AxisGraph, seed: int = 0) -> Timing:
    """Times as a device might have them: of each axis a curve through a few widths, and 100 ns of everything else."""
    random = torch.Generator().manual_seed(seed)
    curves, total = {}, 100
    for axis in axes.units():
        widths = sorted({1, max(1, axis.size // 2), axis.size})
        times = torch.randint(0, 400, (len(widths),), generator=random).cumsum(0).tolist()
        curves[axis.key] = tuple(zip(widths, times, strict=True))
        total += times[-1]
    return Timing("none", 1, total, curves, {axis.key: axis.key for axis in axes.units()})


def conv(channels: int = 6, padding: int = 1, groups: int = 1) -> tuple[nn.Module, AxisGraph]:
    """Convolution, BatchNorm, ReLU, convolution."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 4, 3, padding=padding, groups=groups),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    per = channels // groups
    ends = [slot("0.weight", 0, P, outer=groups, stride=per), slot("1.weight", 0, S, outer=groups, stride=per)]
    ends += [slot("1.bias", 0, S, outer=groups, stride=per), slot("3.weight", 1, C)]
    axis = Axis("0.weight:0", per, tuple(ends))
    whole = Product((groups, axis.key))
    dims = {"0.weight": (whole, 3, 3, 3), "1.weight": (whole,), "1.bias": (whole,), "3.weight": (4, axis.key, 3, 3)}
    return model, graph(model, [axis], dims)


def texts(name: str, batches: int = 4, seed: int = 0, size: int = 3, tokens: int = 7) -> Source:
    torch.manual_seed(seed)
    ids = [torch.randint(0, 11, (size, tokens + 1)) for _ in range(batches)]
    return Source(name, [Batch((x[:, :-1],), labels=x[:, 1:]) for x in ids])


def vectors(size: int = 5, batches: int = 2, width: int = 4) -> Source:
    torch.manual_seed(1)
    labels = torch.arange(size) % 3
    return Source("v", [Batch((torch.randn(size, width),), labels=labels) for _ in range(batches)])


def stored(model: nn.Module, module: nn.Module, source: Source) -> Tensor:
    """The inputs of a module, kept: ``[sequences, positions, channels]`` float64."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach().double()))
    with torch.no_grad():
        for batch in source:
            model(*batch.args, **batch.kwargs)
    handle.remove()
    return torch.cat(kept)
