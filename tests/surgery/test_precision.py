"""What stands for torch's operations in float64 computes what they compute."""

import pytest
import torch

from regrow.tracing.own_run import compute_grouped_product


@pytest.mark.parametrize("ends", [(3, 8), (0, 8)])
def test_a_grouped_product_of_experts_is_torchs(ends: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    one, other, offs = torch.randn(8, 16), torch.randn(2, 16, 8), torch.tensor(ends, dtype=torch.int32)
    expected = torch.nn.functional.grouped_mm(one, other, offs=offs)
    torch.testing.assert_close(compute_grouped_product(one.double(), other.double(), offs).float(), expected)


def test_a_grouped_product_refuses_a_bias_as_torch_does() -> None:
    """A bias that were left out silently would be left out on both sides of the proof."""
    x, weight, offs = torch.randn(4, 8), torch.randn(1, 8, 8), torch.tensor([4], dtype=torch.int32)
    for function in (compute_grouped_product, torch.nn.functional.grouped_mm):
        with pytest.raises(RuntimeError, match=r"[Bb]ias"):
            function(x, weight, offs=offs, bias=torch.zeros(8))
