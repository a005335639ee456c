"""``memory=`` of ``regrow.evaluate``: the results of a call that loads the network whole."""

import pytest
import torch

import regrow
from regrow.jobs import evaluate
from regrow.streaming import requirements


@pytest.fixture
def streams(monkeypatch):
    """Let every network be too large for memory as a whole."""
    monkeypatch.setattr(requirements, "WHOLE_COPIES", 1e9)


def data():
    torch.manual_seed(0)
    ids = [torch.randint(1000, (2, 16)) for _ in range(3)]
    return {f"s{i}": [{"input_ids": one, "labels": one}] * 2 for i, one in enumerate(ids)}


def test_a_streamed_evaluation_is_that_of_one_in_memory(tiny_language_model, streams):
    whole = regrow.evaluate(str(tiny_language_model), data())
    said = []
    more = {"memory": "64GiB", "progress": lambda done, total, what: said.append(what)}
    assert regrow.evaluate(str(tiny_language_model), data(), **more) == whole
    assert "one of 2 blocks at a time" in said[0]


def test_a_module_is_not_read_from_files():
    with pytest.raises(ValueError, match="give the name of a model or a folder"):
        regrow.evaluate(torch.nn.Linear(2, 2), torch.ones(2, 2), memory="1GiB")


def test_padded_and_unlabelled_positions_count(tiny_language_model, monkeypatch):
    counts, planned = [], evaluate.plan_memory

    def counted(network, limit, windows, tokens, **more):
        counts.append(tokens)
        return planned(network, limit, windows, tokens, **more)

    monkeypatch.setattr(evaluate, "plan_memory", counted)
    ids = torch.randint(1000, (2, 16))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    regrow.evaluate(str(tiny_language_model), [{"input_ids": ids, "labels": labels}], memory="64GiB")
    assert counts == [32]
