"""``regrow prune --memory``: the same run folder with one block in memory, planned before it starts."""

import json
import re

import pytest

from regrow.evaluation import choice
from regrow.jobs import memory_needs, models
from regrow.streaming import requirements
from regrow.streaming.checkpoint import Checkpoint
from regrow.streaming.network import StreamedNetwork
from regrow.streaming.opening import open_network
from regrow.streaming.weights import BlockResults

SOURCE = (
    "--method",
    "flap",
    "--keep",
    "0.7",
    "--source",
    "news",
    "--tokens",
    "64",
    "--eval-tokens",
    "64",
    "--seq-len",
    "32",
)
pytestmark = pytest.mark.usefixtures("no_figures")
FILES = ("ledger.json", "model.safetensors", "shapes.json", "config.json", "probe.st", "axes.json")


@pytest.fixture
def streams(monkeypatch):
    """Let every network be too large for memory as a whole."""
    monkeypatch.setattr(requirements, "WHOLE_COPIES", 1e9)


OBS = ("--method", "obs")
GPRUNE = ("--method", "gprune", "--set", "steps=0", "--set", "start=base", "--set", "shards=1", "--source", "code")


@pytest.mark.parametrize("method", [OBS, (*GPRUNE, "--source", "talk")], ids=["obs", "gprune"])
def test_a_streamed_run_is_that_of_a_run_in_memory(regrow, tiny_language_model, tmp_path, streams, method):
    command = ("prune", str(tiny_language_model), *SOURCE, *method)
    assert regrow(*command, "--out", "whole")[0] == 0
    code, said, _ = regrow(*command, "--memory", "64GiB", "--out", "streamed")
    assert code == 0
    assert "one of 2 blocks at a time and hidden states in memory" in said
    for name in (*FILES, "before/model.safetensors", "before/shapes.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name
    rows = [
        {row["what"]: row for row in map(json.loads, (tmp_path / out / "metrics.jsonl").read_text().splitlines())}
        for out in ("whole", "streamed")
    ]
    for what in ("size", "perplexity", "paired"):
        assert rows[0][what] == rows[1][what]
    assert rows[1]["verify"]["ok"]
    assert rows[1]["verify"]["blocks"] == 2
    run = json.loads((tmp_path / "streamed" / "run.json").read_text())
    assert "--memory 64GiB" in run["command"]
    assert run["memory"]["limit"] == 2**36
    assert run["memory"]["peak"] > 2**20


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")], ids=["stored", "bfloat16"])
def test_a_streamed_run_of_a_run_is_that_of_a_run_in_memory(
    regrow, run_once, tiny_language_model, tmp_path, streams, dtype
):
    run_once("prune", str(tiny_language_model), *SOURCE, *dtype, "--memory", "64GiB", out="first")
    command = ("prune", "first", *SOURCE, *dtype[:1], *(("float32",) if dtype else ()))
    assert regrow(*command, "--out", "whole")[0] == 0
    code, said, _ = regrow(*command, "--memory", "64GiB", "--out", "streamed")
    assert code == 0
    assert "one of 2 blocks at a time" in said
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "streamed").iterdir()}
    for name in (*FILES, "before/model.safetensors", "before/shapes.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes(), name


def test_a_streamed_evaluation_is_that_of_one_in_memory(
    regrow, run_once, tiny_language_model, tmp_path, streams, monkeypatch
):
    items = [{"query": f"The {i}", "choices": [" cat sat", " dog", " bird flew away"], "gold": i % 3} for i in range(9)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    monkeypatch.setattr(choice, "CHOICE_TOKENS", 32)
    run_once("prune", str(tiny_language_model), *SOURCE, out="run")
    words = ("--source", "news", "--source", "code", "--eval-tokens", "96", "--seq-len", "32")
    for model, batch_size in ((str(tiny_language_model), "1"), ("run", "2")):
        command = ("evaluate", model, *words, "--batch-size", batch_size, "--choices", "items.jsonl", "--json")
        assert regrow(*command, "whole.json")[0] == 0
        code, said, _ = regrow(*command, "streamed.json", "--memory", "64GiB")
        assert code == 0
        assert "one of 2 blocks at a time and hidden states in memory" in said
        assert re.search(r"at the peak, .* predicted", said)
        whole, streamed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "streamed"))
        assert streamed.pop("memory")["peak"] > 0
        assert whole == streamed
    assert regrow("evaluate", "run", *words, "--json", "single.json")[0] == 0
    single = json.loads((tmp_path / "single.json").read_text())
    for one, joined in zip(single["perplexity"], whole["perplexity"], strict=True):
        assert one["nll_per_window"] == pytest.approx(joined["nll_per_window"], rel=1e-5)


