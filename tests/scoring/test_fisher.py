"""The Fisher information of masks, against masks that are differentiated example by example."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hand import conv, lm, texts
from regrow import trace
from regrow.core.axes import AxisGraph
from regrow.core.objectives import CLASSIFICATION, MULTI_LABEL, NEXT_TOKEN, REGRESSION, Objective, choose_objective
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source, logits_in
from regrow.scoring.collect import collect
from regrow.scoring.gradients import draw_labels
from regrow.scoring.metrics import fisher
from regrow.scoring.weights import weights_of
from regrow.surgery.gate import gate_inputs

KV, FF = "decoder.blocks.1.q.weight:0", "decoder.blocks.1.gate.weight:0"


def measure(model: nn.Module, axes: AxisGraph, *batches: Batch, shards: int = 1) -> list[dict[str, Tensor]]:
    found = collect(model, axes, [Source("a", batches)], {Need.FISHER}, shards=shards)["a"]
    return [one.fisher for one in found]


def drawn(model: nn.Module, batch: Batch) -> Tensor:
    """The labels that are drawn for a batch: where the gradient, probability minus one-hot, is negative."""
    found = draw_labels(model(*batch.args), batch, choose_objective(None, batch))
    assert found
    labels = found[1].argmin(-1)
    labels[batch.labels == -100] = -100
    return labels


def test_equals_masks_of_each_token_differentiated_one_text_at_a_time() -> None:
    model, axes = lm()
    (batch,) = texts("a", batches=1)
    labels = batch.labels.clone()
    labels[1, 2:] = -100
    batch = replace(batch, labels=labels)
    (found,) = measure(model, axes, batch)
    wanted, block = drawn(model, batch), model.decoder.blocks[1]
    for key, module, width in ((KV, block.o, 8), (FF, block.down, 1)):
        expected = torch.zeros(axes[key].size)
        for ids, label in zip(batch.args[0], wanted, strict=True):
            mask = torch.ones(7, axes[key].size, requires_grad=True)
            hook = module.register_forward_pre_hook(
                lambda _, args, mask=mask, width=width: (args[0] * mask.repeat_interleave(width, 1),)
            )
            loss = F.cross_entropy(model(ids[None])[0][0], label, reduction="sum")
            (slope,) = torch.autograd.grad(loss, mask)
            hook.remove()
            expected += slope.square().sum(0)
        torch.testing.assert_close(found[key].float(), expected, rtol=1e-4, atol=1e-9)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Forked(nn.Module):
    """A layer whose units two others read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        return self.left(hidden) - 2 * self.right(hidden)


