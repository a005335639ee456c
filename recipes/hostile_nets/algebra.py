"""Networks of unusual products, norms, attention, functions with gradients of their own, complex numbers."""

import math
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hostile_nets.build import DOWN, UP, Built, Net, middle, perceptron, vectors, width
from hostile_nets.masking import read

# --- products --------------------------------------------------------------------------------------------------------


def by_einsum(random: Random) -> Built:
    """Layers spelled as sums over letters."""
    n, k = width(random), random.randint(2, 4)
    einsum = torch.einsum

    def experts(m: Any, x: Tensor, h: Tensor) -> Tensor:
        scores = read(einsum("bo,eo->be", h, m.gate), -1, "gate:0", -torch.inf)
        return einsum("bep,be->bp", einsum("bo,eop->bep", h, m.cube), scores.softmax(-1))

    act = random.choice(
        (
            experts,
            lambda m, x, h: einsum("bo,eop,be->bp", h, m.cube, x[:, :k]),
            lambda m, x, h: einsum("...o,po->...p", h[:, None], m.down),
            lambda m, x, h: einsum("oo,bo,po->bp", m.square, h, m.down),
            lambda m, x, h: einsum("bo,eop,bo->bp", h, m.cube, h),
            lambda m, x, h: einsum("bo,bo->b", h, h)[:, None],
        )
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return act(m, x, read(einsum("bi,oi->bo", x, m.up).relu(), -1, "up:0"))

    shapes = {"up": (n, 5), "down": (3, n), "cube": (k, n, 3), "gate": (k, n), "square": (n, n)}
    return Built(Net(run, **{name: nn.Parameter(torch.zeros(s)) for name, s in shapes.items()}), (vectors(random),))


def units_meet_units(random: Random) -> Built:
    """Products of activations with activations."""
    n = width(random)
    act, out, places = random.choice(
        (
            (lambda m, h, r: (h[:, :, None] * m.two(h.new_ones(len(h), 1))[:, None]).flatten(1), 2 * n, DOWN),
            (lambda m, h, r: (r() @ r().t()) @ h, n, UP),
            (lambda m, h, r: m.bi(r(), r()), 4, DOWN),
            (lambda m, h, r: h * torch.cdist(r(), r()).sum(-1, keepdim=True), n, UP),
            (lambda m, h, r: h * F.cosine_similarity(r(), r(h.flip(0)), dim=-1)[:, None], n, UP),
            (lambda m, h, r: torch.stack([torch.kron(row, m.other) for row in h]), 2 * n, DOWN),
        )
    )

    def between(m: Any, h: Tensor) -> Tensor:
        h = h.tanh()
        return act(m, h, lambda value=h: read(value, -1, UP))

    parts = {"other": nn.Parameter(torch.zeros(2)), "two": nn.Linear(1, 2), "bi": nn.Bilinear(n, n, 4)}
    return middle(between, random, n, out, places, **parts)


class Times(torch.autograd.Function):
    """A linear layer with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """X Wᵀ."""
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Of both."""
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Flipped(torch.autograd.Function):
    """Reverses gradients, and depends on the width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        """Over the root of the width."""
        ctx.by = by
        return x / x.shape[-1] ** 0.5 if by > 1 else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Negated."""
        return -ctx.by * grad, None


def own_gradients(random: Random) -> Built:
    """torch.autograd.Function: a layer, a reversal."""
    layer, by = random.random() < 0.5, random.choice((0.5, 2.0))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).sigmoid()
        if layer:
            return Times.apply(read(h, -1, UP), m.down.weight)
        return m.down(read(Flipped.apply(h, by), -1, UP))

    return perceptron(run, random, width(random))


