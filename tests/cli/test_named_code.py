"""Code is named by a person, on the command line or in Python; what a file names is never imported or called."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import regrow as package
from regrow.jobs.models import load_model
from regrow.store import save
from regrow.store.shapes import content_digest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def canary(tmp_path):
    """A module beside the user whose import leaves a mark; gives a way to ask whether there is one."""
    mark = tmp_path / "it-ran"
    (tmp_path / "pwned.py").write_text(
        f"import sys\nopen({str(mark)!r}, 'w').close()\nfrom toys import classifier as boom\n"
        "sys.modules.pop(__name__)\n"
    )
    yield mark.exists
    sys.modules.pop("pwned", None)


def edited(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    if name == "shapes.json":
        data["sha256"] = content_digest(data)
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(FIXTURES / "prune", tmp_path / "run"))


def test_a_model_named_in_run_json_is_not_imported(run, canary, regrow, tmp_path):
    edited(run, "run.json", lambda d: d["settings"].update(model="pwned:boom"))
    code, _, err = regrow("recover", "run", "--by", "refit", "--out", "new")
    assert code == 2 and "\n" not in err.strip(), err
    assert "pwned:boom" in err and "add --code pwned:boom if you trust it" in err
    assert not canary() and not (tmp_path / "new").exists()


def test_a_recovered_run_passes_on_no_name(regrow, canary, tmp_path):
    folder = Path(shutil.copytree(FIXTURES / "recover", tmp_path / "again"))
    edited(folder, "run.json", lambda d: d["settings"]["pruning"].update(model="pwned:boom"))
    code, _, err = regrow("recover", "again", "--by", "refit", "--out", "new")
    assert code == 2 and "add --code pwned:boom" in err and not canary()


def test_saving_a_loaded_model_does_not_call_what_shapes_json_names(run, canary, regrow, tmp_path):
    from toys import classifier

    edited(run, "shapes.json", lambda d: d["origin"].update(reference="pwned:boom"))
    module = classifier()[0]
    for mine in (classifier, module):
        net = package.load(run, model=mine)
        save(net, tmp_path / "copy")
        assert not canary()
        again = package.load(tmp_path / "copy", model=classifier)
        assert all(torch.equal(value, net.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("command", ["evaluate run", "export run --to onnx --out m.onnx", "show run", "apply plan run"])
def test_a_folder_that_needs_code_gets_it_from_the_command_line(command, run, canary, regrow, tmp_path):
    edited(run, "shapes.json", lambda d: d["origin"].update(reference="pwned:boom"))
    code, _, err = regrow("show", "run")
    assert code == 2 and "add --code pwned:boom" in err and not canary()
    ledger = json.loads((run / "ledger.json").read_text())
    (tmp_path / "plan").write_text(json.dumps({**ledger["plans"][0], "changes": {}, "means": {}, "drop": {}}))
    words = command.split() + (["--out", "applied"] if command.startswith("apply") else [])
    code, _, err = regrow(*words, "--code", "toys:classifier")
    assert code == 0, err
    assert "running code: toys:classifier (named on the command line)\n" in err
    assert not canary()


def test_code_that_is_not_needed_is_refused(regrow, tmp_path):
    code, _, err = regrow("show", "resnet18", "--code", "toys:classifier")
    assert code == 2 and "leave it out" in err and "running code" not in err.splitlines()[-1]
    code, _, err = regrow("prune", "toys:classifier", "--code", "toys:classifier", "--keep", "0.5", "--out", "new")
    assert code == 2 and "is for a network that your own code builds" in err
    code, _, err = regrow("show", "toys:classifier")
    assert code == 0 and "running code: toys:classifier (named on the command line)\n" in err


def test_a_run_is_recovered_with_code_from_the_command_line(run, canary, regrow, tmp_path):
    edited(run, "run.json", lambda d: d["settings"].update(model="pwned:boom"))
    code, _, err = regrow(
        "recover", "run", "--by", "refit", "--tokens", "192", "--code", "toys:classifier", "--out", "r"
    )
    assert code == 0, err
    assert "--code toys:classifier" in json.loads((tmp_path / "r" / "run.json").read_text())["command"]
    assert not canary()


def test_settings_from_a_file_give_no_code(run):
    from regrow.jobs.pruning_inputs import make_model_spec, read_pruning_settings
    from regrow.nets import ModelError
    from regrow.store.run_folder import RunFolder

    values = RunFolder.open(run).read_record()["settings"]
    with pytest.raises(ModelError, match="never imported"):
        read_pruning_settings(values)
    assert (
        load_model(make_model_spec(read_pruning_settings(values, "toys:classifier"))).origin.reference
        == "toys:classifier"
    )


def test_a_tampered_name_is_shown_without_control_signs(run, regrow):
    edited(run, "shapes.json", lambda d: d["origin"].update(reference="x\x1b[31m:boom\n[red]y"))
    code, _, err = regrow("evaluate", "run")
    assert code == 2 and "\x1b" not in err and "add --code pkg.mod:fn" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["recover", "prune"])
def test_help_names_the_option(name, regrow):
    code, out, _ = regrow(name, "--help-all")
    assert code == 0 and "--code PKG:FN" in out