class Recurrent(nn.Module):
    """Two recurrent layers and a head on every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(4, 5, num_layers=2, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x)[0])


def test_uses_of_a_unit_are_added_before_squaring_and_pixels_too() -> None:
    torch.manual_seed(0)
    forked, pictures, recurrent = Forked(), conv()[0].eval(), Recurrent()
    for model, inputs, labels in (
        (forked, torch.randn(5, 4), torch.arange(5) % 3),
        (pictures, torch.randn(5, 3, 5, 5), torch.arange(5) % 4),
        (recurrent, torch.randn(1, 6, 4), torch.zeros(1, 6, dtype=torch.long)),
    ):
        axes, batch = trace(model, inputs), Batch((inputs,), labels=labels)
        (found,) = measure(model, axes, batch)
        wanted = drawn(model, batch)
        expected = {key: torch.zeros(len(one)) for key, one in found.items()}
        for example, label in zip(inputs, wanted, strict=True):
            masks = {key: torch.ones(len(one), requires_grad=True) for key, one in found.items()}
            with gate_inputs(model, axes, masks):
                logits = model(example[None])
            loss = F.cross_entropy(logits.flatten(0, -2), label.reshape(-1), reduction="sum")
            for key, slope in zip(masks, torch.autograd.grad(loss, [*masks.values()]), strict=True):
                expected[key] += slope.square()
        assert found and all(bool(one.any()) for one in found.values())
        for key, one in found.items():
            torch.testing.assert_close(one.float(), expected[key], rtol=1e-4, atol=1e-8)


def test_batches_and_shards_add_up_whatever_they_are_joined_to() -> None:
    model, axes = lm()
    source = texts("a", batches=4)
    ids, labels = (torch.cat(one) for one in zip(*((b.args[0], b.labels) for b in source), strict=True))
    (whole,), parts = measure(model, axes, *source), measure(model, axes, *source, shards=2)
    (joined,) = measure(model, axes, Batch((ids,), labels=labels))
    single = [Batch((one[None],), labels=label[None]) for one, label in zip(ids, labels, strict=True)]
    for other in (joined, measure(model, axes, *single)[0], {key: parts[0][key] + parts[1][key] for key in whole}):
        for key, one in whole.items():
            torch.testing.assert_close(other[key], one, rtol=1e-5, atol=1e-12)
    (again,) = collect(model, axes, [source], {Need.FISHER, Need.ACTIVATIONS, Need.GRADIENTS})["a"]
    (apart,) = collect(model, axes, [source], {Need.ACTIVATIONS, Need.GRADIENTS})["a"]
    assert all(torch.equal(again.fisher[key], one) for key, one in whole.items())
    assert all(torch.equal(again.moments[name].square, one.square) for name, one in apart.moments.items())
    assert all(torch.equal(again.gradients[name], one) for name, one in apart.gradients.items())


def test_labels_follow_the_predictions() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]]).repeat(1500, 1)
    inputs = torch.arange(3000.0)[:, None]
    labels = torch.zeros(3000, dtype=torch.long)
    for objective, given, mean in (
        (CLASSIFICATION, labels, logits.softmax(-1)),
        (NEXT_TOKEN, labels, logits.softmax(-1)),
        (MULTI_LABEL, torch.zeros(3000, 3), logits.sigmoid()),
    ):
        found = draw_labels(logits, Batch((inputs,), labels=given), objective)
        assert found
        ones = mean - found[1]
        assert bool(((ones - ones.round()).abs() < 1e-5).all())
        torch.testing.assert_close(ones[::2].mean(0), mean[0], rtol=0, atol=0.05)
        torch.testing.assert_close(ones[1::2].mean(0), mean[1], rtol=0, atol=0.05)
    noise = draw_labels(logits, Batch((inputs,), labels=logits), REGRESSION)
    assert noise
    assert abs(float(noise[1].mean())) < 0.05 and abs(float(noise[1].std()) - 1) < 0.05
    wide = logits.view(10, 300, 3).movedim(-1, 1)
    found = draw_labels(wide, Batch((inputs.view(10, 300),), labels=labels.view(10, 300)), CLASSIFICATION)
    assert found
    assert found[0].shape == (10, 300, 3) and bool((found[1].sum(-1).abs() < 1e-5).all())


def test_a_loss_of_ones_own_takes_the_labels_of_the_data() -> None:
    torch.manual_seed(0)
    model, inputs, labels = Forked(), torch.randn(1, 4), torch.tensor([2])
    axes = trace(model, inputs)
    own = Objective("custom", lambda output, labels: F.cross_entropy(logits_in(output), labels))
    (found,) = collect(model, axes, [Source("a", [Batch((inputs,), labels=labels)])], {Need.FISHER}, objective=own)["a"]
    masks = {key: torch.ones(len(one), requires_grad=True) for key, one in found.fisher.items()}
    with gate_inputs(model, axes, masks):
        loss = F.cross_entropy(model(inputs), labels)
    for key, slope in zip(masks, torch.autograd.grad(loss, [*masks.values()]), strict=True):
        torch.testing.assert_close(found.fisher[key].float(), slope.square(), rtol=1e-4, atol=1e-9)
    with torch.no_grad():
        given = [Source("a", [Batch((inputs,), labels=labels)])], {Need.FISHER}
        (again,) = collect(model, axes, *given, objective=own)["a"]
    assert all(torch.equal(again.fisher[key], one) for key, one in found.fisher.items())


def test_scores_are_half_the_mean_square_and_need_all_axes() -> None:
    model, axes = lm()
    (seen,) = collect(model, axes, [texts("a")], {Need.FISHER})["a"]
    scores = fisher(weights_of(model), axes, seen)
    assert torch.equal(scores[FF], seen.fisher[FF] / 2 / seen.tokens) and scores.metric == "fisher"
    o = model.decoder.blocks[1].o.weight.detach().double()
    torch.testing.assert_close(fisher(weights_of(model), axes, None)[KV], o.square().sum(0).view(3, 8).sum(1))
    del seen.fisher[FF]
    with pytest.raises(ValueError, match=r"never reached the units of 'decoder\.blocks\.1\.gate"):
        fisher(weights_of(model), axes, seen)


class Detached(Forked):
    """Its output has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


def test_nothing_to_differentiate_is_refused() -> None:
    model, axes = lm()
    (batch,) = texts("a", batches=1)
    with pytest.raises(ValueError, match="nothing is labelled on source 'a'"):
        measure(model, axes, replace(batch, labels=torch.full_like(batch.labels, -100)))
    inputs, model = torch.randn(5, 4), Detached()
    with pytest.raises(ValueError, match="what the network returns has no gradient"):
        measure(model, trace(model, inputs), Batch((inputs,), labels=torch.arange(5) % 3))


def test_examples_have_random_numbers_of_their_own_however_inputs_are_given() -> None:
    logits, labels = torch.zeros(600, 2), torch.zeros(600, dtype=torch.long)

    def draw(*inputs: Any) -> Tensor:
        found = draw_labels(logits, Batch(inputs, labels=labels), CLASSIFICATION)
        assert found
        return found[1]

    rows = torch.arange(600.0)[:, None]
    assert torch.equal(draw({"x": [rows]}), draw(rows))
    other = draw({"x": torch.zeros(3, 4)})
    assert 0.4 < float(other.argmin(-1).float().mean()) < 0.6
    assert not torch.equal(other, draw({"x": torch.ones(3, 4)}))


def test_damaged_weights_are_named() -> None:
    model, axes = lm()
    with torch.no_grad():
        model.decoder.blocks[1].down.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"the gradient of 'decoder\.blocks.* holds NaN"):
        measure(model, axes, *texts("a"))
