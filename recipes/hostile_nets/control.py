"""Networks whose code looks at sizes or at data: branches, loops, recursion."""

import math
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from hostile_nets.build import UP, Built, Net, middle, perceptron, vectors, width
from hostile_nets.masking import read

# --- sizes decide ----------------------------------------------------------------------------------------------------


def width_decides(random: Random) -> Built:
    """A branch on the width, on its parity or on the shape of a weight; a look-up by width; a cap."""
    n, bound = width(random), random.randint(5, 9)
    act = random.choice(
        (
            lambda m, h: h.relu() * (2.0 if h.shape[-1] >= bound else 1.0),
            lambda m, h: -h.relu() if h.size(-1) % 2 else h.relu(),
            lambda m, h: h.relu() if m.up.weight.shape[0] > bound else h.tanh(),
            lambda m, h: {n: torch.relu, n - 1: torch.tanh}.get(h.shape[-1], torch.sigmoid)(h),
            lambda m, h: h.relu() * min(h.shape[-1], bound),
        )
    )
    return middle(act, random, n)


def width_under_a_root(random: Random) -> Built:
    """``h / √n``, by one of several ways to ask for n."""
    ask = random.choice(
        (lambda m, h: h.shape[-1], lambda m, h: m.up.out_features, lambda m, h: len(m.up.bias), lambda m, h: h.numel())
    )
    return middle(lambda m, h: h.sigmoid() / math.sqrt(ask(m, h)), random)


def width_counts_up(random: Random) -> Built:
    """Units weighed by their place, or by a fraction of the width."""
    whole = random.random() < 0.5
    return middle(lambda m, h: h.relu() * (torch.arange(h.shape[-1]) / (h.shape[-1] if whole else 7.0)).to(h), random)


def a_shape_that_fails(random: Random) -> Built:
    """A reshape is tried; something else is done where it fails."""
    n = 2 * random.randint(3, 5)

    def act(m: Any, h: Tensor) -> Tensor:
        try:
            return h.view(len(h), 2, n // 2).flip(1).reshape(len(h), -1)
        except RuntimeError:
            return h.relu()

    return middle(act, random, n)


def size_remembered(random: Random) -> Built:
    """The width is stored as a number, and used."""
    n = width(random)
    return middle(lambda m, h: h.relu() * m.size + m.half, random, n, size=n, half=n / 2)


def width_as_a_tensor(random: Random) -> Built:
    """``torch.tensor(n)``, made in several ways."""
    make = random.choice(
        (
            lambda h: torch.tensor(float(h.shape[-1])).log(),
            lambda h: torch.full((), h.shape[-1] / 3.0),
            lambda h: torch.ones(h.shape[-1]).sum(),
        )
    )
    return middle(lambda m, h: h.relu() * make(h), random)


def noise_of_its_shape(random: Random) -> Built:
    """Numbers drawn from a fixed seed, in the shape of the units."""
    seed = random.randrange(99)
    return middle(lambda m, h: h + torch.randn(h.shape, generator=torch.Generator().manual_seed(seed)).to(h), random)


def batch_decides(random: Random) -> Built:
    """The batch size, not the width, decides: nothing should be refused."""
    return middle(lambda m, h: h.relu() / len(h) if len(h) > 1 else h.tanh(), random)


# --- data decide -----------------------------------------------------------------------------------------------------


def hidden_decides(random: Random) -> Built:
    """An if on the hidden units."""
    return middle(lambda m, h: h.relu() if read(h, -1, UP).sum() > 0 else h.tanh(), random)


def until_small(random: Random) -> Built:
    """A while loop until the input is small enough."""

    def run(m: Any, x: Tensor) -> Tensor:
        turns = 0
        while x.abs().max() > 0.5 and turns < 6:
            x, turns = x * 0.7, turns + 1
        return m.down(read(m.up(x).relu(), -1, UP)) * turns

    return perceptron(run, random, width(random))


def row_by_row(random: Random) -> Built:
    """A loop over the batch, with a choice for each row."""

    def run(m: Any, x: Tensor) -> Tensor:
        rows = [m.up(row).relu() if float(row[0]) > 0 else m.up(row).tanh() for row in x]
        return m.down(read(torch.stack(rows), -1, UP))

    return perceptron(run, random, width(random))


def rows_picked(random: Random) -> Built:
    """Only rows that a mask picks go on."""

    def run(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros(len(x), 3).to(x)
        chosen = x[:, 0] > x[:, 0].mean()
        out[chosen] = m.down(read(m.up(x).relu()[chosen], -1, UP))
        return out

    return perceptron(run, random, width(random))


def through_numpy(random: Random) -> Built:
    """Leaves torch and comes back."""
    return middle(lambda m, h: torch.from_numpy(h.detach().numpy() * 2.0).to(h), random)


def largest_looked_up(random: Random) -> Built:
    """The position of the largest hidden unit picks a row of a table."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).relu()
        return m.down(read(h, -1, UP)) + m.table[h.argmax(-1)]

    return perceptron(run, random, n, table=nn.Parameter(torch.zeros(n, 3)))


# --- loops and recursion ---------------------------------------------------------------------------------------------


def by_hand_over_time(random: Random) -> Built:
    """A recurrent cell over the time steps, its state made of zeros of the width."""
    n, state = width(random), "cell.weight:0 back.weight:0"

    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), m.cell.out_features).to(x)
        for step in x.unbind(1):
            h = (m.cell(step) + m.back(read(h, -1, state))).tanh()
        return m.down(read(h, -1, state))

    parts = {"cell": nn.Linear(4, n), "back": nn.Linear(n, n), "down": nn.Linear(n, 3)}
    return Built(Net(run, **parts), (torch.randn(2, random.randint(2, 4), 4),))


class Recursive(nn.Module):
    """Holds a smaller one of itself."""

    def __init__(self, depth: int, n: int, path: str = "") -> None:
        super().__init__()
        self.depth, self.path = depth, path
        self.up, self.down = nn.Linear(5, n), nn.Linear(n, 5)
        self.inner = Recursive(depth - 1, n + 1, f"{path}inner.") if depth else None

    def forward(self, x: Tensor, depth: int | None = None) -> Tensor:
        """Calls itself with one less, or the smaller one."""
        depth = self.depth if depth is None else depth
        y = x + self.down(read(self.up(x).relu(), -1, f"{self.path}{UP}"))
        if self.inner is not None:
            return self.inner(y)
        return y if depth > 1 else self(y, depth + 1)


def recursion(random: Random) -> Built:
    """Modules inside modules of the same class; the innermost calls itself."""
    return Built(Recursive(random.randint(1, 2), width(random)), (vectors(random),))


def layers_skipped(random: Random) -> Built:
    """A list of numbers on the network says which layers run, some twice."""
    n = width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        for i in m.order:
            x = x + m.downs[i](read(m.ups[i](x).relu(), -1, f"ups.{i}.weight:0"))
        return x

    ups = nn.ModuleList(nn.Linear(5, n + i) for i in range(3))
    downs = nn.ModuleList(nn.Linear(n + i, 5) for i in range(3))
    order = [random.randrange(3) for _ in range(4)]
    return Built(Net(run, ups=ups, downs=downs, order=order), (vectors(random),))