def test_what_is_not_evaluated_block_by_block_is_refused(regrow, tiny_language_model, streams):
    code, _, error = regrow("evaluate", str(tiny_language_model), "--speed", "--memory", "64GiB")
    assert code
    assert "--speed needs the whole network in memory" in error


def test_axes_are_listed_without_reading_weights(regrow, run_once, tiny_language_model, monkeypatch):
    run_once("prune", str(tiny_language_model), *SOURCE, out="run")
    said = {}
    for reads in (True, False):
        with monkeypatch.context() as patch:
            if reads:
                patch.setattr(models, "open_network", lambda *given: int("no number"))
            else:
                patch.setattr(Checkpoint, "read", None)
                patch.setattr(models, "load_model", None)
            for model in (str(tiny_language_model), "run"):
                code, said[reads, model], _ = regrow("show", model, "--all")
                assert code == 0
    for model in (str(tiny_language_model), "run"):
        assert said[True, model] == said[False, model]


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_gguf_written_tensor_by_tensor_is_that_of_the_whole_model(
    regrow, run_once, tiny_language_model, tmp_path, dtype
):
    pytest.importorskip("gguf")
    run_once("prune", str(tiny_language_model), *SOURCE, out="run")
    for model in (str(tiny_language_model), "run"):
        command = ("export", model, "--to", "gguf", "--dtype", dtype, "--out")
        code, whole, _ = regrow(*command, "whole.gguf")
        assert code == 0
        code, said, error = regrow(*command, "each.gguf", "--memory", "8GiB")
        assert code == 0, error
        assert "one tensor at a time" in said
        assert whole.splitlines()[1:] == said.splitlines()[2:-1]  # all but the name and the lines about memory
        assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "each.gguf").read_bytes()
    code, _, error = regrow("export", "run", "--to", "gguf", "--out", "each.gguf", "--memory", "1MiB")
    assert code
    assert "use --memory" in error
    code, _, error = regrow("export", "run", "--to", "onnx", "--out", "net.onnx", "--memory", "8GiB")
    assert code
    assert "onnx needs the whole network in memory" in error


def test_the_memory_of_a_recovery_is_predicted_and_measured(regrow, run_once, tiny_language_model, tmp_path):
    run_once("prune", str(tiny_language_model), *SOURCE, "--method", "magnitude", "--tokens", "128", out="run")
    code, said, _ = regrow("recover", "run", "--by", "refit", "--tokens", "128", "--memory", "64GiB", "--out", "fit")
    assert code == 0
    assert re.search(r"^memory: about .* of 64 GiB, with all blocks in memory", said)
    assert re.search(r"at the peak, .* predicted", said)
    assert json.loads((tmp_path / "fit" / "run.json").read_text())["memory"]["peak"] > 2**20
    for by in ("refit", "lora", "distil"):
        code, _, error = regrow("recover", "run", "--by", by, "--memory", "1MiB", "--out", "refused")
        assert code
        assert re.search(rf"recovery by {by} within 1 MiB of memory is impossible.*use --memory \d", error)
        assert not (tmp_path / "refused").exists()


def test_a_damaged_run_is_found_when_its_blocks_are_read(regrow, run_once, tiny_language_model, tmp_path, streams):
    run_once("prune", str(tiny_language_model), *SOURCE, "--memory", "64GiB", out="first")
    path = tmp_path / "first" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    code, _, error = regrow("prune", "first", *SOURCE, "--memory", "64GiB", "--out", "second")
    assert code
    assert "does not have the recorded SHA-256" in error


