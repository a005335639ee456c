"""Every method obeys a budget of any measure, rounded and regular."""

from copy import deepcopy
from dataclasses import replace

import pytest
from torch import nn

from hand import lm, texts, timed
from regrow import apply, trace
from regrow.allocation.cost import cost_of
from regrow.core.amounts import STEPS_PER_UNIT, Measure, Target
from regrow.core.axes import AxisGraph
from regrow.core.budget import Budget
from regrow.core.scores import Evidence
from regrow.core.sources import Source
from regrow.jobs.pruning import check_pruning, collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import Pruner, plan_cut

METHODS = [
    ("random", {}),
    ("magnitude", {}),
    ("wanda_sp", {}),
    ("flap", {}),
    ("llm_pruner", {}),
    ("llm_pruner", {"allocation": "ranked"}),
    ("fisher", {"allocation": "measured"}),
    ("gprune", {"steps": 4, "every": 2, "shards": 2}),
    ("gprune", {"steps": 2, "shards": 2, "base": "llm_pruner", "start": "base"}),
    ("gprune", {"steps": 0, "shards": 2, "start": "inner"}),
]
SIZES = {"kv": 4, "rep": 2, "size": 4, "ff": 64}


@pytest.fixture(scope="module", params=METHODS, ids=lambda row: " ".join(map(str, (row[0], *row[1].values()))))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, AxisGraph, Pruner, Evidence, list[Source]]:
    """A method, and what it measured of a small language model."""
    name, settings = request.param
    model, _ = lm(**SIZES, blocks=4)
    axes = trace(model, texts("a").batches[0].args[0])
    sources = [texts(word, batches=6, seed=i) for i, word in enumerate("abc")]
    row = find_method(MethodKind.PRUNING, name)
    method = row.build(row.settings(**settings))
    return model, axes, method, collect_evidence(model, axes, method, sources), sources


@pytest.mark.parametrize("regular", [True, False])
@pytest.mark.parametrize("measure", [Measure.PARAMETERS, Measure.BYTES, Measure.CACHE, Measure.TIME])
def test_the_target_is_met_with_round_and_regular_widths(
    case: tuple[nn.Module, AxisGraph, Pruner, Evidence, list[Source]], measure: Measure, regular: bool
) -> None:
    model, axes, method, evidence, sources = case
    asked = Budget(
        round_to=8, regular=regular, timing=timed(axes), target=Target(measure, 1, 9 * (measure == "kv_cache"))
    )
    assert asked.target is not None
    whole = cost_of(axes, asked).total
    asked = replace(asked, target=replace(asked.target, amount=0.75 * whole / STEPS_PER_UNIT.get(measure, 1)))
    check_pruning(method, axes, asked, sources)
    plan = plan_cut(method, model, axes, asked, evidence).plan
    sizes = plan.sizes(axes)
    kept = {axis.key: sizes.get(axis.key, axis.size) for axis in axes}
    assert cost_of(axes, asked)(kept) <= asked.limit(whole) < whole
    assert all(kept[key] % 8 == 0 for key in kept if "gate" in key), "four groups are too few to be rounded"
    if regular:
        units = axes.units()
        kinds = {kind: {kept[axis.key] for axis in units if axis.kind == kind} for kind in {a.kind for a in units}}
        assert len(kinds) == 3 and all(len(widths) == 1 for widths in kinds.values())
    if measure == Measure.CACHE:
        assert all(".q." in key for key in plan.changes)
    if measure in (Measure.PARAMETERS, Measure.BYTES):
        model, _ = apply(deepcopy(model), axes, plan)
        left = sum(p.numel() for p in model.parameters()) * (4 if measure == Measure.BYTES else 1)
        assert left <= asked.target.amount, "with the biases that compensation adds"
        widest = max(3 * 8 * 8 * (4 if regular else 1), (4 if regular else 1) * (2 * 2 + 2) * 4 * 8)
        assert left > asked.target.amount - widest * (4 if measure == Measure.BYTES else 1), "within a step of an axis"
