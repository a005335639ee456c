"""Networks that share tensors, make weights, or keep things from one run to the next."""

from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from hostile_nets.build import UP, Built, Net, middle, vectors, width
from hostile_nets.masking import read

DOWN = "down.weight:1"

# --- shared tensors --------------------------------------------------------------------------------------------------


def tied_to_its_transpose(random: Random) -> Built:
    """An autoencoder whose decoder is the encoder's weight, transposed."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(read(m.up(x).relu(), -1, UP), m.up.weight.t(), m.bias)

    return Built(Net(run, up=nn.Linear(5, n), bias=nn.Parameter(torch.zeros(5))), (vectors(random),))


def one_module_twice(random: Random) -> Built:
    """One module under two names, run at both."""
    n = width(random)
    block = nn.Linear(n, n)

    def run(m: Any, x: Tensor) -> Tensor:
        places = f"{UP} one.weight:0"
        h = m.up(x).relu()
        h = m.one(read(h, -1, places)).relu()
        return m.down(read(m.two(read(h, -1, places)).relu(), -1, places))

    return Built(Net(run, up=nn.Linear(5, n), one=block, two=block, down=nn.Linear(n, 3)), (vectors(random),))


def one_weight_of_two_layers(random: Random) -> Built:
    """Two layers share a weight, each has its own bias."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).relu() + m.other(x.flip(-1)).tanh(), -1, UP))

    model = Net(run, up=nn.Linear(5, n), other=nn.Linear(5, n), down=nn.Linear(n, 3))
    model.other.weight = model.up.weight
    return Built(model, (vectors(random),))


def memory_of_two_layers(random: Random) -> Built:
    """Two parameters are views of one memory; together they are no parameter."""
    n, offset = width(random), random.choice((0, 3))

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).relu() + m.other(x).tanh(), -1, UP))

    model = Net(run, up=nn.Linear(5, n), other=nn.Linear(5, n), down=nn.Linear(n, 3))
    memory = torch.randn(2 * n, 5)
    model.up.weight = nn.Parameter(memory[:n])
    model.other.weight = nn.Parameter(memory[offset : offset + n])
    return Built(model, (vectors(random),))


def a_buffer_of_a_weight(random: Random) -> Built:
    """A buffer, or an attribute, shares memory with a weight and is used beside it."""
    n = width(random)
    registered = random.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).relu() + F.linear(x, m.seen), -1, UP))

    model = Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3))
    alias = model.up.weight.data
    model.seen = nn.Buffer(alias) if registered else alias
    return Built(model, (vectors(random),))


def slices_of_one_parameter(random: Random) -> Built:
    """All layers are slices of one big parameter, by sizes that the network stores."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        h = F.linear(x, m.all[: m.n, :5], m.shift[: m.n]).relu()
        return F.linear(h, m.all[m.n :, : m.n], m.shift[m.n :])

    model = Net(run, all=nn.Parameter(torch.zeros(n + 3, max(n, 5))), shift=nn.Parameter(torch.zeros(n + 3)), n=n)
    return Built(model, (vectors(random),))


def one_flat_vector(random: Random) -> Built:
    """All weights lie in one vector, cut into layers by views."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        up, down = m.flat.split([5 * m.n, 3 * m.n])
        return F.linear(F.linear(x, up.view(m.n, 5)).relu(), down.view(3, m.n))

    return Built(Net(run, flat=nn.Parameter(torch.zeros(8 * n)), n=n), (vectors(random),))


