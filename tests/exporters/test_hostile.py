"""Folders from strangers: nothing of theirs runs, nothing outside is touched, and what is wrong is said."""

import json
import shutil
from pathlib import Path

import pytest

from regrow import export, load
from regrow.nets.language import origin_of
from regrow.store import save
from regrow.store.shapes import content_digest
from store import saved
from zoo import ZOO


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    case = saved.CASES["llama_tied"]
    net, _, _ = saved.cut(case)
    return save(net, tmp_path_factory.mktemp("honest") / "m", origin=case.origin(net))


def shapes(change):
    def tamper(folder):
        data = json.loads((folder / "shapes.json").read_text())
        change(data)
        (folder / "shapes.json").write_text(json.dumps(data | {"sha256": content_digest(data)}))

    return tamper


def first(data):
    return next(iter(data["tensors"].values()))


TAMPERED = {
    "a path upward": shapes(lambda d: d["files"].update({"../../model.safetensors": {"bytes": 1, "sha256": "0"}})),
    "a tensor of a strange name": shapes(lambda d: d["tensors"].update({"../up.weight": first(d)})),
    "a huge size": shapes(lambda d: first(d).update(shape=[2**40, 2**40])),
    "a negative width": shapes(lambda d: first(d).update(shape=[-4, 4])),
    "an unknown dtype": shapes(lambda d: first(d).update(dtype="quaternion")),
    "code to fetch": shapes(lambda d: d["origin"]["config"].update(auto_map={"AutoConfig": "evil.Config"})),
    "an attribute that is code": shapes(lambda d: d["attributes"].update({"model:forward": "__import__('os')"})),
    "many layers": shapes(lambda d: d["origin"]["config"].update(num_hidden_layers=10**6)),
}


@pytest.mark.parametrize("to", ["transformers", "gguf", "onnx"])
@pytest.mark.parametrize("name", TAMPERED)
def test_a_hostile_folder_is_refused(honest, tmp_path, name, to):
    folder = Path(shutil.copytree(honest, tmp_path / "in" / "m"))
    TAMPERED[name](folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError) as caught:
        export(folder, tmp_path / f"out.{to}", format=to)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert sorted(tmp_path.rglob("*")) == before


def test_code_in_a_folder_does_not_run(honest, tmp_path):
    folder = Path(shutil.copytree(honest, tmp_path / "m"))
    marker = tmp_path / "ran"
    for name in ("modeling_regrow.py", "reshape_regrow.py"):
        (folder / name).write_text(f"open({str(marker)!r}, 'w').close()\n")
    load(folder)
    export(folder, tmp_path / "out", format="transformers")
    assert not marker.exists()
    assert "class RegrownLlamaForCausalLM" in (tmp_path / "out" / "modeling_regrow.py").read_text()


def test_code_that_a_plain_folder_names_does_not_run(tmp_path):
    stranger, marker = tmp_path / "stranger", tmp_path / "ran"
    ZOO["llama_tied"].build().save_pretrained(stranger)
    (stranger / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nEvil = None\n")
    config = json.loads((stranger / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{stranger}--evil.Evil", "AutoConfig": "evil.Evil"}
    (stranger / "config.json").write_text(json.dumps(config))
    export(stranger, tmp_path / "out", format="transformers")
    assert not marker.exists() and "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    net = ZOO["llama_tied"].build()
    net.config.auto_map = config["auto_map"]
    load(save(net, tmp_path / "saved", origin=origin_of(net, "with a map")))
    assert not marker.exists()


def test_what_is_there_stays_unless_it_was_an_export(honest, tmp_path):
    with pytest.raises(ValueError, match="the model itself"):
        export(honest, honest, format="transformers")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else"):
        export(honest, mine, format="transformers")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="folder of a run"):
        export(honest, run, format="transformers")
    out = tmp_path / "out"
    export(honest, out, format="transformers")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="no torchvision network"):
        export(honest, out, format="torchvision")
    assert (out / "model.safetensors").read_bytes() == before and not list(tmp_path.glob(".*partial"))


def test_saving_leaves_other_files_alone(tmp_path):
    names = ("train_regrow.py", "model_old.safetensors")
    for name in names:
        (tmp_path / name).write_text("mine")
    save(saved.small(), tmp_path)
    assert all((tmp_path / name).read_text() == "mine" for name in names)
