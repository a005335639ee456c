"""Streamed = in memory: the same plan, with weights that are read when a score needs them."""

import pytest

from regrow import nets
from regrow.core.budget import Budget
from regrow.jobs.pruning import build_pruner, collect_evidence
from regrow.methods.pruning.pruner import PruningContext, plan_cut
from regrow.scoring.collect import CollectionOptions
from regrow.streaming.opening import open_network
from regrow.tracing import trace

METHODS = [
    ("flap", {}),
    ("wanda_sp", {"allocation": "ranked"}),
    ("magnitude", {"allocation": "ranked"}),
    ("gprune", {"steps": 0, "start": "base", "shards": 1}),
    ("obs", {}),
]


@pytest.mark.parametrize(("method", "settings"), METHODS, ids=[name for name, _ in METHODS])
def test_streamed_plans_are_those_of_the_whole_network(folder, sources, method, settings):
    pruner, budget = build_pruner(method, settings), Budget(0.7)
    loaded, opened = nets.load(str(folder)), open_network(str(folder))
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    evidence = collect_evidence(loaded.model, axes, pruner, sources)
    run = CollectionOptions(opened.network())
    streamed = collect_evidence(opened.loaded.model, opened.axes, pruner, sources, run=run)
    whole = plan_cut(pruner, loaded.model, axes, budget, evidence)
    context = PruningContext(weights=opened.weights.parameters(), block_runner=opened.network())
    other = plan_cut(pruner, opened.loaded.model, opened.axes, budget, streamed, context=context)
    assert whole.plan.changes
    assert other.plan.to_json() == whole.plan.to_json()
    assert other.scores.values.keys() == whole.scores.values.keys()
    for key, values in whole.scores.values.items():
        assert values.equal(other.scores.values[key])
