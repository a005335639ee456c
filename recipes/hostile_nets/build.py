"""What families of networks are made with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from hostile_nets.masking import read

UP, DOWN = "up.weight:0", "down.weight:1"


class Net(nn.Module):
    """A network of parts and a function that runs them."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.run, self.front = run, None
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the function makes of it."""
        if self.front is not None:
            args = (self.front(args[0]), *args[1:])
        return self.run(self, *args, **kwargs)


class Front(nn.Module):
    """An ordinary block in front of an unusual network, so that there is something to cut in any case."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 9), nn.Linear(9, size)

    def forward(self, x: Tensor) -> Tensor:
        """``x + down(relu(up(x)))``."""
        return x + self.down(read(self.up(x).relu(), -1, "front.up.weight:0"))


@dataclass
class Built:
    """A network and what it is called with."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


Family = Callable[[Random], Built]


def families(module: ModuleType) -> dict[str, Family]:
    """The functions of a module that build a network, by name."""
    own = {name: f for name, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
    return {name: f for name, f in own.items() if getattr(f, "__annotations__", {}).get("return") is Built}


def width(random: Random) -> int:
    """A number of units."""
    return random.randint(6, 12)


def vectors(random: Random, size: int = 5) -> Tensor:
    """A batch of vectors."""
    return torch.randn(random.choice((2, 3)), size)


def perceptron(run: Callable[..., Any], random: Random, n: int, **parts: Any) -> Built:
    """A network that maps vectors, with layers ``up`` (5 → n) and ``down`` (n → 3) unless ``parts`` has others."""
    layers = {"up": nn.Linear(5, n), "down": nn.Linear(n, 3), **parts}
    return Built(Net(run, **layers), (vectors(random),))


def middle(
    between: Callable[[Any, Tensor], Tensor],
    random: Random,
    n: int | None = None,
    out: int | None = None,
    places: str = UP,
    **parts: Any,
) -> Built:
    """``down(between(up(x)))``: 5 → n → 3, with anything in between.

    Args:
        between: What is done to the hidden units, entry by entry or otherwise.
        random: Of the widths.
        n: How many hidden units there are.
        out: How many it makes of them.
        places: Whose units ``down`` reads; empty if ``between`` says that itself.
        parts: More parts of the network.
    """
    n = n or width(random)

    def run(m: Any, x: Tensor) -> Tensor:
        h = between(m, m.up(x))
        return m.down(read(h, -1, places) if places else h)

    return perceptron(run, random, n, down=nn.Linear(out or n, 3), **parts)


def idle_parts(built: Built, answer: Callable[[Built], Any]) -> list[str]:
    """The parts that a variant of a network does not use: tracing would rather freeze what they might read.

    Args:
        built: The network; it loses them.
        answer: Runs it.
    """
    idle: list[str] = []
    parts = vars(built.model)
    for held in (parts["_modules"], parts["_parameters"]) if type(built.model) is Net else ():
        for name, part in list(held.items()):
            del held[name]
            try:
                answer(built)
                idle.append(name)
            except Exception:
                held[name] = part
    return idle


def randomise(model: nn.Module) -> nn.Module:
    """Random numbers everywhere, so that no wrong cut hides behind a 0 or a 1."""
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.is_leaf:
                tensor.copy_(torch.randn(tensor.shape) * 0.5 + 0.1)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and not name.endswith(("fixed", "mask", "_u", "_v")):
                buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return model
