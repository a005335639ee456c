"""Column norms are the same bit for bit in parts, and computed once for several scores."""

import pytest
import torch

from regrow.scoring.weights import PART, CachedColumns, columns


@pytest.mark.parametrize("form", ["square", "norm", "mean"])
@pytest.mark.parametrize("shape", [(700, 1100), (1025, 513), (3, 100_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_parts_are_those_of_the_whole_matrix(form, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert weight.numel() > PART
    wide = weight.double()
    square = wide.square().sum(0)
    expected = {"square": square, "norm": square.sqrt(), "mean": wide.abs().mean(0)}[form]
    assert torch.equal(columns(weight, 1, form=form), expected)


def test_each_weight_is_asked_for_once():
    asked = []

    class Weights(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    weight = torch.randn(3, 4)
    cached = CachedColumns(Weights(a=weight))
    for _ in range(2):
        assert torch.equal(cached.columns("a", 1), columns(weight, 1))
    assert asked == ["a"]
