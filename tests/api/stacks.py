"""Ways in which networks use a stack of residual blocks: some allow further blocks that change nothing, most do not."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, DEPTH = 8, 4


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Add to the input, ``[..., width]``."""
        return x + self.down(scale * self.up(x).relu())


class Counting(nn.Module):
    """A residual block with a random shift in the branch, as of a noise layer that is never off."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the input, ``[..., width]``."""
        return x + self.down(nn.functional.dropout(self.up(x), 0.5, training=True))


class Stacked(nn.Module):
    """A network of one stack, whose use is a function."""

    use: Callable[[Any, Tensor], Any]

    def __init__(self, block: type[nn.Module] = Block, depth: int = DEPTH) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(block() for _ in range(depth)), nn.Linear(WIDTH, 3)
        self.mix = nn.Parameter(torch.linspace(0.5, 1.5, depth))
        self.depth, self.calls = depth, 0
        self.config = SimpleNamespace(num_layers=depth)

    def forward(self, x: Tensor) -> Any:
        """Run the stack."""
        return type(self).use(self, x)


def _states(net: Any, x: Tensor) -> list[Tensor]:
    states = [x]
    for block in net.blocks:
        states.append(block(states[-1]))
    return states


def _last(net: Any, x: Tensor) -> Tensor:
    return _states(net, x)[-1]


def plain(net: Any, x: Tensor) -> Tensor:  # the uses that allow more blocks
    return net.head(_last(net, x))


def indexed(net: Any, x: Tensor) -> Tensor:
    for i in range(len(net.blocks)):
        x = net.blocks[i](x)
    return net.head(x)


def with_features(net: Any, x: Tensor) -> Tensor:
    states = _states(net, x)
    return net.head(states[-1] + states[0])


def as_dict(net: Any, x: Tensor) -> dict[str, Tensor]:
    return {"logits": net.head(_last(net, x))}


def first_and_last(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    states = _states(net, x)
    return states[0] * 2, net.head(states[-1])


def cached(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return net.head(_last(net, x))


def by_length(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x)) / len(x)


def largest(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.stack(_states(net, x)).amax(0))  # a state that occurs twice is no larger


def noisy(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x) + torch.rand(WIDTH))


def out_indices(net: Any, x: Tensor) -> Tensor:  # the uses that do not
    return torch.cat([state for i, state in enumerate(_states(net, x)[1:]) if i in (1, 3)], -1)


def unet(net: Any, x: Tensor) -> Tensor:
    skips, half = [], len(net.blocks) // 2
    for block in net.blocks[:half]:
        x = block(x)
        skips.append(x)
    for block in net.blocks[half:]:
        x = block(x + skips.pop())
    return net.head(x)


def mean(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.stack(_states(net, x)).mean(0))


def total(net: Any, x: Tensor) -> Tensor:
    return net.head(sum(_states(net, x)))


def dense(net: Any, x: Tensor) -> Tensor:
    states = [x]
    for block in net.blocks:
        states.append(block(sum(states)))
    return net.head(states[-1])


def scaled(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x) / len(net.blocks) ** 0.5)


def slightly_scaled(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x)) * (1 + 1e-4 * len(net.blocks))


def factor_of_index(net: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x, 1 / (i + 1))
    return net.head(x)


def stochastic_depth(net: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x, 1 - 0.2 * i / (len(net.blocks) - 1))
    return net.head(x)


