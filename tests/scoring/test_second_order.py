"""Optimal Brain Surgeon for units: the order and the costs are those of refitting after every removal."""

import copy

import pytest
import torch
from torch import Tensor, nn

from hand import lm
from regrow.core.sources import Batch
from regrow.methods.pruning.obs import Settings, eliminate
from regrow.scoring.grams import Gram, sum_products


def refit_each(gram: Tensor, weight: Tensor, channels: Tensor, ridge: float) -> tuple[list[int], list[float]]:
    """Remove the unit whose removal adds the least error after a refit, by solving for each."""
    hessian = gram.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().mul_(1 + ridge).add_(1e-9 * mean)

    def error(units: list[int]) -> float:
        where, full = channels[units].flatten(), torch.zeros_like(weight)
        if len(where):
            full[:, where] = torch.linalg.solve(hessian[where][:, where], hessian[where] @ weight.T).T
        return float(((weight - full) @ hessian @ (weight - full).T).trace())

    alive, order, losses, last = list(range(len(channels))), [], [], 0.0
    while alive:
        errors = [error([one for one in alive if one != unit]) for unit in alive]
        costs = [one - last for one in errors]
        best = min(range(len(costs)), key=costs.__getitem__)
        order.append(alive.pop(best))
        losses.append(costs[best])
        last = errors[best]
    return order, losses


@pytest.mark.parametrize("width", [1, 3])
def test_the_order_is_that_of_refitting_after_every_removal(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(60, 24, generator=generator, dtype=torch.float64)
    x[:, 3] = x[:, 5]
    x = x + 0.3 * x @ torch.randn(24, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    channels = torch.randperm(24, generator=generator).view(-1, width)
    order, losses = refit_each(x.T @ x, weight, channels, 0.01)
    result = eliminate(x.T @ x, weight, channels, 0.01)
    assert result.order.tolist() == order
    assert torch.allclose(result.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-6)
    assert result.scores().argsort().tolist() == order, "also where a later removal adds less"


@pytest.mark.parametrize("ridge", [1e-6, Settings().ridge])
def test_one_of_two_duplicates_and_both_of_a_cancelling_pair_go_first(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, generator=generator, dtype=torch.float64)
    x[:, 1], x[:, 3] = x[:, 0], 2 * x[:, 3]
    x[:, 2] = x[:, 3]
    weight = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    weight[:, 3] = -weight[:, 2]
    order = eliminate(x.T @ x, weight, torch.arange(40)[:, None], ridge).order.tolist()
    assert {2, 3} <= set(order[:3]) and len({0, 1} & set(order[:3])) == 1


def test_a_unit_that_is_never_active_goes_first_whatever_reads_it() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[:, 2], weight = 0, torch.ones(3, 6, dtype=torch.float64)
    weight[:, 2] = 1000
    assert eliminate(x.T @ x, weight, torch.arange(6)[:, None], 0.1).order[0] == 2


def test_inputs_that_do_not_vary_are_refused() -> None:
    with pytest.raises(ValueError, match="none of them varies"):
        eliminate(torch.zeros(2, 2), torch.ones(1, 2), torch.tensor([[0], [1]]), 0.1)


def test_sums_of_products_are_those_of_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(7, 3)
    batches = [Batch((x[:4],)), Batch((x[4:],))]
    monkeypatch.setattr("regrow.scoring.grams.MAX_SUM_BYTES", 8 * 25)  # a pass for each layer
    sums: dict[str, Gram] = {}
    sum_products(net, {"2.weight": 5, "4.weight": 4}, batches, sums.__setitem__)
    inside = net[:2](x).double()
    assert torch.allclose(
        copy.deepcopy(sums["2.weight"]).mean_products(centre=False), inside.T @ inside / 7, rtol=1e-5, atol=1e-6
    )
    centred = inside - inside.mean(0)
    assert torch.allclose(sums["2.weight"].mean_products(centre=True), centred.T @ centred / 7, rtol=1e-5, atol=1e-6)
    assert sums["4.weight"].rows == 7 and net.training


def test_padding_is_not_summed() -> None:
    model, _ = lm()
    ids = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    name = "decoder.blocks.0.o.weight"
    width = {name: model.get_parameter(name).shape[1]}
    sums: list[Gram] = []
    for batches in ([Batch((ids,), {"attention_mask": mask})], [Batch((ids[:1],)), Batch((ids[1:, :4],))]):
        sum_products(model, width, batches, lambda _, gram: sums.append(gram))
    assert [one.rows for one in sums] == [10, 10]
    assert torch.allclose(*(one.mean_products(centre=True) for one in sums), rtol=1e-4, atol=1e-6)


def test_inputs_that_hardly_vary_beside_their_mean_are_summed_exactly() -> None:
    """In float32, Σ x² − (Σ x)² / n would be noise."""
    generator = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(500, 40, generator=generator)
    gram = Gram.empty(40, torch.device("cpu"))
    for part in x.split(100):
        gram.add(part)
    centred = (x - x.double().mean(0)).double()
    found = gram.mean_products(centre=True)
    assert torch.allclose(found, centred.T @ centred / 500, rtol=1e-4, atol=1e-4)
    assert len(eliminate(found, torch.ones(2, 40), torch.arange(40)[:, None], 1e-3).order) == 40


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_given_is_not_changed(group: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    gram, weight = x.T @ x, torch.randn(6, 1, generator=generator, dtype=torch.float64)
    given = weight.T if transposed else weight.reshape(1, 6)
    before = gram.clone(), weight.clone()
    eliminate(gram, given, torch.arange(6).reshape(-1, group), 0.01)
    assert gram.equal(before[0]) and weight.equal(before[1])


def test_sums_are_exact_in_a_forward_pass_of_low_precision() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    plain, cast = (Gram.empty(8, torch.device("cpu")) for _ in range(2))
    plain.add(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x)
    assert cast.products.equal(plain.products)


def test_layers_outside_the_trunk_are_summed() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.ModuleDict({"used": nn.Linear(3, 4), "skipped": nn.Linear(4, 2)})
            self.base_model.forward = lambda x: self.base_model["used"](x)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_model["skipped"](self.base_model["used"](x))

    net, x, sums = Whole(), torch.randn(7, 3), {}
    widths = {"base_model.used.weight": 3, "base_model.skipped.weight": 4}
    sum_products(net, widths, [Batch((x[:4],)), Batch((x[4:],))], sums.__setitem__)
    assert [sums[name].rows for name in widths] == [7, 7]
    with pytest.raises(ValueError, match="no batch reached the weight 'base_model"):
        sum_products(net, widths, [], sums.__setitem__)
