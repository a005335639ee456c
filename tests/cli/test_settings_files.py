"""``--config RUN``: a command with the settings of an earlier run."""

import json
from pathlib import Path

from cli.conftest import Run


def settings_of(folder: str) -> dict:
    return json.loads(Path(folder, "run.json").read_text())["settings"]


def test_a_run_is_repeated_from_its_folder(regrow: Run) -> None:
    words = ("permuted:digits:2", "--method", "ewc", "--model", "mlp:6", "--train", "60", "--test", "20")
    assert regrow("learn", *words, "--epochs", "1", "--set", "strength=3", "--seed", "4", "--out", "run")[0] == 0
    code, _, err = regrow("learn", "--config", "run", "--out", "again")
    assert code == 0, err
    assert settings_of("again") == settings_of("run")
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("run", "again")]
    assert weights[0] == weights[1]
    code, _, err = regrow("learn", "--config", "run", "--seed", "5", "--set", "strength=2", "--out", "other")
    assert code == 0, err
    other = settings_of("other")
    assert other["seed"] == 5 and other["method_settings"] == {"strength": 2} and other["epochs"] == 1
    code, _, err = regrow("learn", "--resume", "run", "--config", "run")
    assert code == 2 and "leave out --config" in err
    code, _, err = regrow("prune", "--config", "run", "--out", "no")
    assert code == 2 and "run holds a run of 'learn'; give a run of `regrow prune` to --config" in err


def test_a_folder_names_no_code_and_the_command_line_does(regrow: Run) -> None:
    words = ("prune", "toys:classifier", "--method", "magnitude", "--keep", "0.5")
    assert regrow(*words, "--out", "run")[0] == 0
    code, _, err = regrow("prune", "--config", "run", "--out", "two")
    assert code == 2 and "only the command line names code; add toys:classifier" in err and not Path("two").exists()
    code, _, err = regrow("prune", "toys:classifier", "--config", "run", "--out", "two")
    assert code == 0 and settings_of("two") == settings_of("run"), err
    code, _, err = regrow("prune", "toys:classifier", "--config", "run", "--target", "params=70%", "--out", "three")
    assert code == 0 and (settings_of("three")["keep"], settings_of("three")["target"]) == (None, "params=70%"), err
    record = json.loads(Path("run", "run.json").read_text())
    record["settings"]["method"] = "toys:pruner"
    Path("run", "run.json").write_text(json.dumps(record))
    code, _, err = regrow("prune", "toys:classifier", "--config", "run", "--out", "four")
    assert code == 2 and "--method is 'toys:pruner', which names code" in err and not Path("four").exists()


def test_what_is_no_run_is_refused(regrow: Run) -> None:
    code, _, err = regrow("learn", "digits", "--config", "nowhere", "--out", "run")
    assert code == 2 and "nowhere is not a run folder" in err and not Path("run").exists()


def test_a_source_that_is_not_there_is_found_before_torch_is_imported(regrow: Run) -> None:
    code, _, err = regrow("prune", "resnet18", "--keep", "0.8", "--source", "photos=missing", "--out", "run")
    assert code == 2 and "source 'photos': missing does not exist" in err and not Path("run").exists()
