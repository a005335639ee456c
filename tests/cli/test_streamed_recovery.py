"""``regrow recover --memory``: the same run folder with one block of both networks in memory."""

import json

import pytest
import torch

from regrow.jobs import memory_needs
from regrow.methods.recovery import FORMAT, ChangedTensors
from regrow.methods.recovery.refit_work import RefitWork
from regrow.store.tensors import write_tensors
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.requirements import MemoryPlan

PRUNE = ("--method", "magnitude", "--keep", "0.7", "--source", "news", "--source", "code", "--tokens", "128")
PRUNE = (*PRUNE, "--eval-tokens", "64", "--seq-len", "32")
pytestmark = pytest.mark.usefixtures("no_figures")
FILES = ("ledger.json", "model.safetensors", "shapes.json", "config.json", "probe.st", "axes.json")


@pytest.fixture
def streams(monkeypatch):
    """Let every two networks be too large for memory together."""
    monkeypatch.setattr(memory_needs, "SPARE_BYTES", 2**40)


def rows(folder):
    """Return the measurements of a run, without times."""
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "seconds"} for row in every]


@pytest.fixture
def run(run_once, tiny_language_model):
    """Prune the model into the folder ``run``."""

    def prune(*words):
        run_once("prune", str(tiny_language_model), *PRUNE, *words, out="run")

    return prune


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_streamed_recovery_is_that_of_one_in_memory(regrow, run, run_once, tmp_path, streams, dtype):
    run(*(("--dtype", dtype) if dtype == "bfloat16" else ()))
    command = ("recover", "run", "--by", "refit", "--tokens", "256", "--out")
    run_once(*command[:-1], out="whole")
    code, said, error = regrow(*command, "streamed", "--memory", "64GiB")
    assert code == 0, error
    assert "one of 2 blocks at a time and hidden states in memory" in said
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    assert rows(tmp_path / "whole") == rows(tmp_path / "streamed")
    row = next(row for row in rows(tmp_path / "streamed") if row["what"] == "recovery")
    assert any(layer["ridge"] for layer in row["layers"])
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    record = json.loads((tmp_path / "streamed" / "run.json").read_text())
    assert record["memory"]["limit"] == 2**36
    assert "--memory 64GiB" in record["command"]


def test_a_killed_recovery_ends_as_one_that_was_not(regrow, run, run_once, tmp_path, streams, monkeypatch):
    run()
    command = ("recover", "run", "--by", "refit", "--tokens", "256", "--out")
    run_once(*command[:-1], out="whole")
    monkeypatch.setattr(MemoryPlan, "on_disk", True)
    true, left, killed, solved = StreamedNetwork.resident, [0], 0, []
    solve = RefitWork.solve

    def counted(self, *names):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return true(self, *names)

    def noted(self, layer, *rows):
        solved[-1].append(layer.name)
        solve(self, layer, *rows)

    monkeypatch.setattr(StreamedNetwork, "resident", counted)
    monkeypatch.setattr(RefitWork, "solve", noted)
    for moment in (8, 12, 14, 16, 20, 24, 0):  # the last one never comes
        left[0] = moment
        solved.append([])
        if (code := regrow(*command, "killed", "--memory", "64GiB")[0]) == 0:
            break
        killed += 1
    assert code == 0
    assert killed > 1
    every = [name for some in solved for name in some]
    assert len(every) == len({*every})
    assert sum(map(bool, solved)) > 1  # a part of the layers was solved before the last call
    for name in FILES:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--by", "refit", "--memory", "1MiB"), "of memory is impossible; use --memory"),
        (("--by", "refit", "--set", "target=dense"), "fitting to what the dense network has needs the whole network"),
        (("--by", "lora"), "recovery by lora within 64 GiB of memory is impossible"),
    ],
)
def test_what_is_not_recovered_block_by_block_is_refused(regrow, run, streams, words, match):
    run()
    code, _, error = regrow("recover", "run", "--tokens", "256", "--memory", "64GiB", *words, "--out", "recovered")
    assert code
    assert match in error


def test_sums_of_left_out_sources_count(regrow, run, streams, monkeypatch):
    run()
    predict, counts = memory_needs._predict_refit_bytes, []

    def counted(model, tokens, window, parts=3):
        counts.append(parts)
        return predict(model, tokens, window, parts)

    monkeypatch.setattr(memory_needs, "_predict_refit_bytes", counted)
    for choose_on, sums in (("held_out", 3), ("left_out_source", 4)):
        counts.clear()
        words = ("--by", "refit", "--set", f"choose_on={choose_on}", "--tokens", "256", "--memory", "64GiB")
        assert regrow("recover", "run", *words, "--out", choose_on)[0] == 0
        assert counts == [sums]


def test_damaged_files_of_an_interrupted_recovery_are_deleted(tmp_path):
    changed, made = ChangedTensors(tmp_path), {"a": torch.ones(2)}
    for record in (None, [], {"weight": "a"}):
        write_tensors(tmp_path / "000000.safetensors", made, {"key": "k", "record": record}, FORMAT)
        changed.open("k")
        assert not changed.records
        assert not list(tmp_path.glob("*.safetensors"))
    changed.write(made, {"weight": "a", "ridge": 0.1})
    changed.open("k")
    assert "a" in changed
    assert changed.records == [{"weight": "a", "ridge": 0.1}]
