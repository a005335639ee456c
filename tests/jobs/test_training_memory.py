"""The memory of learning: what a step of a method takes of the data."""

import pytest
import torch

from regrow.jobs import training_memory
from regrow.jobs.learn_inputs import specs_of
from regrow.jobs.task_sequences import read_tasks
from regrow.nets.small import small
from regrow.settings.learn import Settings


@pytest.mark.parametrize(
    ("method", "given", "examples"),
    [
        ("naive", {}, 16),
        ("naive", {"keep": "data"}, 32),
        ("replay", {}, 32),
        ("sparsegrow", {}, 16),
        ("sparsegrow", {"memory": 10}, 32),
    ],
)
def test_replayed_examples_count_in_a_step(monkeypatch, method, given, examples):
    counts = []

    def predict(model, batch, step):
        counts.append(len(batch.labels))
        return 0

    monkeypatch.setattr(training_memory, "_predict", predict)
    more = {"method": method, "method_settings": given, "batch_size": 16, "train": 80, "test": 40}
    settings = Settings(("permuted:digits:2",), "mlp:16", **more)
    model, _ = small("mlp:16", (1, 8, 8), 10)
    tasks, device = read_tasks(specs_of(settings)), torch.device("cpu")
    training_memory.plan_learning(settings, lambda: model, tasks, device, "64GiB", lambda line: None)
    assert counts == [examples, 40]
