"""``regrow search`` in several processes: the plans and losses of a single one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from distributed.processes import finish, start

WORDS = ("search", "cells:4-2-1", "--data", "digits", "--target", "params=30%", "--train", "90", "--test", "30")
MORE = ("--stages", "1", "--epochs", "3", "--retrain", "1", "--batch-size", "24")


@pytest.mark.parametrize(
    "given", [("--set", "warm=1", "--set", "every=1"), ("--method", "trials")], ids=["mgas", "trials"]
)
def test_two_ranks_search_the_network_of_one(given, regrow, tmp_path):
    two = start("-m", "regrow", *WORDS, *MORE, *given, "--out", "two", cwd=tmp_path)
    assert regrow(*WORDS, *MORE, *given, "--out", "one")[0] == 0
    results = finish(two)
    assert [code for _, _, code in results] == [0, 0], results
    assert (tmp_path / "one" / "ledger.json").read_bytes() == (tmp_path / "two" / "ledger.json").read_bytes()
    both = [
        [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    assert [row["what"] for row in both[0]] == [row["what"] for row in both[1]]
    commits = [[row for row in rows if row["what"] == "commit"] for rows in both]
    assert commits[0] and [row["dropped"] for row in commits[0]] == [row["dropped"] for row in commits[1]]
    assert [row["accuracy_before"] for row in commits[0]] == [row["accuracy_before"] for row in commits[1]]
    chosen = [[row["chosen"] for row in rows if row["what"] == "trial"] for rows in both]
    assert chosen[0] == chosen[1] and len(chosen[0]) == (1 if "trials" in given else 0)
    assert [row for row in both[0] if row["what"] == "test"] == [row for row in both[1] if row["what"] == "test"]
    one, other = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-5) for name in one)
