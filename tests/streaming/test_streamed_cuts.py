"""Streamed = in memory: the same files, byte for byte, each block compared in float64 before it is written."""

import gc
import weakref

import pytest
import torch

from regrow import nets, store
from regrow.core.budget import Budget
from regrow.core.plan import Plan, PlanError
from regrow.evaluation import perplexity
from regrow.jobs.pruning_inputs import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.streaming.cut import propose_cut
from regrow.streaming.opening import open_network
from regrow.surgery import apply, compensate, proof
from regrow.tracing import trace


@pytest.fixture(params=[None, torch.bfloat16], ids=["stored", "bfloat16"])
def dtype(request):
    return request.param


def whole_and_streamed(folder, dtype, sources):
    """The network in memory with its axes, the opened one, and the plan for both."""
    pruner = build_pruner("flap", {})
    loaded, opened = nets.load(str(folder), dtype=dtype), open_network(str(folder), dtype)
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    evidence = collect_evidence(loaded.model, axes, pruner, sources)
    return loaded, axes, opened, plan_cut(pruner, loaded.model, axes, Budget(0.7), evidence).plan


def test_streamed_files_and_outputs_are_those_of_the_whole_network(folder, dtype, sources, tmp_path):
    loaded, axes, opened, plan = whole_and_streamed(folder, dtype, sources)
    assert plan.means
    model, after = apply(loaded.model, axes, plan)
    store.write_model(loaded, tmp_path / "whole")
    cut = propose_cut(opened, plan)
    deviations, network = cut.write(tmp_path / "streamed"), cut.network(tmp_path / "streamed")
    assert len(deviations) == 3
    assert all(one.largest_difference <= one.bound for one in deviations)
    assert cut.axes.sizes() == after.sizes()
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    with torch.no_grad():
        for batch, output in zip(sources[0], network.outputs(sources[0].batches), strict=False):
            assert torch.equal(output.logits, model(*batch.args, **batch.kwargs).logits)
    streamed = perplexity(cut.loaded.model, sources[0], outputs=network.outputs(sources[0].batches))
    assert streamed == perplexity(model, sources[0])


def test_a_block_that_is_cut_wrongly_is_found_and_nothing_is_left(folder, sources, tmp_path, monkeypatch):
    _, _, opened, plan = whole_and_streamed(folder, None, sources)
    cut = propose_cut(opened, plan)
    name = next(name for name in plan.means if ".1." in name)
    true = compensate.resize

    def wrong(key, tensor, *rest):
        made = true(key, tensor, *rest)
        return made.roll(1, -1) if key == name else made

    monkeypatch.setattr(compensate, "resize", wrong)
    monkeypatch.setattr(compensate.PlannedTensors, "computes", lambda tensors, name: False)
    with pytest.raises(PlanError, match="differs by"):
        cut.write(tmp_path / "streamed")
    assert not any((tmp_path / "streamed").iterdir())


def test_a_network_that_runs_otherwise_than_it_is_recorded_is_refused(folder, sources, tmp_path, monkeypatch):
    """It is recorded on fake tensors; only its own forward pass shows what it does to real ones."""
    _, _, opened, plan = whole_and_streamed(folder, None, sources)
    kind = type(next(m for path, m in opened.loaded.model.named_modules() if path.endswith(".mlp")))
    forward = kind.forward
    monkeypatch.setattr(
        kind, "forward", lambda module, x: forward(module, x.flip(-1) if type(x) is torch.Tensor else x)
    )
    with pytest.raises(PlanError, match="from what was recorded"):
        propose_cut(open_network(str(folder)), plan).write(tmp_path / "streamed")
    assert not (tmp_path / "streamed" / store.SHAPES).exists()


def test_plans_that_grow_are_refused(folder):
    opened = open_network(str(folder))
    with pytest.raises(PlanError, match="only cuts"):
        propose_cut(opened, Plan.growing(opened.axes, {next(axis.key for axis in opened.axes.units()): 1}))


def test_a_block_is_released_once_it_is_compared(folder, sources, tmp_path, monkeypatch):
    _, _, opened, plan = whole_and_streamed(folder, None, sources)
    cut, pairs, true = propose_cut(opened, plan), [], proof._Pair.__init__

    def watched(self, *given):
        true(self, *given)
        pairs.append(weakref.ref(self))

    monkeypatch.setattr(proof._Pair, "__init__", watched)
    gc.disable()
    try:
        cut.write(tmp_path / "streamed")
        assert len(pairs) == 3
        assert not [pair for pair in pairs if pair() is not None]
    finally:
        gc.enable()
