"""Several methods and fractions from one calibration are, each, the run of one method and fraction."""

import json
from dataclasses import asdict
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Run
from regrow.core.errors import InputError
from regrow.scoring.collect import InputSums
from regrow.settings.prune import Settings, name_folders
from regrow.store.run_folder import RunFolder
from regrow.streaming import requirements

pytestmark = pytest.mark.usefixtures("no_figures")
DATA = ("--source", "news", "--tokens", "192", "--eval-tokens", "128", "--seq-len", "64")
FILES = ("model.safetensors", "ledger.json", "shapes.json", "config.json")


def record(folder: Path) -> dict[str, Any]:
    """What a run recorded, but for times and for the folder's own name."""
    run = json.loads((folder / "run.json").read_text())
    return {name: run[name] for name in ("settings", "defaults", "sources", "notes")}


def measured(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_plan_is_that_of_a_run_by_itself(
    regrow: Run, tiny_language_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    true = InputSums.__enter__
    monkeypatch.setattr(InputSums, "__enter__", lambda self: passes.append(0) or true(self))
    model = str(tiny_language_model)
    many = ("prune", model, "--keep", "0.8", "--keep", "0.6", "--method", "flap", "--method", "wanda_sp", *DATA)
    code, out, err = regrow(*many, "--out", "plans")
    assert code == 0, err
    assert len(passes) == 3, "one pass over three windows"
    assert sorted(path.name for path in Path("plans").iterdir()) == [
        "flap-0.6",
        "flap-0.8",
        "wanda_sp-0.6",
        "wanda_sp-0.8",
    ]
    for method, keep in (("flap", "0.6"), ("wanda_sp", "0.8")):
        alone, one = Path(f"alone-{method}"), Path("plans") / f"{method}-{keep}"
        code, _, err = regrow("prune", model, "--keep", keep, "--method", method, *DATA, "--out", str(alone))
        assert code == 0, err
        for name in FILES:
            assert (alone / name).read_bytes() == (one / name).read_bytes(), name
        assert measured(alone) == measured(one)
        assert record(alone) == record(one)

    passes.clear()
    code, out, err = regrow(*many, "--keep", "0.9", "--out", "plans")
    assert code == 0, err
    assert out.count("finished before") == 4
    assert len(passes) == 3
    assert len(list(Path("plans").iterdir())) == 6


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--keep", "0.8", "--keep", "0.8", "--out", "plans"), "is there twice"),
        (("--keep", "0.8", "--keep", "0.7", "--dry-run", "plan.json"), "give one value"),
        (("--method", "flap", "--method", "nothing", "--keep", "0.7", "--out", "plans"), "nothing"),
        (("--method", "flap", "--method", "wanda_sp", "--keep", "1.2", "--out", "plans"), "1.2"),
    ],
)
def test_what_cannot_be_several_is_refused_before_anything_is_made(
    regrow: Run, tiny_language_model: Path, words: tuple[str, ...], problem: str
) -> None:
    code, _, err = regrow("prune", str(tiny_language_model), *words, *DATA)
    assert code != 0
    assert problem in err
    assert not Path("plans").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--method", "gprune", "--tokens", "768", "--mark", "folded"), "gprune-0.8: gprune masks units by 0"),
        (("--method", "gprune", "--tokens", "192"), "gprune-0.8: source 'news/1' has 1 batches"),
        (("--keep", "0.001", "--tokens", "192"), "flap-0.001: keep 0.001 of weights cannot be reached"),
        (("--method", "gprune", "--tokens", "192", "--memory", "64GiB"), "gprune-0.8: method gprune, which"),
    ],
)
def test_what_a_later_plan_would_be_refused_for_is_found_before_the_first_is_made(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], problem: str
) -> None:
    monkeypatch.setattr(requirements, "WHOLE", 1e9)
    first = ("--method", "flap", "--keep", "0.8", "--source", "news", "--eval-tokens", "128", "--seq-len", "64")
    code, _, err = regrow("prune", str(tiny_language_model), *first, *words, "--out", "plans")
    assert code == 2, err
    assert problem in " ".join(err.split())
    assert not Path("plans").exists()


def test_modules_that_a_later_plan_drops_are_looked_for(regrow: Run, tiny_language_model: Path) -> None:
    methods = ("--method", "flap", "--method", "depth", "--keep", "0.4")  # neurons alone do not meet it
    code, _, err = regrow("prune", str(tiny_language_model), *methods, *DATA, "--out", "plans")
    assert code == 0, err
    assert any("dropped whole: 1 of 1" in note for note in record(Path("plans/depth-0.4"))["notes"])


