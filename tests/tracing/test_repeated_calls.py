"""Copied calls of repeated modules: the recording of every module run, and fewer runs where that is safe."""

import random
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from regrow.core.axes import Example
from regrow.core.axes.operations import Tracer
from regrow.tracing import trace
from regrow.tracing.capture import Capture, capture

LOG: list[int] = []
RUNS = count()
"""Runs of blocks; networks and the tracer do not see that it changes."""


class Block(nn.Module):
    """A residual block that counts its runs."""

    def __init__(self, number: int, width: int = 12) -> None:
        super().__init__()
        self.layer_idx = number
        self.wide, self.narrow = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        next(RUNS)
        return x + self.narrow(self.extra(torch.relu(self.wide(x.to(torch.float32)))))

    def extra(self, x: Tensor) -> Tensor:
        return x


class Numbered(Block):
    def extra(self, x: Tensor) -> Tensor:
        return x / (self.layer_idx + 1)


class Second(Block):
    def extra(self, x: Tensor) -> Tensor:
        return x.sigmoid() if self.layer_idx == 2 else x


class Appending(Block):
    def extra(self, x: Tensor) -> Tensor:
        LOG.append(1)
        return x * len(LOG)


class Storing(Block):
    def extra(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class WrittenOver(Block):
    def extra(self, x: Tensor) -> Tensor:
        self.wide.weight.data.mul_(2)
        return x


class Counting(Block):
    def extra(self, x: Tensor) -> Tensor:
        self.layer_idx += 10
        return x * self.layer_idx


class Constant(Block):
    def extra(self, x: Tensor) -> Tensor:
        return x * torch.tensor(0.5)


class Labelled(Second):
    """Blocks numbered by what is not an ``int``, or is one in some."""

    def extra(self, x: Tensor) -> Tensor:
        return x.sigmoid() if self.layer_idx in ("last", 2) else x.tanh() if self.layer_idx is None else x


class Missing(Block):
    """Blocks of which some have no number."""

    def __init__(self, number: int, width: int = 12) -> None:
        super().__init__(number, width)
        if number % 2:
            del self.layer_idx

    def extra(self, x: Tensor) -> Tensor:
        return x.sigmoid() if hasattr(self, "layer_idx") else x


class Defaulting(Second):
    layer_idx = 0


class Assigned(Second):
    """Blocks that get their number from the network while it runs."""


class Dropping(Block):
    """Stochastic depth with Python's generator."""

    def draw(self) -> float:
        return random.random()

    def extra(self, x: Tensor) -> Tensor:
        return x if self.draw() < 0.5 else x.sigmoid()


class DroppingNumpy(Dropping):
    def draw(self) -> float:
        return float(np.random.random())


class DroppingOwn(Dropping):
    generator = random.Random(1)

    def __init__(self, number: int, width: int = 12) -> None:
        super().__init__(number, width)
        self.own = self.generator

    def draw(self) -> float:
        return self.own.random()


class Net(nn.Module):
    def __init__(self, kind: type[Block], widths: tuple[int, ...] = (12,) * 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(kind(i, width) for i, width in enumerate(widths))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            if isinstance(block, Assigned):
                block.layer_idx = i
            x = block(x)
        return self.head(x)


def text(recorded: Capture) -> list[tuple[str, ...]]:
    """Every operation with its operands and modules."""
    return [
        (node.name, str(node.target), str(node.args), str(node.kwargs), str([*node.meta.get("nn_module_stack", {})]))
        for node in recorded.graph.nodes
    ]


@pytest.mark.parametrize(
    ("kind", "runs"),
    [(Block, 1), (Numbered, 5), (Second, 5), (Appending, 5), (Storing, 10), (WrittenOver, 1), (Constant, 5)],
)
def test_the_recording_is_that_of_every_block_run(kind: type[Block], runs: int) -> None:
    net, example = Net(kind), Example((torch.ones(1, 6),))
    whole = capture(net, example, tracer=Tracer.PLAIN)
    start = next(RUNS)
    copied = capture(net, example)
    assert text(copied) == text(whole)
    assert next(RUNS) - start - 1 == runs
    assert {module.layer_idx for module in net.blocks} == set(range(5))


def test_blocks_of_other_shapes_run_once_per_shape() -> None:
    net, example = Net(Block, (12, 8, 12, 8, 12, 12)), Example((torch.ones(1, 6),))
    whole = capture(net, example, tracer=Tracer.PLAIN)
    start = next(RUNS)
    assert text(capture(net, example)) == text(whole)
    assert next(RUNS) - start - 1 == 2


def test_trial_cuts_run_as_many_blocks_in_a_network_of_twice_the_depth() -> None:
    runs = []
    for depth in (6, 12):
        net = Net(Block, (12,) * depth)
        start = next(RUNS)
        trace(net, torch.ones(1, 6))
        runs.append(next(RUNS) - start - 1 - depth)  # the network's own forward pass runs each
    assert runs[0] == runs[1]


def test_hooks_of_a_block_run() -> None:
    net, seen = Net(Block), []
    net.blocks[3].register_forward_hook(lambda module, given, result: seen.append(1) or result * 2)
    whole = capture(net, Example((torch.ones(1, 6),)), tracer=Tracer.PLAIN)
    assert text(capture(net, Example((torch.ones(1, 6),)))) == text(whole)


def test_tied_blocks_and_shared_operands_are_kept_apart() -> None:
    net = Net(Block)
    net.blocks[4].wide.weight = net.blocks[1].wide.weight
    net.blocks[3] = net.blocks[0]
    whole = capture(net, Example((torch.ones(1, 6),)), tracer=Tracer.PLAIN)
    assert text(capture(net, Example((torch.ones(1, 6),)))) == text(whole)


@pytest.mark.parametrize("labels", [np.arange(5), ["first", "a", "b", "c", "last"], [0, None, 1, None, 2]])
def test_blocks_that_decide_by_another_label_run_each_by_themselves(labels: Any) -> None:
    net, example = Net(Labelled), Example((torch.ones(1, 6),))
    for block, label in zip(net.blocks, labels, strict=True):
        block.layer_idx = label
    whole = capture(net, example, tracer=Tracer.PLAIN)
    assert text(capture(net, example)) == text(whole)
    assert [block.layer_idx for block in net.blocks] == [*labels]


@pytest.mark.parametrize("kind", [Missing, Defaulting, Assigned])
def test_blocks_whose_number_comes_from_elsewhere_run_each_by_themselves(kind: type[Block]) -> None:
    net, example = Net(kind), Example((torch.ones(1, 6),))
    whole = capture(net, example, tracer=Tracer.PLAIN)
    assert text(capture(net, example)) == text(whole)


@pytest.mark.parametrize("kind", [Dropping, DroppingNumpy, DroppingOwn])
def test_blocks_that_draw_random_numbers_draw_each_by_themselves(kind: type[Dropping]) -> None:
    recordings = []
    for tracer in (Tracer.PLAIN, Tracer.RECORD):
        random.seed(3)
        np.random.seed(3)
        DroppingOwn.generator.seed(3)
        recordings.append(text(capture(Net(kind), Example((torch.ones(1, 6),)), tracer=tracer)))
    assert recordings[0] == recordings[1]
    assert 0 < sum("sigmoid" in str(row) for row in recordings[0]) < 10


def test_a_block_runs_again_once_what_its_functions_read_has_changed() -> None:
    """The network counts in a variable of a function that all blocks call: no attribute of a block shows it."""
    seen = {"blocks": 0}

    class Scaled(Block):
        def extra(self, x: Tensor) -> Tensor:
            return self.scale(x)

    def scale(x: Tensor) -> Tensor:
        return x * seen["blocks"]

    class Counting(Net):
        def forward(self, x: Tensor) -> Tensor:
            for i, block in enumerate(self.blocks):
                seen["blocks"] = i + 1
                x = block(x)
            return self.head(x)

    net, example = Counting(Scaled), Example((torch.ones(1, 6),))
    for block in net.blocks:
        block.scale = scale
    whole = capture(net, example, tracer=Tracer.PLAIN)
    assert text(capture(net, example)) == text(whole)
