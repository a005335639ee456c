"""Networks that write in place, look at tensors from the side, and move units about by number."""

from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hostile_nets.build import DOWN, UP, Built, middle, perceptron, width
from hostile_nets.masking import read

# --- in place --------------------------------------------------------------------------------------------------------


def in_place_activations(random: Random) -> Built:
    """ReLU, addition and product in place; the input is written into, too."""

    def run(m: Any, x: Tensor) -> Tensor:
        x.relu_().add_(0.5)
        h = m.up(x)
        h.mul_(2).sigmoid_().add_(h.clone())
        return m.down(read(F.relu_(h), -1, UP))

    return perceptron(run, random, width(random))


def in_place_on_a_slice(random: Random) -> Built:
    """A fixed number of units is written to, by a slice, a stride or a list."""
    k = random.randint(2, 4)
    where = random.choice((slice(0, k), slice(None, None, 2), [0, k], slice(-k, None), slice(1, -1)))

    def act(m: Any, h: Tensor) -> Tensor:
        h = h.relu()
        h[:, where] *= 3
        h[:, where] += 0.25
        return h

    return middle(act, random)


def in_place_through_a_view(random: Random) -> Built:
    """A view of the units is written into; the units themselves are read."""
    look = random.choice(
        (
            lambda h: h.view(len(h), 2, -1)[:, 0],
            lambda h: h.t()[0],
            lambda h: h.unbind(-1)[1],
            lambda h: h.chunk(2, -1)[1],
            lambda h: h.view(-1)[: h.shape[-1]],
            lambda h: h.narrow(-1, 1, 2),
            lambda h: h.diagonal(),
        )
    )

    def act(m: Any, h: Tensor) -> Tensor:
        h = h.sigmoid()
        look(h).add_(1.0)
        return h

    return middle(act, random, 2 * random.randint(3, 5))


def copied_into_zeros(random: Random) -> Built:
    """Units are copied into zeros of a size that the network knows, whole or at an offset."""
    n, offset = width(random), random.randint(0, 2)

    def act(m: Any, h: Tensor) -> Tensor:
        out = torch.zeros(len(h), m.size + offset).to(h)
        out[:, offset : offset + h.shape[-1]].copy_(h.relu())
        return out + 0.5

    return middle(act, random, n, n + offset, DOWN, size=n)


def written_out(random: Random) -> Built:
    """``out=``: the result goes into a tensor made before."""

    def act(m: Any, h: Tensor) -> Tensor:
        out = torch.empty_like(h)
        with torch.no_grad():
            torch.mul(h.detach(), 2.0, out=out)
        return out

    return middle(act, random)


def through_data(random: Random) -> Built:
    """``.data`` and ``detach`` share memory with what they come from."""

    def act(m: Any, h: Tensor) -> Tensor:
        h = h.relu()
        h.data.mul_(1.5)
        h.detach()[:, 0] += 1
        return h

    return middle(act, random)


def masked_by_a_buffer(random: Random) -> Built:
    """Some units are switched off by a buffer of truth values."""
    n = width(random)
    off = torch.arange(n) % 3 == random.randrange(3)
    return middle(lambda m, h: h.sigmoid().masked_fill(m.off, 0.3), random, n, off=nn.Buffer(off))


# --- numbers of units ------------------------------------------------------------------------------------------------


def reordered(random: Random) -> Built:
    """Units change places by a fixed order, held as a buffer, a list or an attribute that is no buffer."""
    n = width(random)
    order = torch.tensor(random.sample(range(n), n))
    held = random.choice((nn.Buffer(order), order.tolist(), order))
    pick = random.choice((lambda m, h: h[:, m.order], lambda m, h: h.index_select(-1, torch.as_tensor(m.order))))
    return middle(lambda m, h: pick(m, h.relu()), random, n, places=DOWN, order=held)


def scattered(random: Random) -> Built:
    """Units are added up in bins by number."""
    n, bins = width(random), 4
    target = torch.tensor([random.randrange(bins) for _ in range(n)])
    add_up = random.choice(
        (
            lambda m, h, out: out.scatter_add(-1, m.target.expand(len(h), -1), h),
            lambda m, h, out: out.index_add(-1, m.target, h),
            lambda m, h, out: out.index_put((torch.arange(len(h))[:, None], m.target[None]), h, accumulate=True),
        )
    )

    def act(m: Any, h: Tensor) -> Tensor:
        return add_up(m, read(h.relu(), -1, UP), torch.zeros(len(h), bins).to(h))

    return middle(act, random, n, bins, DOWN, target=nn.Buffer(target))