def decayed(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = 0.9 * block(x)
    return net.head(x)


def shifted(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x) + 0.1
    return net.head(x)


def activated(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x).sin()
    return net.head(x)


def normed(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = nn.functional.layer_norm(block(x), (WIDTH,)) * 0.7
    return net.head(x)


def mixed(net: Any, x: Tensor) -> Tensor:
    states = _states(net, x)[1:]
    return net.head(sum(w * s for w, s in zip(net.mix, states, strict=False)))


def mixed_strictly(net: Any, x: Tensor) -> Tensor:
    states = _states(net, x)[1:]
    return net.head(sum(w * s for w, s in zip(net.mix, states, strict=True)))


def by_parity(net: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x) if i % 2 else block(x.flip(-1)).flip(-1)
    return net.head(x)


def flipping(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks:
        x = block(x).flip(-1)
    return net.head(x)


def exit_early(net: Any, x: Tensor) -> Tensor:
    return net.head(_states(net, x)[2])


def fixed_count(net: Any, x: Tensor) -> Tensor:
    for i in range(DEPTH):
        x = net.blocks[i](x)
    return net.head(x)


def stored_count(net: Any, x: Tensor) -> Tensor:
    for i in range(net.depth):
        x = net.blocks[i](x)
    return net.head(x)


def from_config(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x)) * net.config.num_layers


def second_to_last(net: Any, x: Tensor) -> Tensor:
    return net.head(_states(net, x)[-2])


def penultimate_by_number(net: Any, x: Tensor) -> Tensor:
    return net.head(_states(net, x)[3])


def all_states(net: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    states = _states(net, x)
    return net.head(states[-1]), states


def stacked_states(net: Any, x: Tensor) -> Tensor:
    return torch.stack(_states(net, x))


def counted(net: Any, x: Tensor) -> dict[str, Any]:
    return {"logits": net.head(_last(net, x)), "blocks": len(net.blocks)}


def integers(net: Any, x: Tensor) -> Tensor:
    return torch.cat([state.argmax(-1) for state in _states(net, x)[2:4]])


def half(net: Any, x: Tensor) -> Tensor:
    for block in net.blocks[: len(net.blocks) // 2]:
        x = block(x)
    return net.head(x)


def branches(net: Any, x: Tensor) -> Tensor:
    return net.head(sum(block(x) for block in net.blocks))


def differences(net: Any, x: Tensor) -> Tensor:
    states = _states(net, x)
    return net.head(sum((b - a).abs() for a, b in pairwise(states)) + len(states) * 0.01)


def highway(net: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(net.blocks):
        x = block(x)
        if i == len(net.blocks) - 2:
            x = x.tanh()
    return net.head(x)


def hook_count(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x)) + sum(1 for _ in net.modules()) * 0.01


def by_parameters(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x)) / sum(p.numel() for p in net.parameters())


def batch_at_most(net: Any, x: Tensor) -> Tensor:
    y = net.head(_last(net, x))
    return y if len(x) != 1 or len(net.blocks) == DEPTH else -y


def every_other(net: Any, x: Tensor) -> Tensor:
    states = _states(net, x)
    return net.head(torch.cat(states[1::2]).sum(0, keepdim=True))


def attention_over_depth(net: Any, x: Tensor) -> Tensor:
    states = torch.stack(_states(net, x), -2)
    return net.head(((states @ x[..., None]).softmax(-2) * states).sum(-2))


def reversible(net: Any, x: Tensor) -> Tensor:
    a, b = x, x.flip(-1)
    for block in net.blocks:
        a, b = b, block(a)
    return net.head(a)


def momentum(net: Any, x: Tensor) -> Tensor:
    speed = torch.zeros_like(x)
    for block in net.blocks:
        speed = 0.9 * speed + block(x) - x
        x = x + speed
    return net.head(x)


def as_object(net: Any, x: Tensor) -> SimpleNamespace:
    return SimpleNamespace(logits=net.head(_last(net, x)) / len(net.blocks))


def random_block(net: Any, x: Tensor) -> Tensor:
    return net.head(_last(net, x))


def masked(net: Any, x: Tensor) -> Tensor:
    y = net.head(_last(net, x) / len(net.blocks))
    return y.masked_fill(torch.arange(3) == 2, torch.finfo(y.dtype).min)


FINE = (plain, indexed, with_features, as_dict, first_and_last, cached, by_length, largest, noisy)
UNFIT = (
    *(out_indices, unet, mean, total, dense, scaled, slightly_scaled, factor_of_index, stochastic_depth, decayed),
    *(shifted, activated, normed, mixed, mixed_strictly, by_parity, flipping, exit_early, fixed_count, stored_count),
    *(from_config, second_to_last, penultimate_by_number, all_states, stacked_states, counted, integers, half),
    *(branches, differences, highway, hook_count, by_parameters, batch_at_most, every_other, attention_over_depth),
    *(reversible, momentum, as_object, random_block, masked),
)


@dataclass(frozen=True)
class Stack:
    """A network with a stack, and whether more blocks may leave its outputs as they are."""

    name: str
    fits: bool
    build: Callable[[], nn.Module]


def _stack(use: Callable[[Any, Tensor], Any], fits: bool) -> Stack:
    kind = type(use.__name__.title().replace("_", ""), (Stacked,), {"use": use})

    def build() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = kind(Counting if use is random_block else Block)
        return made

    return Stack(use.__name__, fits, build)


STACKS = (*(_stack(use, True) for use in FINE), *(_stack(use, False) for use in UNFIT))
