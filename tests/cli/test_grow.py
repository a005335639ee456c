"""``regrow grow``: wider models that compute the same."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from regrow.jobs import grow as growth
from regrow.jobs.recording import Invocation
from regrow.settings.grow import Settings
from regrow.store import load
from regrow.store.run_folder import RunFolder


def test_a_grown_model_loads_computes_the_same_and_grows_again(regrow: Run, tmp_path: Path) -> None:
    code, out, err = regrow("grow", "toys:classifier", "--channels", "+25%", "--out", "run")
    assert code == 0, err
    assert "Its outputs equal those of the model before." in " ".join(out.split())
    import toys

    net, x = toys.classifier()
    grown = load("run", model=lambda: toys.classifier())
    assert grown.body[0].out_channels == 15
    torch.testing.assert_close(grown(x), net.eval()(x), rtol=1e-5, atol=1e-6)
    assert (tmp_path / "run" / "report.html").is_file()
    code, out, err = regrow("grow", "run", "--code", "toys:classifier", "--axis", "body.0.weight:0=+1", "--out", "two")
    assert code == 0, err
    assert load("two", model=lambda: toys.classifier()).body[0].out_channels == 16
    words = ("--config", "two", "--code", "toys:classifier", "--axis", "body.0.weight:0=+2")
    code, out, err = regrow("grow", *words, "--out", "three")
    assert code == 0, err
    assert load("three", model=lambda: toys.classifier()).body[0].out_channels == 17


def test_what_cannot_grow_is_refused_in_one_line(regrow: Run) -> None:
    for words, line in (
        ((), "nothing grows: give --mlp"),
        (("--mlp", "0"), "--mlp: an increase is above 0"),
        (("--axis", "0"), "--axis takes KEY=AMOUNT"),
        (("--heads", "+1"), "the network has no attention heads"),
        (("--axis", "body.0.weight:2=+1"), "cannot be widened"),
    ):
        code, _, err = regrow("grow", "toys:classifier", *words, "--out", "run")
        assert code == 2
        assert line in err


def test_a_dry_run_prints_the_plan_that_apply_carries_out(regrow: Run, tmp_path: Path) -> None:
    code, out, err = regrow("grow", "toys:classifier", "--channels", "+3", "--dry-run", "plan.json")
    assert code == 0, err
    assert "body.0.weight:0" in out and not (tmp_path / "run").exists()
    code, out, err = regrow("apply", "plan.json", "toys:classifier", "--out", "wide")
    assert code == 0, err
    assert json.loads((tmp_path / "plan.json").read_text())["origin"]["channels"] == "+3"


def test_a_killed_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    settings = Settings("toys:classifier", channels="+2", fill="split")
    whole = growth.grow_named(settings, Invocation(tmp_path / "whole"))

    def killed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("regrow.store.write_model", killed)
        with pytest.raises(KeyboardInterrupt):
            growth.grow_named(settings, Invocation(tmp_path / "run"))
    again = growth.grow_named(settings, Invocation(tmp_path / "run"))
    for name in ("model.safetensors", "ledger.json", "metrics.jsonl"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_blocks_are_inserted_and_the_model_is_an_ordinary_one(
    regrow: Run, tiny_language_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    words = ("grow", str(tiny_language_model), "--blocks", "+1", "--mlp", "+25%", "--heads", "+2", "--out", "run")
    code, out, err = regrow(*words)
    assert code == 0, err
    # A wider product has zeros as new terms; some processors sum the others in another order (2.8e-16 on an AMD EPYC).
    words = " ".join(out.split())
    assert re.search(r"equal those of the model before. Largest difference: (0|\d(\.\d)?·10⁻¹[⁵⁶⁷]),", words)
    assert regrow("export", "run", "--to", "transformers", "--out", "plain")[0] == 0
    assert not (tmp_path / "plain" / "modeling_regrow.py").exists()
    plain, dense = (AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "plain", tiny_language_model))
    x = torch.arange(5)[None]
    assert plain.config.num_hidden_layers == 3
    torch.testing.assert_close(plain(x).logits, dense(x).logits, rtol=1e-4, atol=1e-4)


def test_the_grown_model_is_trained_on_a_source(regrow: Run, tmp_path: Path) -> None:
    words = ("grow", "toys:classifier", "--channels", "+4", "--on", "digits", "--tokens", "128", "--eval-tokens", "64")
    code, out, err = regrow(*words, "--steps", "6", "--lr", "0.01", "--train", "all", "--out", "run")
    assert code == 0, err
    assert "Trained all" in out
    assert [row["model"] for row in RunFolder.open(tmp_path / "run").metrics() if row["what"] == "choice"] == [
        "before",
        "after",
    ]
    code, out, err = regrow("grow", "toys:classifier", "--channels", "+4", "--on", "digits", "--out", "two")
    assert (code, "add --steps 200" in err) == (2, True)


def test_a_folder_that_is_deleted_meanwhile_is_an_error(regrow: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def deleted(*inputs: object, **options: object) -> RunFolder:
        folder = run(*inputs, **options)
        shutil.rmtree(folder.path)
        return folder

    run = growth.grow_named
    monkeypatch.setattr(growth, "grow_named", deleted)
    code, _, err = regrow("grow", "toys:residual", "--mlp", "+4", "--out", "run")
    assert code == 2 and "run is not a run folder" in err
