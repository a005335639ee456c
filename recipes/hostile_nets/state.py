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

from hostile_nets.build import DOWN, UP, Built, Net, middle, perceptron, vectors, width
from hostile_nets.masking import read

# --- shared tensors --------------------------------------------------------------------------------------------------


def tied_to_its_transpose(random: Random) -> Built:
    """An autoencoder whose decoder is the encoder's weight, transposed."""

    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(read(m.up(x).relu(), -1, UP), m.up.weight.t(), m.bias)

    return Built(Net(run, up=nn.Linear(5, width(random)), bias=nn.Parameter(torch.zeros(5))), (vectors(random),))


def one_module_twice(random: Random) -> Built:
    """One module under two names, run at both."""
    n = width(random)
    block = nn.Linear(n, n)

    def run(m: Any, x: Tensor) -> Tensor:
        places = f"{UP} one.weight:0"
        h = m.one(read(m.up(x).relu(), -1, places)).relu()
        return m.down(read(m.two(read(h, -1, places)).relu(), -1, places))

    return perceptron(run, random, n, one=block, two=block)


def two_layers(m: Any, x: Tensor) -> Tensor:
    """The sum of two layers, read by a third."""
    return m.down(read(m.up(x).relu() + m.other(x.flip(-1)).tanh(), -1, UP))


def one_weight_of_two_layers(random: Random) -> Built:
    """Two layers share a weight, each has its own bias."""
    n = width(random)
    built = perceptron(two_layers, random, n, other=nn.Linear(5, n))
    built.model.other.weight = built.model.up.weight
    return built


def memory_of_two_layers(random: Random) -> Built:
    """Two parameters are views of one memory; together they are no parameter."""
    n, offset = width(random), random.choice((0, 3))
    built = perceptron(two_layers, random, n, other=nn.Linear(5, n))
    memory = torch.randn(2 * n, 5)
    built.model.up.weight = nn.Parameter(memory[:n])
    built.model.other.weight = nn.Parameter(memory[offset : offset + n])
    return built


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
        return F.linear(read(m.up(x).relu(), -1, UP), weight)

    parts = {"code": nn.Parameter(torch.zeros(4)), "first": nn.Linear(4, 7), "second": nn.Linear(7, 3 * n)}
    return Built(Net(run, up=nn.Linear(5, n), **parts), (vectors(random),))


def in_lists(random: Random) -> Built:
    """Modules and parameters in lists and dictionaries that register them, or do not."""
    n = width(random)
    up, kind = nn.Linear(5, n), random.choice(("list", "dict", "parameters", "deep"))
    held, layer = {
        "list": ([up], lambda held, x: held[0](x)),
        "dict": ({"up": up}, lambda held, x: held["up"](x)),
        "parameters": (nn.ParameterDict({"w": up.weight}), lambda held, x: F.linear(x, held["w"])),
        "deep": (
            nn.ModuleDict({"x": nn.ModuleList([nn.Sequential(nn.Identity(), up)])}),
            lambda held, x: held["x"][0][1](x),
        ),
    }[kind]
    places = "held.w:0" if kind == "parameters" else DOWN

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(layer(m.held, x).relu(), -1, places))

    return Built(Net(run, held=held, down=nn.Linear(n, 3)), (vectors(random),))


# --- parametrisations ------------------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    """A symmetric weight of a triangle."""

    def forward(self, x: Tensor) -> Tensor:
        """Upper triangle, mirrored."""
        return x.triu() + x.triu(1).transpose(-1, -2)


class Scaled(nn.Module):
    """A weight times a gain per row, or over its own norm."""

    def __init__(self, n: int, gained: bool) -> None:
        super().__init__()
        self.gain, self.gained = nn.Parameter(torch.zeros(n, 1)), gained

    def forward(self, x: Tensor) -> Tensor:
        """By the gain, or the norm of rows."""
        if self.gained:
            return x * self.gain.exp()
        return x / read(x, 1, "more.parametrizations.weight.original:1").norm(dim=1, keepdim=True)


