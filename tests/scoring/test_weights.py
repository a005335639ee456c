"""Column norms are the same bit for bit in parts."""

import pytest
import torch

from regrow.scoring.weights import PART, column_norms


@pytest.mark.parametrize("form", ["square", "norm", "mean"])
@pytest.mark.parametrize("shape", [(700, 1100), (1025, 513), (3, 100_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_parts_are_those_of_the_whole_matrix(form, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert weight.numel() > PART
    wide = weight.double()
    square = wide.square().sum(0)
    expected = {"square": square, "norm": square.sqrt(), "mean": wide.abs().mean(0)}[form]
    assert torch.equal(column_norms(weight, 1, form=form), expected)
