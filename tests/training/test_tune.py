"""BatchNorm statistics are those of the data, and a short fine-tune learns."""

import pytest
import torch
from torch import nn

from hand import conv, mlp
from regrow.core.sources import Batch, Source
from regrow.training.schedule import Schedule
from regrow.training.tune import finetune, recalibrate


def pictures(batches: int = 3) -> Source:
    torch.manual_seed(0)
    made = []
    for _ in range(batches):
        labels = torch.arange(8) % 4
        made.append(Batch((torch.randn(8, 3, 6, 6) + labels.view(-1, 1, 1, 1),), labels=labels))
    return Source("p", made)


def test_statistics_are_averages_over_the_batches_and_nothing_else_changes() -> None:
    model, _ = conv()
    model.insert(0, nn.Dropout(0.5))
    model.train()
    model[2].running_mean.fill_(100)
    source = pictures()
    assert recalibrate(model, [source]) == 1
    inputs = [model[1](batch.args[0]).detach().transpose(0, 1).flatten(1) for batch in source]
    torch.testing.assert_close(model[2].running_mean, torch.stack([x.mean(1) for x in inputs]).mean(0))
    torch.testing.assert_close(model[2].running_var, torch.stack([x.var(1) for x in inputs]).mean(0))
    assert model[2].momentum == 0.1 and all(m.training for m in model.modules())
    assert recalibrate(mlp()[0], [source]) == 0


def test_finetuning_learns_and_repeats() -> None:
    def loss(model: nn.Module) -> float:
        batches = [nn.functional.cross_entropy(model(*batch.args), batch.labels) for batch in pictures()]
        return float(torch.stack(batches).mean().detach())

    def run() -> tuple[list[tuple[int, int, str]], torch.Tensor]:
        model, _ = conv()
        model.eval()
        before, rows = loss(model), []
        finetune(
            model,
            [pictures()],
            epochs=6,
            schedule=Schedule(lr=0.1, decay="cosine", clip=1.0, seed=3),
            progress=lambda *row: rows.append(row),
        )
        assert not model.training and loss(model) < 0.8 * before
        return rows, model[0].weight.detach()

    (rows, weight), (again, same) = run(), run()
    assert [row[:2] for row in rows] == [(i + 1, 18) for i in range(18)]
    assert rows == again and torch.equal(weight, same)


def test_what_cannot_be_trained_on_is_refused() -> None:
    model, _ = conv()
    with pytest.raises(ValueError, match="there are no labels"):
        finetune(model, [Source("u", [Batch((torch.randn(2, 3, 5, 5),))])])
    model[3].bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="smaller learning rate"):
        finetune(model, [pictures()])