def parametrised(random: Random) -> Built:
    """Weights behind torch's parametrisations, old and new, and some of one's own."""

    def run(m: Any, x: Tensor) -> Tensor:
        h = read(m.up(x).relu(), -1, "up.bias:0")
        return m.down(read(m.more(h).relu(), -1, "more.bias:0"))

    def by(made: nn.Module) -> Callable[[nn.Module], object]:
        return lambda layer: parametrize.register_parametrization(layer, "weight", made)

    built = perceptron(run, random, 8, more=nn.Linear(8, 8))
    square, wide = built.model.more, random.choice((built.model.up, built.model.more))
    way, layer = random.choice(
        (
            (parametrizations.weight_norm, wide),
            (lambda layer: weight_norm(layer, dim=0), wide),
            (lambda layer: weight_norm(layer, dim=1), wide),
            (parametrizations.spectral_norm, wide),
            (spectral_norm, wide),
            (parametrizations.orthogonal, square),
            (by(Symmetric()), square),
            (by(Scaled(8, gained=True)), wide),
            (by(Scaled(8, gained=False)), wide),
        )
    )
    way(layer)
    return built


def pruned_by_masks(random: Random) -> Built:
    """torch.nn.utils.prune: masks on weights and biases, one or several."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(m.up(x).sigmoid(), -1, "up.bias:0 up.bias_orig:0"))

    built = perceptron(run, random, width(random))
    ways = (
        lambda layer: prune.random_structured(layer, "weight", 1, 0),
        lambda layer: prune.random_unstructured(layer, "weight", 0.4),
        lambda layer: prune.random_unstructured(layer, "bias", 1),
    )
    for _ in range(random.randint(1, 2)):
        random.choice(ways)(random.choice((built.model.up, built.model.down)))
    return built


# --- state -----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """An object that is no module."""

    last: Any = None
    rows: dict[str, Any] = field(default_factory=dict)


Pair = namedtuple("Pair", "first second")


def keeps_activations(random: Random) -> Built:
    """Activations are stored in one of many places, and not read again."""
    closure: list[Tensor] = []
    keep, held = random.choice(
        (
            (lambda m, h: setattr(m, "last", h), None),
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

    return middle(act, random, held=held)


def made_at_the_first_run(random: Random) -> Built:
    """A table, a scale or a layer is made when it is first needed."""
    make = random.choice(
        (
            lambda m, h: torch.linspace(0, 1, len(h))[:, None],
            lambda m, h: torch.linspace(0, 1, h.shape[-1]),
            lambda m, h: torch.tensor(h.shape[-1] ** -0.5),
            lambda m, h: m.up.bias.detach().sigmoid(),
        )
    )

    def act(m: Any, h: Tensor) -> Tensor:
        if m.table is None:
            m.table = make(m, h).to(h)
        return h.relu() * m.table

    return middle(act, random, table=None)


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
        if not cached and n not in RAMPS:
            RAMPS[n] = torch.linspace(0.5, 1.5, n)
        factor = (ramp(n) if cached else RAMPS[n]).to(h)
        return h.relu() * (factor if by_width else factor[:, None])

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
    seen: list[Any] = []
    built = middle(lambda m, h: m.act(h), random, act=nn.Sigmoid())
    model, kind = built.model, random.choice(("out", "in", "look", "both", "keywords"))
    if kind in ("out", "both"):
        model.act.register_forward_hook(lambda module, args, out: out * 1.5 + 0.1)
    if kind in ("in", "both"):
        model.act.register_forward_pre_hook(lambda module, args: (args[0] - 0.2,))
    if kind == "look":
        model.up.register_forward_hook(lambda module, args, out: seen.append(out))
    if kind == "keywords":
        model.act.register_forward_hook(lambda module, args, kwargs, out: out.square(), with_kwargs=True)
    return built
