"""A network of the zoo: its record, the wiring, its random weights, its example input."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zoo.facts import Fact


@dataclass(frozen=True)
class Net:
    """One network of the zoo.

    Args:
        name: How tests call it.
        build: Makes it, in eval mode, the same each time.
        example: What it is called with.
        expect: What tracing must find.
        zeros: Where a zero stands for a missing unit: at the weights that read it, unless sums or products of
            activations read it too. Then only a zero at its producers reaches all of them, and only if no function in
            between makes something of nothing.
        branches: Whether its Python looks at sizes, so that a plan may be refused when it is applied.
        heavy: Whether it takes seconds rather than milliseconds.
        relative: The name of a small network of the same build, on which the laws that take longest are checked.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    expect: tuple[Fact, ...] = ()
    zeros: Literal["consumers", "producers", "nowhere"] = "consumers"
    branches: bool = False
    heavy: bool = False
    relative: str = ""


class Wired(nn.Module):
    """A module made of named parts and a function that wires them."""

    def __init__(self, wire: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.wire = wire
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        """Run the wiring."""
        return self.wire(self, *inputs)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and running statistic a value that is not special, and switch to eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like.dtype)

    norms = ("Norm", "RMS")
    owner = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = name.endswith(("weight", "layer_scale", "gamma")) and max(parameter.shape) == parameter.numel()
            if gain and (parameter.dim() == 1 or "scale" in name):
                start = 0.0 if "Gemma" in type(owner[id(parameter)]).__name__ else 1.0
                parameter.copy_(start + 0.3 * normal(parameter))
            elif parameter.dim() < 2 or any(part in type(owner[id(parameter)]).__name__ for part in norms):
                parameter.copy_(0.3 * normal(parameter))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(normal(parameter) * (1.5 / fan_in) ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * normal(buffer))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return model.eval()


def images(channels: int, height: int, width: int = 0, batch: int = 2) -> Callable[[], tuple[tuple, dict]]:
    """An example of random pictures."""
    return _random((batch, channels, height, width or height))


def vectors(*shape: int) -> Callable[[], tuple[tuple, dict]]:
    """An example of random numbers."""
    return _random(shape)


def tokens(vocabulary: int, *shape: int, name: str = "") -> Callable[[], tuple[tuple, dict]]:
    """An example of random token numbers, positional or by name."""

    def example() -> tuple[tuple, dict]:
        ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(5))
        return ((), {name: ids}) if name else ((ids,), {})

    return example


def _random(shape: tuple[int, ...]) -> Callable[[], tuple[tuple, dict]]:
    return lambda: ((torch.randn(shape, generator=torch.Generator().manual_seed(5)),), {})


def network(
    name: str,
    wire: Callable[..., Any],
    parts: Callable[[], dict[str, Any]],
    example: Callable[[], tuple[tuple, dict]],
    *expect: Fact,
    tie: Callable[[nn.Module], None] = lambda model: None,
    seed: int = 0,
    **more: Any,
) -> Net:
    """A hand-made net of the zoo."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Wired(wire, **parts())
        tie(model)
        return randomise(model, seed)

    return Net(name, build, example, expect, **more)


def conv(inputs: int, outputs: int, kernel: int = 3, **more: Any) -> nn.Conv2d:
    """A convolution that keeps the picture's size."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **more)