def test_several_plans_are_the_same_with_one_block_in_memory(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "WHOLE", 1e9)
    command = ("prune", str(tiny_language_model), "--keep", "0.8", "--keep", "0.6", "--batch-size", "2", *DATA)
    assert regrow(*command, "--out", "whole")[0] == 0
    code, said, err = regrow(*command, "--memory", "64GiB", "--out", "streamed")
    assert code == 0, err
    assert said.count("one of 2 blocks at a time") == 2
    for run in ("flap-0.6", "flap-0.8"):
        assert json.loads((Path("whole") / run / "run.json").read_text())["settings"]["batch_size"] == 2
        for name in FILES:
            assert (Path("whole") / run / name).read_bytes() == (Path("streamed") / run / name).read_bytes(), name


def test_what_a_plan_leaves_in_memory_does_not_count_for_the_next(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = chain((2**28,), repeat(2**40))
    monkeypatch.setattr(requirements, "read_resident", lambda: next(held))
    command = ("prune", str(tiny_language_model), "--keep", "0.8", "--keep", "0.6", *DATA)
    code, said, err = regrow(*command, "--memory", "64GiB", "--out", "plans")
    assert code == 0, err
    assert said.count("with all blocks in memory") == 2
    runs = [json.loads((Path("plans") / name / "run.json").read_text()) for name in ("flap-0.8", "flap-0.6")]
    assert runs[0]["memory"]["predicted"] == runs[1]["memory"]["predicted"]


def test_a_model_with_other_weights_each_time_is_refused(regrow: Run, tmp_path: Path) -> None:
    (tmp_path / "unseeded.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))\n"
        "    return net, torch.zeros(1, 1, 8, 8)\n"
    )
    data = ("--source", "digits", "--tokens", "32", "--eval-tokens", "32")
    code, _, err = regrow("prune", "unseeded:build", "--keep", "0.8", "--keep", "0.6", *data, "--out", "plans")
    assert code != 0
    assert "other weights each time it is built" in err
    assert [path.name for path in Path("plans").iterdir() if (path / "model.safetensors").is_file()] == ["flap-0.8"]


def test_a_folder_of_another_run_is_refused_before_any_plan_is_made(regrow: Run, tiny_language_model: Path) -> None:
    model = str(tiny_language_model)
    other = asdict(Settings(model, keep=0.6, tokens=64))
    RunFolder.create("plans/flap-0.6", verb="prune", settings=other).finish()
    code, _, err = regrow("prune", model, "--keep", "0.8", "--keep", "0.6", *DATA, "--out", "plans")
    assert code == 2 and "plans/flap-0.6 holds another run" in err
    assert [path.name for path in Path("plans").iterdir()] == ["flap-0.6"]


def test_several_plans_are_not_shared_among_processes(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    code, _, err = regrow("prune", str(tiny_language_model), "--keep", "0.8", "--keep", "0.6", *DATA, "--out", "plans")
    assert code == 2
    assert "several plans (--keep 0.8 --keep 0.6) are made in one process, and this is rank 0 of 2" in " ".join(
        err.split()
    )


def test_fractions_that_differ_in_the_seventh_digit_are_plans_of_their_own() -> None:
    assert len(name_folders(Settings("m", keep=keep) for keep in (0.3333333, 0.3333334, 1.0))) == 3
    with pytest.raises(InputError, match="two plans have the name flap"):
        name_folders([Settings("m", keep=0.5), Settings("m", keep=0.5, seed=1)])


def test_a_stopped_command_says_whether_a_plan_was_begun(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("regrow.jobs.prune.run", stop)
    Path("plans").mkdir()
    Path("plans/notes.txt").write_text("mine")
    model = str(tiny_language_model)
    words = ("prune", model, "--keep", "0.8", "--keep", "0.6", *DATA, "--out", "plans")
    code, _, err = regrow(*words)
    assert code == 130 and "nothing was written" in err
    settings = asdict(Settings(model, keep=0.6, sources=("news",), tokens=192, eval_tokens=128, seq_len=64))
    with RunFolder.create("plans/flap-0.6", verb="prune", settings=settings):
        pass
    code, _, err = regrow(*words)
    assert code == 130 and "plans keeps what was finished" in err
