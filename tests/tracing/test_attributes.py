"""Integers that restate a dimension follow a cut; others of the same names stay."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow.tracing.attributes import set_attribute


class InOut(nn.Module):
    """A linear layer whose weight is stored (in, out)."""

    def __init__(self, before: int, after: int) -> None:
        """Draw it."""
        super().__init__()
        self.in_features, self.out_features = before, after
        self.weight, self.bias = nn.Parameter(torch.randn(before, after)), nn.Parameter(torch.randn(after))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x @ self.weight + self.bias


class Labelled(nn.Linear):
    """A linear layer that shows its first ``num_features`` outputs when it is asked for a short answer."""

    def __init__(self, before: int, after: int) -> None:
        """State numbers that are of no dimension."""
        super().__init__(before, after)
        self.num_features, self.num_embeddings, self.normalized_shape = 2, 99, (1, 2)

    def forward(self, x: Tensor, short: bool = False) -> Tensor:
        """Multiply."""
        y = super().forward(x)
        return y[:, : self.num_features] if short else y


def cut(model: nn.Module, width: int) -> nn.Module:
    """Two units fewer in the only axis."""
    axes = regrow.trace(model, torch.randn(2, width))
    (axis,) = axes.free()
    return regrow.apply(model, axes, regrow.Plan.keeping(axes, {axis.key: range(axis.size - 2)}))[0]


@pytest.mark.parametrize("width", [4, 8])
def test_a_layer_stored_input_by_output_states_its_new_sizes(width: int) -> None:
    """The two sizes say which is which; where they are equal, the bias does."""
    model = cut(nn.Sequential(InOut(width, 8), nn.ReLU(), InOut(8, 3)), width)
    assert [(m.in_features, m.out_features) for m in (model[0], model[2])] == [(width, 6), (6, 3)]


def test_a_number_of_another_value_is_no_size() -> None:
    """It stays, and what reads it in a call that was not traced does what it did."""
    model = cut(nn.Sequential(Labelled(4, 8), nn.ReLU(), Labelled(8, 3)), 4)
    for layer in (model[0], model[2]):
        assert (layer.num_features, layer.num_embeddings, layer.normalized_shape) == (2, 99, (1, 2))
    assert (model[0].out_features, model[2].in_features) == (6, 6)
    assert model[2](torch.randn(2, 6), short=True).shape == (2, 2)


def test_a_configuration_that_layers_share_is_copied_before_it_changes() -> None:
    config = SimpleNamespace(num_heads=4)
    first, second = nn.Module(), nn.Module()
    first.config = second.config = config
    set_attribute(first, "config.num_heads", 3)
    assert (first.config.num_heads, second.config.num_heads, config.num_heads) == (3, 4, 4)
