"""Objectives: chosen by the labels, computed as torch does, and scored per example."""

import pytest
import torch
import torch.nn.functional as F

from regrow.core.errors import InputError
from regrow.core.objectives import OBJECTIVES, Score, choose_objective
from regrow.core.sources import Batch
from regrow.store.probe import max_difference

X, LOGITS = torch.ones(4, 3), torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        (Batch((X,), labels=torch.tensor([0, 1, 0, 0])), "classification"),
        (Batch((torch.ones(2, 5).long(),), labels=torch.ones(2, 5).long()), "next-token"),
        (Batch((torch.ones(2, 5).long(),), labels=torch.ones(2).long()), "classification"),
        (Batch((torch.ones(2, 3, 4, 4),), labels=torch.ones(2, 4, 4).long()), "classification"),
        (Batch((X,), labels=torch.tensor([[0.0, 1.0]] * 4)), "multi-label"),
        (Batch((X,), labels=torch.tensor([0.0, 1.0, 1.0, 0.0])), "regression"),
        (Batch((X,), labels=torch.tensor([[0.5]] * 4)), "regression"),
        (Batch((X,)), "own"),
    ],
)
def test_the_labels_say_which_objective(batch, name):
    assert choose_objective(None, batch).name == name


def test_losses_are_those_of_torch():
    classes, floats = torch.tensor([0, 1, 1, -100]), torch.rand(4, 2)
    for name, labels, loss in (
        ("classification", classes, F.cross_entropy(LOGITS, classes)),
        ("multi-label", floats.round(), F.binary_cross_entropy_with_logits(LOGITS, floats.round())),
        ("regression", floats, F.mse_loss(LOGITS, floats)),
    ):
        batch = Batch((X,), labels=labels)
        assert torch.equal(OBJECTIVES[name].compute_loss(LOGITS, batch), loss), name
    own = {"boxes": torch.tensor(1.0), "classes": torch.tensor([2.0])}
    assert float(OBJECTIVES["own"].compute_loss(own, Batch((X,)))) == 3


def test_scores_add_up_over_batches():
    labels = torch.tensor([0, 1, 1, -100])
    objective = OBJECTIVES["classification"]
    parts = [Batch((X[i : i + 2],), labels=labels[i : i + 2]) for i in (0, 2)]
    total = sum(
        (objective.compute_score(LOGITS[i : i + 2], part) for i, part in zip((0, 2), parts, strict=True)), Score()
    )
    assert (total.total, total.count) == (2, 3)
    assert total.error == pytest.approx((2 / 3 * 1 / 3 / 3) ** 0.5)


def test_a_loss_that_cannot_be_used_is_named():
    batch = Batch((X,), labels=torch.ones(4, 2))
    with pytest.raises(InputError, match=r"scalar tensor, got \[4, 2\]"):
        choose_objective(torch.nn.MSELoss(reduction="none"), batch).compute_loss(LOGITS, batch)
    with pytest.raises(InputError, match="returned no loss"):
        choose_objective(None, Batch((X,))).compute_loss(LOGITS, Batch((X,)))
    with pytest.raises(InputError, match="must be one of"):
        choose_objective("hinge", batch)


def test_one_output_is_no_choice_of_classes():
    batch = Batch((X,), labels=torch.tensor([0, 1, 1, 0]))
    for logits in (torch.zeros(4, 1), torch.zeros(4, 1, 3, 3)):
        labels = batch.labels if logits.dim() == 2 else torch.zeros(4, 3, 3).long()
        with pytest.raises(InputError, match=r"one output for each .* give labels as floats"):
            OBJECTIVES["classification"].compute_loss(logits, Batch((X,), labels=labels))


def test_outputs_that_are_not_finite_are_compared():
    one, other = torch.tensor([0.0, torch.nan]), torch.tensor([0.0, torch.inf])
    assert max_difference([one, other], [one, other]) == 0
    assert max_difference([LOGITS, one], [LOGITS, torch.zeros(2)]) == torch.inf
