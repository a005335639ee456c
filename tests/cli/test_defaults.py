"""What is chosen where no method is named: the run says so, and a named method is left as it is."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import regrow as package
from cli.conftest import Run
from regrow.core.errors import InputError
from regrow.data import windows
from regrow.jobs.inputs import read_sources
from regrow.jobs.pruning_inputs import explain_too_little, make_source_specs, read_training_text
from regrow.nets import load as load_named
from regrow.settings.prune import RECOMMENDED, Settings, choose_defaults

SMALL = ("--tokens", "512", "--eval-tokens", "256", "--seq-len", "64")


transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")


def record(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "run.json").read_text())


def test_a_language_model_gets_the_recommended_method_text_and_repair(regrow: Run, tiny_language_model: Path) -> None:
    model = str(tiny_language_model)
    code, out, err = regrow("prune", model, "--keep", "0.8", *SMALL, "--out", "run")
    assert code == 0, err
    run = record("run")
    chosen = {name: run["settings"][name] for name in RECOMMENDED["text"]}
    assert chosen == json.loads(json.dumps(RECOMMENDED["text"]))
    assert run["asked"]["method"] == "" and run["settings"]["precision"] in ("float32", "bfloat16")
    assert "note: chosen: --method fisher --set allocation=measured" in " ".join(out.split())
    assert re.search(r"--distil 16384.* about \d+ min left", err)
    assert run["settings"]["distil"] == 2**14 and "--distil 16384" in out
    code, _, err = regrow("prune", model, "--keep", "0.8", *SMALL, "--out", "run")
    assert code == 2 and "holds this very run, finished" in err
    code, _, err = regrow("prune", "--config", "run", model, "--out", "again")  # says what was chosen
    assert code == 0, err
    assert record("again")["settings"] == run["settings"]
    assert Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()


def test_more_time_trains_a_language_model_after_the_cut(regrow: Run, tiny_language_model: Path) -> None:
    words = ("prune", str(tiny_language_model), "--keep", "0.8", *SMALL, "--method", "magnitude", "--source", "talk")
    for name, extra in (("plain", ()), ("taught", ("--distil", "2048"))):
        code, _, err = regrow(*words, *extra, "--out", name)
        assert code == 0, err
    rows = [json.loads(line) for line in Path("taught/metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["what"] == "distillation"]
    assert 1024 < row["tokens"] <= 2048 and row["steps"] >= 1
    assert Path("taught/model.safetensors").read_bytes() != Path("plain/model.safetensors").read_bytes()
    assert "trained on" in Path("taught/report.html").read_text()
    taught, dense = package.load("taught"), package.load("taught/before")
    assert sum(p.numel() for p in taught.parameters()) < sum(p.numel() for p in dense.parameters())
    assert choose_defaults(Settings("m", time="hour"), "text").distil == 2**18
    assert choose_defaults(Settings("m"), "text", 3 * 10**8).distil == 2**14
    small, large, named = Settings("m", time="quick"), Settings("m"), Settings("m", method="flap")
    assert {choose_defaults(one, "text", 3 * 10**8 + (one is large)).method for one in (small, large)} == {"flap"}
    assert not any(
        choose_defaults(one, "text", n).distil for one, n in ((small, 1), (large, 3 * 10**8 + 1), (named, 1))
    )
    code, _, err = regrow(*words, "--time", "hour", "--memory", "2GiB", "--out", "refused")
    assert code == 2 and "--time hour runs in one process without --memory" in err
    with pytest.raises(InputError, match="--distil trains language models"):
        choose_defaults(Settings("m", distil=5), "examples")


def test_one_block_at_a_time_takes_what_runs_so(regrow: Run, tiny_language_model: Path) -> None:
    words = ("prune", str(tiny_language_model), "--keep", "0.8", *SMALL, "--memory", "2GiB")
    code, _, err = regrow(*words, "--out", "run")
    assert code == 0, err
    settings = record("run")["settings"]
    assert (settings["method"], settings["method_settings"], settings["reconstruct"]) == ("flap", {}, False)


def test_images_are_fitted_and_a_named_method_is_left_as_it_is(regrow: Run) -> None:
    code, _, err = regrow("prune", "toys:classifier", "--keep", "0.6", "--source", "digits", "--out", "chosen")
    assert code == 0, err
    assert record("chosen")["settings"]["reconstruct"] is True
    words = ("prune", "toys:classifier", "--keep", "0.6", "--source", "digits")
    assert regrow(*words, "--method", "fisher", "--out", "named")[0] == 0
    assert record("named")["settings"]["reconstruct"] is False and record("named")["settings"]["round_to"] == 1
    assert regrow(*words, "--no-reconstruct", "--out", "plain")[0] == 0
    assert record("plain")["settings"]["reconstruct"] is False
    assert "--no-reconstruct" in record("plain")["command"]


def test_finetuning_without_images_is_refused(regrow: Run, tiny_language_model: Path) -> None:
    words = ("--keep", "0.6", "--method", "magnitude", "--finetune", "2", "--out", "run")
    code, _, err = regrow("prune", "toys:classifier", *words)
    assert code == 2 and "--finetune 2 trains image models" in err and "give --source" in err
    code, _, err = regrow("prune", str(tiny_language_model), *words)
    assert code == 2 and "take --time hour" in err and not Path("run").exists()


def test_windows_longer_than_the_model_takes_are_refused(regrow: Run, tiny_language_model: Path) -> None:
    code, _, err = regrow("evaluate", str(tiny_language_model), "--source", "news", "--seq-len", "100000")
    assert code == 2 and "--seq-len 100000: the model takes at most" in err


def test_text_for_a_model_of_other_outputs_is_refused(regrow: Run, tiny_language_model: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.BertConfig(**sizes)
    shutil.copytree(tiny_language_model, "bert")
    for file in (*Path("bert").glob("*.safetensors"), Path("bert/config.json")):
        file.unlink()
    transformers.BertForMaskedLM(config).save_pretrained("bert")
    code, _, err = regrow("evaluate", "bert", "--source", "news", "--seq-len", "32")
    assert code == 2 and "BertForMaskedLM does not predict the next token" in err


def test_what_is_stated_stays() -> None:
    chosen = choose_defaults(Settings("m", keep=0.9, round_to=8, sources=("talk",)), "text")
    assert (chosen.round_to, chosen.sources, chosen.reconstruct) == (8, ("talk",), True)
    with pytest.raises(InputError, match="compensate is a setting of a method, and none is named"):
        Settings("m", keep=0.9, method_settings={"compensate": False})


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


INPUTS, LABELS = torch.randn(64, 6), torch.randint(3, (64,))


@pytest.mark.parametrize(
    ("data", "method"),
    [((INPUTS, LABELS), "fisher"), (INPUTS, "flap"), (None, "magnitude")],
    ids=["labels", "no", "none"],
)
def test_python_chooses_by_the_data(data: Any, method: str) -> None:
    _, plan = package.prune(network(), data, keep=0.5, example=INPUTS[:2])
    assert plan.origin["method"] == method


def test_python_wants_a_size_too() -> None:
    with pytest.raises(InputError, match=r"say how much stays: keep=0\.8"):
        package.prune(network(), (INPUTS, LABELS))


def test_a_plan_and_evaluations_are_printed_in_a_screen() -> None:
    net = nn.Sequential(*(layer for _ in range(60) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 3))
    inputs = torch.randn(32, 8)
    axes = package.trace(net, inputs)
    plan = package.Plan.keeping(axes, {axis.key: range(4) for axis in axes.free()})
    scores = package.evaluate(net, {f"set {i}": (inputs, torch.randint(3, (32,))) for i in range(40)})
    for shown in (plan, axes, scores):
        assert str(shown).count("\n") < 30 and "more" in str(shown)
        assert "<table>" in shown._repr_html_()
    assert repr(plan) == str(plan) and len(repr(scores)) < 3000


def test_training_takes_other_text_than_calibration(tiny_language_model: Path) -> None:
    loaded = load_named(str(tiny_language_model))
    settings = Settings("m", sources=("news", "talk", "generated"), tokens=512, seq_len=64, distil=2048)
    used = read_sources(make_source_specs(settings), loaded).calibration
    taught = read_training_text(settings, loaded, used)
    assert [one.name for one in taught] == ["news", "talk"] and sum(one.tokens for one in taught) > 1900
    rows = {tuple(row.tolist()) for one in used[:2] for batch in one for row in batch.args[0]}
    assert not any(tuple(row.tolist()) in rows for one in taught for batch in one for row in batch.args[0])
    assert explain_too_little(read_training_text(replace(settings, sources=("generated",)), loaded, ())) != ""


def test_in_python_a_language_model_is_trained_after_the_cut(tiny_language_model: Path, tmp_path: Path) -> None:
    loaded = load_named(str(tiny_language_model))
    text = windows(package.data.text("talk"), loaded.tokenizer, n=20, seq_len=64)
    package.prune(
        loaded.model, {"talk": text}, tokenizer=loaded.tokenizer, keep=0.8, batch_size=1, out=tmp_path / "run"
    )
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    (row,) = [row for row in rows if row["what"] == "distillation"]
    assert row["steps"] >= 1 and row["tokens"] == text.tokens
