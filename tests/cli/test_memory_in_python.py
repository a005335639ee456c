"""``memory=`` of ``regrow.prune`` and ``regrow.evaluate``: the results of a call that loads the network whole."""

import json

import pytest
import torch

import regrow
from regrow.jobs import evaluate
from regrow.streaming import requirements

FILES = ("ledger.json", "model.safetensors", "shapes.json", "config.json", "probe.st", "axes.json", "scores.json")


@pytest.fixture
def streams(monkeypatch):
    """Let every network be too large for memory as a whole."""
    monkeypatch.setattr(requirements, "WHOLE", 1e9)


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


def test_a_streamed_run_is_that_of_a_run_in_memory(tiny_language_model, tmp_path, streams):
    given = {"keep": 0.7, "out": tmp_path / "whole"}
    model, plan = regrow.prune(str(tiny_language_model), data(), **given)
    given |= {"memory": "64GiB", "out": tmp_path / "streamed"}
    empty, same = regrow.prune(str(tiny_language_model), data(), **given)
    assert same.to_json() == plan.to_json()
    assert {k: p.shape for k, p in empty.named_parameters()} == {k: p.shape for k, p in model.named_parameters()}
    for name in (*FILES, "before/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    sizes = [
        list(map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines()))
        for out in ("whole", "streamed")
    ]
    checks = [[row.pop("ok") for row in rows if row["what"] == "verify"] for rows in sizes]
    assert checks == [[True], [True]]  # of the whole network, and of its blocks
    assert len(sizes[0]) > 4
    assert [row for row in sizes[0] if row["what"] != "verify"] == [row for row in sizes[1] if row["what"] != "verify"]


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({}, "give out="),
        ({"method": "llm_pruner"}, "computes gradients of all weights, needs the whole network"),
        ({"precision": "bfloat16"}, "precision=bfloat16 needs the whole network"),
        ({"memory": "1MiB"}, "use --memory"),
    ],
)
def test_what_is_not_pruned_block_by_block_is_refused(tiny_language_model, streams, more, match):
    with pytest.raises(ValueError, match=match):
        regrow.prune(str(tiny_language_model), data(), **{"memory": "64GiB", **more})


def test_the_sums_of_obs_count(tiny_language_model, streams, monkeypatch):
    monkeypatch.setattr(requirements, "predict_products", lambda layers, together: 2**38)
    with pytest.raises(ValueError, match="summing products within 64 GiB of memory is impossible"):
        regrow.prune(str(tiny_language_model), data(), method="obs", memory="64GiB")


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
