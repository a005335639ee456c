"""The block cut: where repeated modules of a recorded graph meet."""

import pytest
import torch
from torch import Tensor, nn

from regrow.tracing.capture import capture, complete_example
from regrow.tracing.readings import GraphBlock, divide_into_blocks
from regrow.tracing.steps import list_operations
from zoo import trace_zoo

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31}


class Residual(nn.Module):
    """``x + down(relu(up(x)))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what two layers make of the input to it."""
        return x + self.down(self.up(x).relu())


class Convolutions(nn.Module):
    """``down(relu(up(x)))``, a pointwise convolution and one of 3 × 3."""

    def __init__(self, width: int, **settings: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(8, width, 1), nn.Conv2d(width, 8, 3, **{"padding": 1, **settings})

    def forward(self, x: Tensor) -> Tensor:
        """Run both."""
        return self.down(self.up(x).relu())


def cut(model: nn.Module, *args: Tensor) -> tuple[GraphBlock, ...]:
    """The blocks of a model."""
    return divide_into_blocks(capture(model.eval(), complete_example(model, args, {})))


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "vit", "convnext", "resnet18", "gru_handed_on", "mamba"])
def test_every_operation_is_in_one_block_and_seams_fit(name: str) -> None:
    _, axes = trace_zoo(name)
    recorded = axes.recording.capture
    found = divide_into_blocks(recorded)
    steps = axes.steps
    assert [block.start for block in found] == [0, *(block.stop for block in found[:-1])]
    assert found[-1].stop == len(steps) == len(list_operations(recorded))
    for i, block in enumerate(found):
        read = {one for step in steps[block.start : block.stop] for one in step.operands}
        before = {one for one in read if isinstance(one, int) and one < block.start}
        assert before == {one for one in block.inputs if isinstance(one, int)}
        assert before <= {one for other in found[:i] for one in other.outputs}
        assert set(block.states) == read & set(axes.shapes)


def test_blocks_of_any_width_are_of_one_kind_and_blocks_of_other_operations_are_not() -> None:
    net = nn.Sequential(nn.Linear(4, 8), *(Residual(8, n) for n in (6, 6, 5)), nn.Linear(8, 2), nn.Sigmoid())
    found = cut(net, torch.ones(2, 4))
    assert [block.path for block in found] == ["", "1", "2", "3", ""]
    kinds = [block.block_class for block in found]
    assert kinds[1] == kinds[2] == kinds[3] and len({kinds[0], kinds[1], kinds[4]}) == 3


@pytest.mark.parametrize("other", [{"groups": 8}, {"stride": 2}, {"dilation": 2, "padding": 2}])
def test_a_convolution_with_other_groups_or_steps_makes_another_kind(other: dict[str, int]) -> None:
    net = nn.Sequential(Convolutions(8), Convolutions(16), Convolutions(8, **other), Convolutions(16))
    kinds = [block.block_class for block in cut(net, torch.ones(2, 8, 8, 8))]
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]


def test_a_network_without_repeated_modules_is_one_block() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Residual(8, 6), nn.Linear(8, 2))
    (one,) = cut(net, torch.ones(2, 4))
    assert (one.path, one.start, one.inputs, one.outputs) == ("", 0, ("input 0",), ())


def test_modules_beside_each_other_in_a_block_are_no_blocks() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Residual(8, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return x + sum(one(x) for one in self.experts)

    net = nn.Sequential(*(Experts() for _ in range(3)), nn.Linear(8, 2))
    assert [block.path for block in cut(net, torch.ones(2, 8))] == ["0", "1", "2", ""]


def test_blocks_inside_repeated_stages_are_the_blocks() -> None:
    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Residual(8, width) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for one in self.layers:
                x = one(x)
            return x.relu()

    net = nn.Sequential(Stage(5), Stage(7), nn.Linear(8, 2))
    paths = [block.path for block in cut(net, torch.ones(2, 8)) if block.path]
    assert paths == ["0.layers.0", "0.layers.1", "1.layers.0", "1.layers.1"]


def test_a_model_without_numbers_has_the_same_blocks() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=3, **SMALL)
    ids = torch.arange(5)[None]
    real = cut(LlamaForCausalLM(config), ids)
    with torch.device("meta"):
        hollow = LlamaForCausalLM(config)
    assert cut(hollow, ids.to("meta")) == real
    assert [block.path for block in real] == ["", *(f"model.layers.{i}" for i in range(3)), ""]
