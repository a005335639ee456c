"""Operations that depend on the order, the position or the number of channels. A plain cut of most of them is wrong."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.channels import STEM, along_channels
from zoo.facts import C, Frozen, Has, NotNeutral


def _spread(m: Any, x: Tensor) -> Tensor:
    gate = m.along(x.mean((2, 3))[:, None])[:, 0].sigmoid()
    return x * gate[:, :, None, None]


def _in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:5].mul_(3)
    x[:, 6] = 1
    return x


def _by_size(m: Any, x: Tensor) -> Tensor:
    return x.relu() if x.shape[1] >= 6 else x.tanh()


CHANNEL_ORDER = (
    along_channels(
        "eca",
        _spread,
        Frozen(STEM),
        parts=lambda: {"along": nn.Conv1d(1, 1, 3, padding=1, bias=False)},
    ),
    along_channels("cumsum", lambda m, x: x.cumsum(1), Frozen(STEM)),
    along_channels("flip", lambda m, x: x.flip(1), Frozen(STEM)),
    along_channels("roll", lambda m, x: x.roll(2, 1), Frozen(STEM)),
    along_channels("roll_two", lambda m, x: x.roll((1, 2), (1, 2)), Frozen(STEM)),
    along_channels("roll_back", lambda m, x: x.roll(-1, -3), Frozen(STEM)),
    along_channels("diff", lambda m, x: x.diff(dim=1), Frozen(STEM), after=7),
    along_channels("inplace_slice", lambda m, x: _in_place(x)),
    along_channels("pool_channels", lambda m, x: F.max_pool3d(x, (2, 1, 1)), Frozen(STEM), after=4),
    along_channels("take_along", lambda m, x: x.gather(1, x.argsort(1)), Frozen(STEM)),
    along_channels("where_index", lambda m, x: torch.where((torch.arange(8) < 3)[:, None, None], x, 0.0), Frozen(STEM)),
    along_channels("sort", lambda m, x: x.sort(1).values, Frozen(STEM)),
    along_channels("topk", lambda m, x: x.topk(5, 1).values, Has(8, STEM, (C,)), after=5),
    along_channels("topk_smallest", lambda m, x: x.topk(5, 1, largest=False).values, Frozen(STEM), after=5),
    along_channels("topk_positions", lambda m, x: x[:, x.mean((0, 2, 3)).topk(5).indices], Frozen(STEM), after=5),
    along_channels(
        "topk_counted", lambda m, x: x * x.mean((2, 3)).topk(3).indices.float().histc(8, 0, 7).sum(), NotNeutral(STEM)
    ),
    along_channels("index", lambda m, x: x[:, [3, 1, 0, 2, 7, 5, 6, 4]], Frozen(STEM)),
    along_channels("every_second", lambda m, x: x[:, ::2], NotNeutral(STEM, 8), after=4),
    along_channels("pick_one", lambda m, x: x * x[:, 2:3], NotNeutral(STEM, 8)),
    along_channels("pick_some", lambda m, x: x[:, 3:5].amax(1, keepdim=True) + x),
    along_channels(
        "returned_slice",
        lambda m, x: x,
        NotNeutral(STEM, 8),
        wire_whole=lambda m, x: (m.head(m.last(h := m.norm(m.stem(x))).mean((2, 3))), h[:, 3:5]),
    ),
    along_channels("overlap", lambda m, x: torch.cat([x[:, :6], x[:, 4:]], 1), NotNeutral(STEM, 8), after=10),
    along_channels("differences", lambda m, x: x[:, 1:] - x[:, :-1], Frozen(STEM), after=7),
    along_channels("padded", lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)), after=11),
    along_channels(
        "arange",
        lambda m, x: x + torch.arange(x.shape[1])[None, :, None, None],
        Frozen(STEM),
    ),
    along_channels(
        "random_buffer",
        lambda m, x: x * torch.linspace(0, 1, x.shape[1])[None, :, None, None],
        Frozen(STEM),
    ),
    along_channels("size_constant", lambda m, x: x / x.shape[1] ** 0.5, NotNeutral(STEM)),
    along_channels("size_in_a_tensor", lambda m, x: x / torch.tensor(float(x.shape[1])).sqrt(), Frozen(STEM)),
    along_channels("size_branch", _by_size, branches=True),
)