def weights_from_a_network(random: Random) -> Built:
    """A small network makes another one's weights."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        code = m.first(m.code).relu()
        weight = m.second(read(code, -1, "first.weight:0")).view(3, -1)
        return F.linear(read(m.up(x).relu(), -1, f"{UP}"), weight)

    parts = {"code": nn.Parameter(torch.zeros(4)), "first": nn.Linear(4, 7), "second": nn.Linear(7, 3 * n)}
    return Built(Net(run, up=nn.Linear(5, n), **parts), (vectors(random),))


def of_low_rank(random: Random) -> Built:
    """A weight is a product, beside a full one or alone, scaled by its rank."""
    n, rank = width(random), random.randint(2, 4)
    alone, by_rank = random.random() < 0.5, random.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        update = m.b @ read(m.a, 0, "a:0")
        update = update / m.rank if by_rank else update
        weight = update if alone else m.up.weight + update
        return m.down(read(F.linear(x, weight).relu(), -1, "b:0"))

    parts = {"a": nn.Parameter(torch.zeros(rank, 5)), "b": nn.Parameter(torch.zeros(n, rank)), "rank": rank}
    return Built(Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3), **parts), (vectors(random),))


def made_of_blocks(random: Random) -> Built:
    """A weight that is made by a Kronecker product, a block diagonal, an outer product or shifts of one vector."""
    n = 8
    weight = random.choice(
        (
            lambda m: torch.kron(m.a[:4, :2], m.b[:2, :4]),
            lambda m: torch.block_diag(m.a[:4, :4], m.b[:4, :4]),
            lambda m: m.a[:, :1] * m.b[:1],
            lambda m: torch.stack([m.a[0].roll(i) for i in range(n)]),
            lambda m: m.a.triu(),
        )
    )
    parts = {name: nn.Parameter(torch.zeros(n, n)) for name in "ab"}
    return middle(lambda m, h: F.linear(h.relu(), weight(m)).tanh(), random, n, places=DOWN, **parts)


def in_lists(random: Random) -> Built:
    """Modules and parameters in lists and dictionaries that register them, or do not."""
    n = width(random)
    kind = random.choice(("list", "dict", "parameters", "deep"))
    held, layer = {
        "list": lambda: ([nn.Linear(5, n)], lambda m, x: m.held[0](x)),
        "dict": lambda: ({"up": nn.Linear(5, n)}, lambda m, x: m.held["up"](x)),
        "parameters": lambda: (
            nn.ParameterDict({"w": torch.zeros(n, 5), "b": torch.zeros(n)}),
            lambda m, x: F.linear(x, m.held["w"], m.held["b"]),
        ),
        "deep": lambda: (
            nn.ModuleDict({"x": nn.ModuleList([nn.Sequential(nn.Identity(), nn.Linear(5, n))])}),
            lambda m, x: m.held["x"][0][1](x),
        ),
    }[kind]()
    places = "held.w:0" if kind == "parameters" else DOWN

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(layer(m, x).relu(), -1, places))

    return Built(Net(run, held=held, down=nn.Linear(n, 3)), (vectors(random),))


# --- parametrisations ------------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    """A symmetric weight of a triangle."""

    def forward(self, x: Tensor) -> Tensor:
        """Upper triangle, mirrored."""
        return x.triu() + x.triu(1).transpose(-1, -2)


class Scaled(nn.Module):
    """A weight times a gain per row, or over its own norm."""

    def __init__(self, n: int, kind: str) -> None:
        super().__init__()
        self.gain, self.kind = nn.Parameter(torch.zeros(n, 1)), kind

    def forward(self, x: Tensor) -> Tensor:
        """By the kind."""
        if self.kind == "gain":
            return x * self.gain.exp()
        if self.kind == "rows":
            return x / x.norm(dim=1, keepdim=True)
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


def parametrised(random: Random) -> Built:
    """Weights behind torch's parametrisations, old and new, and some of one's own."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = read(m.up(x).relu(), -1, "up.bias:0")
        return m.down(read(m.more(h).relu(), -1, "more.bias:0"))

    more, up, down, x = nn.Linear(8, 8), nn.Linear(5, 8), nn.Linear(8, 3), vectors(random)
    ways: dict[str, Callable[[nn.Module], object]] = {
        "weight_norm": parametrizations.weight_norm,
        "old": lambda layer: weight_norm(layer, dim=0),
        "old1": lambda layer: weight_norm(layer, dim=1),
        "spectral": parametrizations.spectral_norm,
        "old_spectral": spectral_norm,
        "orthogonal": parametrizations.orthogonal,
        "symmetric": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    }
    for kind in ("gain", "rows", "std"):
        ways[kind] = lambda layer, kind=kind: parametrize.register_parametrization(layer, "weight", Scaled(8, kind))
    kind = random.choice(list(ways))
    ways[kind](random.choice((up, more)) if kind not in ("symmetric", "orthogonal") else more)
    return Built(Net(run, up=up, down=down, more=more), (x,))