def test_a_killed_run_ends_as_one_that_was_not(regrow, tiny_language_model, tmp_path, streams, monkeypatch):
    monkeypatch.setattr(requirements.MemoryPlan, "on_disk", True)
    command = ("prune", str(tiny_language_model), *SOURCE, "--memory", "64GiB", "--no-undo", "--out")
    assert regrow(*command, "whole")[0] == 0
    true, left = StreamedNetwork.resident, [0]

    def counted(self, *names):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return true(self, *names)

    monkeypatch.setattr(StreamedNetwork, "resident", counted)
    for moment in (3, 7, 11, 15):  # in calibration, in both evaluations, and in the cut
        left[0] = moment
        assert regrow(*command, "killed")[0]
    assert regrow(*command, "killed")[0] == 0
    for name in (*FILES, "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {p.name for p in (tmp_path / "killed").iterdir()}


def test_a_network_that_fits_is_loaded_whole(regrow, tiny_language_model, tmp_path):
    code, said, _ = regrow("prune", str(tiny_language_model), *SOURCE, "--memory", "64GiB", "--dry-run", "plan.json")
    assert code == 0
    assert "with all blocks in memory" in said


def test_a_dry_run_keeps_hidden_states_in_files_and_deletes_them(regrow, tiny_language_model, streams, monkeypatch):
    places, windows, true, predict = [], [], BlockResults.__init__, memory_needs.plan_memory

    def watched(self, folder=None):
        places.append(folder)
        true(self, folder)

    def counted(network, limit, many, tokens, **more):
        windows.append(many)
        return predict(network, limit, many, tokens, **more)

    monkeypatch.setattr(BlockResults, "__init__", watched)
    monkeypatch.setattr(memory_needs, "plan_memory", counted)
    monkeypatch.setattr(requirements.MemoryPlan, "on_disk", True)
    words = (*SOURCE, "--source", "code", "--tokens", "16", "--eval-tokens", "16", "--memory", "64GiB")
    code, said, _ = regrow("prune", str(tiny_language_model), *words, "--dry-run", "plan.json")
    assert code == 0
    assert "hidden states in files" in said
    assert places
    assert not [place for place in places if place is None or place.exists()]
    assert windows == [2]  # each source is at least a window


def test_too_little_memory_is_refused_with_the_least(regrow, tiny_language_model):
    code, _, error = regrow("prune", str(tiny_language_model), *SOURCE, "--memory", "1MiB", "--out", "run")
    assert code
    assert re.search(r"within 1 MiB of memory is impossible.*use --memory \d", error)


@pytest.mark.parametrize(("whole", "block"), [(2**33, 2**20), (2**33, 2**38)], ids=["one fits", "none fits"])
def test_the_sums_of_obs_count(regrow, tiny_language_model, monkeypatch, whole, block):
    """Of the whole network, which then does not fit, and of a block."""
    monkeypatch.setattr(requirements, "predict_bytes", lambda layers, together: block if together else whole)
    command = ("prune", str(tiny_language_model), *SOURCE, "--memory", "4GiB", "--dry-run", "plan.json")
    assert "with all blocks in memory" in regrow(*command)[1]
    code, said, error = regrow(*command, *OBS)
    if block < whole:
        assert code == 0 and "with one of 2 blocks at a time" in said
    else:
        assert code and re.search(r"within 4 GiB of memory is impossible; use --memory \d", error)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--method", "llm_pruner"), "method llm_pruner"),
        (("--method", "fisher"), "method fisher"),
        (("--method", "gprune"), "method gprune"),
        (("--precision", "bfloat16"), "--precision bfloat16"),
    ],
)
def test_what_needs_the_whole_network_is_refused(regrow, tiny_language_model, streams, words, match):
    code, _, error = regrow("prune", str(tiny_language_model), *SOURCE, *words, "--memory", "64GiB", "--out", "run")
    assert code
    assert match in error
    assert "needs the whole network in memory" in error


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--method", "llm_pruner"), "method llm_pruner needs the whole network"),
        (("--method", "fisher"), "method fisher needs the whole network"),
        (("--method", "gprune", "--source", "code", "--source", "talk"), "method gprune needs the whole network"),
        ((), ""),
    ],
)
def test_gradients_count(regrow, tiny_language_model, monkeypatch, words, match):
    monkeypatch.setattr(memory_needs, "SPARE_BYTES", 2**37)
    command = ("prune", str(tiny_language_model), *SOURCE, *words, "--memory", "64GiB", "--dry-run", "plan.json")
    code, said, error = regrow(*command)
    if match:
        assert code
        assert match in error
    else:
        assert code == 0
        assert "with all blocks in memory" in said


def test_the_terms_of_recovery_and_gradients_follow_the_weights(tiny_language_model):
    model = open_network(str(tiny_language_model)).loaded.model
    own = sum(4 * one.numel() for one in model.parameters())
    recoveries = {by: memory_needs._predict_recovery_bytes(by, model, 32) for by in ("refit", "lora", "distil")}
    assert own < recoveries["refit"] < recoveries["lora"]
    assert recoveries["distil"] > 5 * own  # weights, gradients, two moments, the best values


def test_layers_are_fitted_without_a_limit_of_memory(regrow, tiny_language_model):
    words = ("prune", str(tiny_language_model), *SOURCE, "--reconstruct", "--memory", "64GiB", "--out", "run")
    code, _, error = regrow(*words)
    assert code == 2 and "--reconstruct runs in one process without --memory" in error


def test_amounts_and_models_that_do_not_fit_the_option_are_refused(regrow, tiny_language_model):
    code, _, error = regrow("prune", str(tiny_language_model), *SOURCE, "--memory", "lots", "--out", "run")
    assert code
    assert "lots" in error
    code, _, error = regrow("prune", "resnet18", "--keep", "0.7", "--memory", "1GiB", "--out", "run")
    assert code
    assert "is not read block by block" in error
