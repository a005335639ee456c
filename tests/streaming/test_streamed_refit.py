"""Streamed = in memory: layers that refit fits block by block have the same bits."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from regrow import nets, store
from regrow.core.budget import Budget
from regrow.core.errors import ResourceError
from regrow.core.progress import silent
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.methods.recovery import ChangedTensors, RecoveryTask, StreamedPair
from regrow.methods.recovery import refit as refitting
from regrow.methods.recovery.refit import Settings, refit
from regrow.methods.recovery.refit_work import RefitWork, merge_batches
from regrow.streaming.opening import open_network
from regrow.surgery import apply
from regrow.tracing import trace


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut network in memory, and the files of it and of the dense one."""

    dense: Path
    place: Path
    task: RecoveryTask

    def refit(self, settings, progress=silent):
        """Refit block by block, with what an interrupted call left; return the result, and what has changed."""
        dense, cut = open_network(str(self.dense)), open_network(str(self.place / "cut"))
        pair = StreamedPair(dense.network(), cut.network(), ChangedTensors(self.place / "changed"))
        given = cut.loaded.model, dense.loaded.model, dense.axes, self.task.plan, self.task.sources
        return refit(RecoveryTask(*given, progress=progress, streamed=pair), settings), pair.changed

    def check(self, settings, found, changed):
        """Check that the layers are those of a refit in memory."""
        before = {name: one.clone() for name, one in self.task.model.named_parameters()}
        assert refit(self.task, settings) == found
        after = dict(self.task.model.named_parameters())
        moved = {name for name, one in after.items() if name not in before or not torch.equal(one, before[name])}
        assert moved
        assert moved <= {*changed.places}
        assert all(torch.equal(after[name], changed[name]) for name in changed.places)


@pytest.fixture
def cut(folder, sources, tmp_path):
    return made(folder, sources, tmp_path)


def made(folder, sources, place, scale=1.0):
    """Cut the network of a folder; the weights of its last norm are scaled, as if it was trained since."""
    pruner, loaded, dense = build_pruner("wanda_sp", {}), nets.load(str(folder)), nets.load(str(folder))
    axes = trace(dense.model, *dense.example.args, **dense.example.kwargs)
    plan = plan_cut(pruner, loaded.model, axes, Budget(0.7), collect_evidence(loaded.model, axes, pruner, sources)).plan
    model, _ = apply(loaded.model, axes, plan)
    with torch.no_grad():
        [one for one in model.parameters() if one.dim() == 1][-1].mul_(scale)
    store.write_model(loaded, place / "cut")
    return Cut(folder, place, RecoveryTask(model, dense.model, axes, plan, sources))


@pytest.mark.parametrize("elements", [1, 2048])
def test_layers_are_those_of_a_refit_in_memory(cut, elements, monkeypatch):
    monkeypatch.setattr(refitting, "merge_batches", partial(merge_batches, min_elements=elements))
    settings = Settings("own", choose_on="left_out_source")
    found, changed = cut.refit(settings)
    assert len(found["layers"]) == 6
    cut.check(settings, found, changed)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_an_interrupted_refit_solves_each_layer_once(cut, monkeypatch):
    settings, solved, true = Settings("own"), [], RefitWork.solve

    def interrupt(done, total, what):
        raise KeyboardInterrupt

    def solve(work, layer, *rest):
        if work.task.streamed:
            solved.append(layer.name)
        true(work, layer, *rest)

    monkeypatch.setattr(RefitWork, "solve", solve)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            cut.refit(settings, interrupt)
    found, changed = cut.refit(settings)
    assert len({*solved}) == len(solved) == 6
    cut.check(settings, found, changed)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_network_that_was_trained_since_is_refitted_in_memory_alone(folder, sources, tmp_path):
    with pytest.raises(ResourceError, match=r"trained since.*needs both networks in memory"):
        made(folder, sources, tmp_path, scale=3.0).refit(Settings())
