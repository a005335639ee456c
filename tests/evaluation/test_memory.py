"""Memory: what is predicted is what is then needed."""

import gc
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.levels import apply_threshold
from regrow.allocation.stages import MemoryBudgetError, plan_stages
from regrow.core.candidates import Prefix
from regrow.core.sources import Batch
from regrow.evaluation.memory import (
    Memory,
    MemoryCounterMode,
    UnpredictableError,
    make_training_step,
    predict_memory,
    start_peak_meter,
)
from regrow.nets.cells import OPERATIONS, Cells, supernet_config, thin_config

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
TOLERANCE = 0.02


def images(count: int, size: int = 16) -> Batch:
    """A batch of pictures of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Batch((torch.randn(count, 3, size, size, generator=generator),), labels=labels)


FEW = ("skip", "sep3", "max")


def cells(width: int, last: int, operations: Sequence[str] = FEW) -> Callable[[], Prefix]:
    """A small super-network up to a cell."""
    config = supernet_config((3, 16, 16), 10, width=width, cells=3, nodes=2, heads=range(3), operations=operations)
    return lambda: Prefix(Cells(config), last)


def residual() -> nn.Module:
    """A network of another make."""
    return pytest.importorskip("torchvision", reason="needs regrow[vision]").models.resnet18(num_classes=10)


def measure_memory(model: nn.Module, batch: Batch, step: Callable[[nn.Module, Batch], Any]) -> Memory:
    """Measure what two real steps need; the network's weights change."""
    given = [*model.parameters(), *model.buffers(), *batch.args, batch.labels]
    with MemoryCounterMode([tensor for tensor in given if tensor is not None]) as live:
        for _ in range(2):
            step(model, batch)
    return Memory(live.held, live.peak)


def agree(build: Callable[[], nn.Module], batch: Batch, step: Callable[[nn.Module, Batch], Any]) -> int:
    """Hold the prediction against a run; the peak."""
    foretold = predict_memory(build, batch, step)
    gc.collect()
    found = measure_memory(build(), batch, step)
    assert foretold.held == found.held
    assert foretold.peak == pytest.approx(found.peak, rel=TOLERANCE)
    assert found.peak > found.held
    return found.peak


def test_storage_is_counted_once_while_it_lives() -> None:
    given = torch.zeros(1000)
    with MemoryCounterMode([given]) as live:
        assert (live.held, live.now, live.peak) == (4000, 4000, 4000)
        view = (given + 1).view(10, 100)[3:].t()
        assert live.now == 8000
        view.mul_(2)
        part = view.clone(memory_format=torch.contiguous_format)
        assert live.now == 8000 + 2800
        del view
        assert live.now == 4000 + 2800
        part.resize_(1000)
        assert live.now == 8000
        del part
    assert (live.held, live.now, live.peak) == (4000, 4000, 10800)


def test_what_was_there_before_is_held_though_nobody_gave_it() -> None:
    before = torch.zeros(1000)
    with MemoryCounterMode() as live:
        made = torch.zeros(10)
        made = made + before.sum()
    assert (live.held, live.now) == (4000, 4040)
    assert live.peak == 4000 + 40 + 4 + 40


def test_what_backward_needs_is_alive_until_it_ran() -> None:
    x = torch.ones(1000, requires_grad=True)
    with MemoryCounterMode([x]) as live:
        y = x.exp().exp().sum()  # each keeps its answer
        assert live.now == 3 * 4000 + 4
        y.backward()
        del y
        assert live.now == 2 * 4000  # x and its gradient
    assert live.peak >= 4 * 4000


def test_predicted_is_measured_on_prefixes_of_cells() -> None:
    step = make_training_step(SGD)
    cases = [(4, 4, 0), (4, 16, 0), (4, 16, 2), (8, 16, 2)]
    peaks = [agree(cells(width, last), images(count), step) for width, count, last in cases]
    assert sorted(set(peaks)) == peaks
    assert agree(cells(4, 0, OPERATIONS), images(4), make_training_step(torch.optim.Adam)) > peaks[0]


@pytest.mark.parametrize("optimizer", [SGD, torch.optim.Adam], ids=["sgd", "adam"])
def test_predicted_is_measured_on_a_residual_network(optimizer: Any) -> None:
    step = make_training_step(optimizer)
    small, large = agree(residual, images(2, 32), step), agree(residual, images(16, 64), step)
    assert large > small