def in_order(random: Random) -> Built:
    """What depends on the order or the number of units, or on their neighbours."""
    act = random.choice(
        (
            lambda m, h: h.cumsum(-1),
            lambda m, h: h.flip(-1),
            lambda m, h: h.roll(1, -1),
            lambda m, h: h.sort(-1).values,
            lambda m, h: torch.cummax(h, -1).values,
            lambda m, h: h.argsort(-1).to(h) / 7,
            lambda m, h: h.diff(dim=-1, prepend=h[..., :1]),
            lambda m, h: m.along(h[:, None])[:, 0],
            lambda m, h: F.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
            lambda m, h: F.local_response_norm(h[:, :, None], 3)[..., 0],
        )
    )
    return middle(act, random, along=nn.Conv1d(1, 1, 3, padding=1))


def the_largest(random: Random) -> Built:
    """Only the largest units are kept: top-k as a mask, as values, as numbers."""
    k = random.randint(2, 4)
    act = random.choice(
        (
            lambda h: h * (h >= h.topk(k, -1).values[..., -1:]),
            lambda h: torch.zeros_like(h).scatter(-1, h.topk(k, -1).indices, 1.0) * h,
            lambda h: h * (h > h.median(-1, keepdim=True).values),
            lambda h: h * (h == h.amax(-1, keepdim=True)),
            lambda h: F.one_hot(h.argmax(-1), h.shape[-1]).to(h),
            lambda h: h / h.kthvalue(2, -1, keepdim=True).values,
        )
    )

    def run(m: Any, x: Tensor) -> Tensor:
        return m.down(read(act(read(m.up(x), -1, UP, -torch.inf)), -1, UP))

    return perceptron(run, random, 9)


def unit_by_unit(random: Random) -> Built:
    """A loop over the units, each with a number of its own, or all joined again."""
    act = random.choice(
        (
            lambda m, h: torch.stack([unit * 2 for unit in h.relu().unbind(-1)], -1),
            lambda m, h: torch.stack([unit * i for i, unit in enumerate(h.relu().unbind(-1))], -1),
            lambda m, h: torch.cat([h[:, i : i + 1].relu() for i in range(h.shape[-1])], -1),
        )
    )
    return middle(act, random)


def by_strides(random: Random) -> Built:
    """``as_strided`` and ``unfold`` read units past their dimensions."""
    n = width(random)
    act = random.choice(
        (
            lambda m, h: h.relu().contiguous().as_strided((h.shape[0], n - 2), (h.shape[1], 1), 1),
            lambda m, h: h.relu().unfold(-1, 3, 1).mean(-1),
        )
    )
    return middle(act, random, n, n - 2, DOWN)


def every_second(random: Random) -> Built:
    """Units with even and odd numbers part, and meet."""
    act = random.choice(
        (
            lambda m, h: torch.stack([h[..., ::2].relu(), h[..., 1::2].tanh()], -1).flatten(-2),
            lambda m, h: torch.cat([h[..., ::2] * h[..., 1::2], h[..., ::2]], -1),
            lambda m, h: h.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
            lambda m, h: h.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2),
        )
    )
    return middle(act, random, 2 * random.randint(3, 5), places=DOWN)


def repeated(random: Random) -> Built:
    """Units are repeated: each twice, or all twice."""
    n = width(random)
    act = random.choice(
        (
            lambda m, h: h.relu().repeat_interleave(2, -1),
            lambda m, h: h.relu().repeat(1, 2),
            lambda m, h: torch.cat([h, -h], -1),
            lambda m, h: h.relu()[..., None].expand(*h.shape, 2).flatten(-2),
        )
    )
    return middle(act, random, n, 2 * n, DOWN)


def a_few_more(random: Random) -> Built:
    """Ones, positions or the input are put beside the units."""
    n, ones, first = width(random), random.random() < 0.5, random.random() < 0.5

    def run(m: Any, x: Tensor) -> Tensor:
        h = m.up(x).sigmoid()
        more = torch.ones(len(x), 2).to(x) if ones else x[:, :2]
        return m.down(read(torch.cat([more, h] if first else [h, more], -1), -1, DOWN))

    return perceptron(run, random, n, down=nn.Linear(n + 2, 3))