def complex_numbers(random: Random) -> Built:
    """Pairs as complex numbers, spectra along units or along rows."""
    n = 2 * random.randint(3, 5)

    def rotate(m: Any, h: Tensor) -> Tensor:
        pairs = torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(m.angle), m.angle)).flatten(-2)

    act, out = random.choice(
        (
            (rotate, n),
            (lambda m, h: torch.fft.rfft(h, dim=-1).abs(), n // 2 + 1),
            (lambda m, h: torch.fft.fft(h, dim=0).real, n),
            (lambda m, h: torch.complex(h, h.roll(1, 0)).abs(), n),
            (lambda m, h: (h.to(torch.complex128) @ m.spectrum).real, n),
        )
    )
    spectrum = nn.Parameter(torch.randn(n, n, dtype=torch.complex128))
    return middle(act, random, n, out, DOWN, angle=nn.Parameter(torch.zeros(n // 2)), spectrum=spectrum)


def calculus_inside(random: Random) -> Built:
    """Gradients, vectorised maps and checkpoints as part of the function."""

    def block(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).tanh(), -1, UP))

    def gradient(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(block(m, x).square().sum(), x, create_graph=True)[0]

    def functional(m: Any, x: Tensor) -> Tensor:
        weights = {name: p * 2 for name, p in m.down.named_parameters()}
        return torch.func.functional_call(m.down, weights, (read(m.up(x).relu(), -1, UP),))

    run = random.choice(
        (
            gradient,
            lambda m, x: torch.func.vmap(lambda row: block(m, row))(x),
            lambda m, x: checkpoint(lambda y: block(m, y), x, use_reentrant=False),
            functional,
            lambda m, x: torch.func.jvp(lambda y: block(m, y), (x,), (torch.ones_like(x),)),
        )
    )
    return perceptron(run, random, width(random))


# --- norms -----------------------------------------------------------------------------------------------------------


def unusual_norms(random: Random) -> Built:
    """Norms over the units that are no modules, or not the usual ones."""
    n, eps = 2 * random.randint(3, 5), 1e-5

    def r(h: Tensor, fill: float = 0.0) -> Tensor:
        return read(h, -1, UP, fill)

    kinds = {
        "pixel": lambda m, h: r(h) * (r(h).square().mean(-1, keepdim=True) + eps).rsqrt(),
        "rms": lambda m, h: r(h) * torch.rsqrt(r(h).pow(2).mean(-1, keepdim=True) + m.eps) * m.gain,
        "l2": lambda m, h: F.normalize(r(h), dim=-1),
        "most": lambda m, h: h / r(h.abs(), -torch.inf).amax(-1, keepdim=True),
        "total": lambda m, h: h / (r(h.exp()).sum(-1, keepdim=True) + 1),
        "variance": lambda m, h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + eps).sqrt(),
        "layer": lambda m, h: F.layer_norm(h, (h.shape[-1],), m.gain),
        "group": lambda m, h: F.group_norm(h, 2, m.gain),
        "batch": lambda m, h: F.batch_norm(h, m.mean, m.var, m.gain, None, training=False),
        "live": lambda m, h: F.batch_norm(h, None, None, m.gain, None, training=True),
        "rows": lambda m, h: (h - h.mean(0)) / (h.var(0, unbiased=False) + eps).sqrt(),
        "softmax": lambda m, h: (r(h, -torch.inf).softmax(-1) * r(h, -torch.inf)).nan_to_num(0.0),
    }
    kind = random.choice(list(kinds))
    parts: dict[str, Any] = {"gain": nn.Parameter(torch.zeros(n)), "eps": eps}
    parts |= {"mean": nn.Buffer(torch.zeros(n)), "var": nn.Buffer(torch.ones(n))}
    return middle(kinds[kind], random, n, places="" if kind in ("layer", "group") else UP, **parts)


# --- attention -------------------------------------------------------------------------------------------------------


def attention_by_hand(random: Random) -> Built:
    """Heads by views, scaled, masked, biased, mixed, or with gates."""
    heads, size = random.choice((2, 3)), random.choice((3, 4))
    n = heads * size
    kind = random.choice(("causal", "bias", "talking", "gate", "linear", "fused", "scaled", "sdpa", "qknorm"))

    def run(m: Any, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        if kind == "fused":
            q, k, v = m.all(x).view(b, t, 3, m.heads, -1).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part(x).view(b, t, m.heads, -1).transpose(1, 2) for part in (m.q, m.k, m.v))
        if kind == "qknorm":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        if kind == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif kind == "linear":
            y = q.relu() @ (k.softmax(-2).transpose(-1, -2) @ v)
        else:
            scores = q @ k.transpose(-1, -2) / (math.sqrt(q.shape[-1]) if kind == "scaled" else 2.0)
            if kind == "causal":
                scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf)
            if kind == "bias":
                scores = scores + m.bias
            share = scores.softmax(-1)
            if kind == "talking":
                share = torch.einsum("bhqk,hg->bgqk", share, m.mix)
            y = share @ v
        if kind == "gate":
            y = y * m.gate.sigmoid()
        return m.out(read(y.transpose(1, 2).flatten(2), -1, "out.weight:1"))

    parts: dict[str, Any] = {name: nn.Linear(5, n, bias=False) for name in ("q", "k", "v")}
    if kind == "fused":
        parts = {"all": nn.Linear(5, 3 * n)}
    parts |= {"out": nn.Linear(n, 3), "heads": heads, "bias": nn.Parameter(torch.zeros(heads, 4, 4))}
    parts |= {"mix": nn.Parameter(torch.zeros(heads, heads)), "gate": nn.Parameter(torch.zeros(heads, 1, 1))}
    return Built(Net(run, **parts), (torch.randn(2, 4, 5),))


def gates_and_maxima(random: Random) -> Built:
    """GLU, SwiGLU, maxout, maxima over groups of units."""
    n = width(random)
    act = random.choice(
        (
            lambda m, h: F.glu(h, -1),
            lambda m, h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
            lambda m, h: h.unflatten(-1, (-1, 2)).amax(-1),
            lambda m, h: h.unflatten(-1, (2, -1)).max(1).values,
        )
    )
    return middle(act, random, 2 * n, n, DOWN)
