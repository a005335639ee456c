"""Streamed = in memory: layers that refit fits block by block have the same bits, for both targets."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from regrow import nets, store
from regrow.core.budget import Budget
from regrow.core.errors import InputError, ResourceError
from regrow.core.progress import silent
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import plan_cut
from regrow.methods.recovery import ChangedTensors, RecoveryTask, StreamedPair
from regrow.methods.recovery import refit as refitting
from regrow.methods.recovery.refit import Settings, refit
from regrow.methods.recovery.refit_work import RefitWork, regroup
from regrow.streaming.opening import open_network
from regrow.streaming.weights import StoredWeights
from regrow.surgery import apply
from regrow.tracing import trace


@dataclass(frozen=True, eq=False)
class Cut:
    """A cut network in memory, and the files of it and of the dense one."""

    dense: Path
    place: Path
    task: RecoveryTask

    def refit(self, settings, progress=silent, lacking=""):
        """Refit block by block, with what an interrupted call left; return the result, and what has changed."""
        dense, cut = open_network(str(self.dense)), open_network(str(self.place / "cut"))
        pair = StreamedPair(dense.network(), cut.network(), ChangedTensors(self.place / "changed"), lacking)
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
@pytest.mark.parametrize("target", ["own", "dense", "residual"])
def test_layers_are_those_of_a_refit_in_memory(cut, target, elements, monkeypatch):
    monkeypatch.setattr(refitting, "regroup", partial(regroup, elements=elements))
    settings = Settings(target, choose_on="left_out_source")
    found, changed = cut.refit(settings)
    after_norms = "gemma3" in type(cut.task.model).__name__.lower()
    assert found["target"] == {"residual": "own" if after_norms else "dense"}.get(target, target)
    assert ("residual stream" in found.get("note", "")) == (target == "residual" and after_norms)
    assert len(found["layers"]) == 6
    cut.check(settings, found, changed)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_an_interrupted_refit_beside_the_dense_network_solves_each_layer_once(cut, monkeypatch):
    settings, solved, true = Settings("dense"), [], RefitWork.solve

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
def test_a_network_that_was_trained_since_is_refitted_beside_the_dense_one(folder, sources, tmp_path):
    cut = made(folder, sources, tmp_path, scale=3.0)
    with pytest.raises(ResourceError, match=r"trained since.*too little"):
        cut.refit(Settings(), lacking="too little")
    found, changed = cut.refit(Settings())
    assert found["target"] == "dense"
    assert "trained since" in found["note"]
    cut.check(Settings(), found, changed)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_an_error_in_the_thread_of_the_dense_network_ends_the_refit(cut, monkeypatch):
    dense, started = open_network(str(cut.dense)).weights.name, []
    read, true = StoredWeights.read, ChangedTensors.write

    def failing(self, key, pool=None):
        if self.name == dense and ".2." in key and started:
            raise InputError("the file is gone")
        return read(self, key, pool)

    def write(self, tensors, record):
        started.append(record)
        true(self, tensors, record)

    monkeypatch.setattr(ChangedTensors, "write", write)
    monkeypatch.setattr(StoredWeights, "read", failing)
    with pytest.raises(InputError, match="the file is gone"):
        cut.refit(Settings("dense"))


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_a_block_that_returns_the_output_of_a_layer_is_refused(folder, sources, tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    plain = LlamaDecoderLayer.forward

    def forward(self, hidden_states, **kwargs):
        if self.self_attn.layer_idx != 1:
            return plain(self, hidden_states, **kwargs)
        more = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return self.mlp(self.post_attention_layernorm(hidden_states + more))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    with pytest.raises(InputError, match=r"a block returns the output of .*layers\.1.*down_proj\.weight as it is"):
        made(folder, sources, tmp_path).refit(Settings("dense"))
