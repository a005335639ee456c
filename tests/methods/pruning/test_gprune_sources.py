"""GPrune: scores from one source."""

from typing import Any

import pytest

from hand import lm, texts
from regrow.core.budget import Budget
from regrow.jobs.pruning import collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Cut, plan_cut

SIZES = {"kv": 4, "rep": 2, "size": 4, "ff": 64}
BASE = {"partition": "layer", "switch": "never", "steps": 0, "start": "base", "shards": 2}


def run(settings: dict[str, Any], names: str = "abc", method: str = "gprune") -> Cut:
    model, axes = lm(**SIZES)
    chosen = find_method(MethodKind.PRUNING, method)
    built = chosen.build(chosen.settings(**settings))
    sources = [texts(word, batches=6, seed="abc".index(word)) for word in names]
    return plan_cut(built, model, axes, Budget(0.6), collect_evidence(model, axes, built, sources))


@pytest.mark.parametrize(("name", "base"), [("a", "flap"), ("b", "fisher")])
def test_scores_from_one_source_are_those_of_the_base_method_on_it(name: str, base: str) -> None:
    pooled = run(BASE | {"base": base})
    ours = run(BASE | {"base": base, "scores_from": name})
    theirs = run(
        {"compensate": True} | ({"spare_first": 0.0, "spare_last": 0.0} if base == "fisher" else {}), name, base
    )
    assert ours.plan.changes == theirs.plan.changes
    assert ours.findings["spectrum"] == pooled.findings["spectrum"], "sensitivity is of all sources"
    assert ours.plan.changes != pooled.plan.changes


def test_a_source_left_out_does_not_score() -> None:
    """Where the source of the scores is itself left out, the next one scores; the ratios are learned as before."""
    cut = run({"scores_from": "c", "steps": 2, "every": 1, "shards": 2})
    assert len(cut.findings["history"]) == 3
    with pytest.raises(ValueError, match="one of a, b, c; got 'news'"):
        run(BASE | {"scores_from": "news"})