def test_a_network_that_exists_is_left_as_it_is() -> None:
    model, step = cells(4, 1)(), make_training_step(SGD)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    foretold = predict_memory(model, images(8), step)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert foretold == predict_memory(cells(4, 1), images(8), step)
    assert foretold.peak == pytest.approx(measure_memory(model, images(8), step).peak, rel=TOLERANCE)


def test_masks_that_stand_in_for_weights_are_counted() -> None:
    """A step of another make: thresholds, masked weights, and a number that it reads."""

    def masked(model: nn.Module, batch: Batch) -> float:
        parameters = dict(model.named_parameters())
        weights = {
            name: apply_threshold(p, p.new_full((len(p),), 0.01).requires_grad_(), torch.zeros_like(p))
            for name, p in parameters.items()
            if p.dim() == 4
        }
        answer = torch.func.functional_call(model, {**parameters, **weights}, batch.args)
        assert batch.labels is not None
        loss = F.cross_entropy(answer, batch.labels)
        loss.backward()
        model.zero_grad()
        return loss.item()

    build = cells(8, 1)
    plain = agree(build, images(2), make_training_step(partial(torch.optim.SGD, lr=0.01)))
    weights = sum(4 * p.numel() for p in build().parameters() if p.dim() == 4)
    assert agree(build, images(2), masked) > plain + weights


def test_a_size_that_data_decide_is_no_prediction() -> None:
    def picky(model: nn.Module, batch: Batch) -> None:
        answer: Tensor = model(*batch.args)
        answer[answer > 0].sum().backward()

    with pytest.raises(UnpredictableError, match=r"data decide how much aten\.nonzero"):
        predict_memory(cells(4, 0), images(2), picky)


def test_resident_memory_is_beside_it() -> None:
    """Where the system tells: the process grew by as much as was live, and not by twice as much."""
    net, batch = cells(8, 2)(), images(256)
    grown = start_peak_meter(torch.device("cpu"))
    found = measure_memory(net, batch, make_training_step(SGD))
    more = grown()
    if more is None:
        pytest.skip("the system does not tell")
    assert 0.9 * found.peak < found.held + more < 2 * found.peak


def test_thinned_cells_keep_their_share_and_run() -> None:
    config = supernet_config((3, 16, 16), 10, width=4, cells=3, nodes=3)
    small = thin_config(config, 2, 0.3)
    counts = [[len(node["ops"]) for node in cell["nodes"]] for cell in small["cells"]]
    assert [sum(nodes) for nodes in counts] == [19, 19, 63]
    names = [op[0] for node in small["cells"][0]["nodes"] for op in node["ops"]]
    assert all(2 <= names.count(op) <= 3 for op in set(names)) and len(set(names)) == 7
    assert [len(node["ops"]) for node in thin_config(config, 1, 0.0)["cells"][0]["nodes"]] == [1, 1, 1]
    assert thin_config(config, 3, 1.0) == config
    assert Cells(small)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)


def test_stages_keep_the_budget_in_the_run_itself() -> None:
    """Planned on shapes alone, then learned: half of what the whole network needs is enough, and is not exceeded."""
    config = supernet_config((3, 16, 16), 10, width=4, cells=4, nodes=2, operations=("sep3", "sep5", "dil3"))
    batch, step = images(64), make_training_step(SGD)

    def prefix(first: int, last: int) -> Prefix:
        return Prefix(Cells({**thin_config(config, first, 0.2), "heads": sorted({last, 3})}), last)

    @cache
    def peak(first: int, last: int) -> int:
        return predict_memory(partial(prefix, first, last), batch, step).peak

    budget = peak(0, 3) // 2
    plan = plan_stages(peak, 4, budget)
    begin = 0
    for end, foretold in zip(plan.ends, plan.peaks, strict=True):
        found = measure_memory(prefix(begin, end), batch, step).peak
        assert found == pytest.approx(foretold, rel=TOLERANCE) and found <= budget
        begin = end + 1
    with pytest.raises(MemoryBudgetError) as refused:
        plan_stages(peak, 4, max(plan.peaks) - 1)
    assert max(plan.peaks) - 1 < int(str(refused.value).partition("(")[2].partition(" bytes")[0]) <= budget