def pruned_by_masks(random: Random) -> Built:
    """torch.nn.utils.prune: masks on weights and biases, one or several."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).sigmoid(), -1, "up.bias:0 up.bias_orig:0"))

    model = Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3))
    ways = (
        lambda layer: prune.random_structured(layer, "weight", 1, 0),
        lambda layer: prune.random_unstructured(layer, "weight", 0.4),
        lambda layer: prune.random_unstructured(layer, "bias", 1),
        lambda layer: prune.random_structured(layer, "weight", 1, 1),
    )
    for _ in range(random.randint(1, 2)):
        layer = random.choice((model.up, model.down))
        random.choice(ways)(layer)
    return Built(model, (vectors(random),))


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """An object that is no module."""

    last: Any = None
    rows: dict[str, Any] = field(default_factory=dict)


Pair = namedtuple("Pair", "first second")


def keeps_activations(random: Random) -> Built:
    """Activations are stored in one of many places, and not read again."""
    n = width(random)
    closure: list[Tensor] = []
    keep, held = random.choice(
        (
            (lambda m, h: setattr(m, "last", h), None),
            (lambda m, h: m.held.append(h), []),
            (lambda m, h: m.held.update(h={"deep": [h]}), OrderedDict()),
            (lambda m, h: m.held.append(h), deque(maxlen=3)),
            (lambda m, h: vars(m.held).update(last=h, rows={"h": Pair(h, [h])}), Memory()),
            (lambda m, h: setattr(Memory, "last", h), None),
            (lambda m, h: m.register_buffer("seen", h.mean(0), persistent=False), None),
            (lambda m, h: setattr(m, "held", (h, (h.mean(), len(h)))), None),
            (lambda m, h: closure.append(h), None),
        )
    )

    def act(m: Any, h: Tensor) -> Tensor:
        h = h.relu()
        keep(m, h)
        return h

    return middle(act, random, n, held=held)


def state_from_before(random: Random) -> Built:
    """What a run leaves is read by the next one."""
    n = width(random)
    kind = random.choice(("none", "zeros", "buffer"))

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).relu()
        if m.hidden is not None:
            h = h + 0.5 * m.hidden
        m.hidden = h.detach()
        return m.down(read(h, -1, UP))

    x = vectors(random)
    start = {"none": None, "zeros": torch.zeros(len(x), n), "buffer": nn.Buffer(torch.zeros(len(x), n))}[kind]
    return Built(Net(run, up=nn.Linear(5, n), down=nn.Linear(n, 3), hidden=start), (x,))


def made_at_the_first_run(random: Random) -> Built:
    """A table, a scale or a layer is made when it is first needed."""
    n = width(random)
    kind = random.choice(("rows", "units", "scale", "weight", "grows"))

    def act(m: Any, h: Tensor) -> Tensor:
        if m.table is None or (kind == "grows" and len(m.table) < len(h)):
            m.table = {
                "rows": lambda: torch.linspace(0, 1, len(h))[:, None],
                "units": lambda: torch.linspace(0, 1, h.shape[-1]),
                "scale": lambda: torch.tensor(h.shape[-1] ** -0.5),
                "weight": lambda: m.up.bias.detach().sigmoid(),
                "grows": lambda: torch.arange(len(h), dtype=h.dtype)[:, None],
            }[kind]().to(h)
        return h.relu() * (m.table[: len(h)] if kind == "grows" else m.table)

    return middle(act, random, n, table=None)


@lru_cache
def ramp(n: int) -> Tensor:
    """Computed once per size."""
    return torch.linspace(0.5, 1.5, n)


RAMPS: dict[int, Tensor] = {}


def functions_that_remember(random: Random) -> Built:
    """A cached function or a dictionary of the Python module, by batch size or by width."""
    by_width, cached = random.random() < 0.5, random.random() < 0.5

    def act(m: Any, h: Tensor) -> Tensor:
        n = h.shape[-1 if by_width else 0]
        if cached:
            factor = ramp(n)
        else:
            if n not in RAMPS:
                RAMPS[n] = torch.linspace(0.5, 1.5, n)
            factor = RAMPS[n]
        return h.relu() * (factor if by_width else factor[:, None]).to(h)

    return middle(act, random)


def counts_its_runs(random: Random) -> Built:
    """Does something else at every second run."""

    def act(m: Any, h: Tensor) -> Tensor:
        m.runs += 1
        return h.relu() if m.runs % 2 else h.tanh()

    return middle(act, random, runs=0)


def own_running_statistics(random: Random) -> Built:
    """Buffers that are updated in place, in training only or always."""
    n, always = width(random), random.random() < 0.5

    def act(m: Any, h: Tensor) -> Tensor:
        if m.training or always:
            with torch.no_grad():
                m.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
                m.runs += 1
        return (h - m.mean).relu()

    return middle(act, random, n, mean=nn.Buffer(torch.zeros(n)), runs=nn.Buffer(torch.zeros(())))


def a_cache_that_grows(random: Random) -> Built:
    """Keys and values of earlier runs are read by attention, then the new ones are stored."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        key, value = m.key(x), m.value(x)
        if m.cache is not None:
            key, value = torch.cat([m.cache[0], key], 1), torch.cat([m.cache[1], value], 1)
        m.cache = (key.detach()[:, -4:], value.detach()[:, -4:])
        share = (m.query(x) @ read(key, -1, "key.weight:0").transpose(1, 2)).softmax(-1)
        return m.out(read(share @ value, -1, "value.weight:0"))

    parts = {name: nn.Linear(5, n) for name in ("query", "key")}
    parts |= {"value": nn.Linear(5, n + 1), "out": nn.Linear(n + 1, 3)}
    return Built(Net(run, cache=None, **parts), (torch.randn(2, 3, 5),))


def hooks_everywhere(random: Random) -> Built:
    """Hooks that change what goes in, what comes out, or only look."""
    n = width(random)
    seen: list[Any] = []
    built = middle(lambda m, h: m.act(h), random, n, places=UP, act=nn.Sigmoid())
    model = built.model
    kind = random.choice(("out", "in", "look", "both", "keywords"))
    if kind in ("out", "both"):
        model.act.register_forward_hook(lambda module, given, out: out * 1.5 + 0.1)
    if kind in ("in", "both"):
        model.act.register_forward_pre_hook(lambda module, given: (given[0] - 0.2,))
    if kind == "look":
        model.up.register_forward_hook(lambda module, given, out: seen.append(out))
    if kind == "keywords":
        model.act.register_forward_hook(lambda module, given, named, out: out.square(), with_kwargs=True)
    return built
