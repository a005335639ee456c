"""Means stand in for dropped inputs only where that is exact."""

import pytest
import torch

from hand import conv, lm, stored, texts
from regrow.core.budget import Budget
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source
from regrow.jobs.pruning_inputs import collect_evidence
from regrow.methods import MethodKind, find_method
from regrow.methods.pruning.pruner import plan_cut
from regrow.scoring.collect import collect
from regrow.scoring.compensate import means, note_uncompensated


def test_the_mean_output_of_a_compensated_weight_is_unchanged() -> None:
    model, axes = lm()
    source = texts("a")
    (seen,) = collect(model, axes, [source], {Need.ACTIVATIONS})["a"]
    kept = {"decoder.blocks.0.q.weight:0": (0, 2), "decoder.blocks.1.gate.weight:0": tuple(range(1, 10))}
    found = means(model, axes, kept, seen)
    assert {name: list(row) for name, row in found.items()} == {
        "decoder.blocks.0.o.weight": list(range(8, 16)),
        "decoder.blocks.1.down.weight": [0],
    }
    x = stored(model, model.decoder.blocks[0].o, source).flatten(0, 1)
    w = model.decoder.blocks[0].o.weight.detach().double()
    cut = x.clone()
    cut[:, 8:16] = torch.tensor(list(found["decoder.blocks.0.o.weight"].values())).double()
    torch.testing.assert_close((cut @ w.T).mean(0), (x @ w.T).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("padding", "groups", "exact"), [(0, 1, True), (1, 1, False), (0, 2, False), ("same", 1, False)]
)
def test_padded_and_grouped_convolutions_are_left_out(padding: int, groups: int, exact: bool) -> None:
    model, axes = conv(padding=padding, groups=groups)
    (seen,) = collect(model, axes, [Source("p", [Batch((torch.randn(2, 3, 5, 5),))])], {Need.ACTIVATIONS})["p"]
    assert bool(means(model, axes, {"0.weight:0": (0, 1)}, seen)) is exact
    notes = note_uncompensated(model, axes, {"0.weight:0": (0, 1)})
    assert [note.partition(",")[0] for note in notes] == ["no bias compensation for 3.weight"] * (not exact), notes


def test_a_plan_notes_what_it_does_not_compensate() -> None:
    model, axes = conv(padding=1)
    source = Source("p", [Batch((torch.randn(2, 3, 5, 5),))])
    flap = find_method(MethodKind.PRUNING, "flap").build(find_method(MethodKind.PRUNING, "flap").settings())
    plan = plan_cut(flap, model, axes, Budget(0.7), collect_evidence(model, axes, flap, [source])).plan
    (note,) = plan.origin["notes"]
    assert not plan.means
    assert note.startswith("no bias compensation for 3.weight, which have padding, groups")
