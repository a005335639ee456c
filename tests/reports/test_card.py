"""Model cards: what a hub reads of them, and what an exported folder carries of its base model and of the run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import regrow
from regrow.cli import run_command
from regrow.reports.card import write_card

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")
hub = pytest.importorskip("huggingface_hub", reason="needs regrow[llm]")
RECORDS = {
    "run.json",
    "ledger.json",
    "metrics.jsonl",
    "axes.json",
    "findings.json",
    "scores.json",
    "report.html",
    "before",
}
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32} | {
    "patch_size": 8,
    "intermediate_size": 40,
}


def read(folder: Path) -> hub.ModelCard:
    """The card of a folder, as the hub's library parses it."""
    return hub.ModelCard.load(folder / "README.md")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a small model and its licence, a run that cut it (`cut`), and one that cut that (`twice`)."""
    here = tmp_path_factory.mktemp("runs")
    transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).save_pretrained(here / "vit")
    (here / "vit" / "LICENSE.txt").write_text("of the base model")
    for model, out in (("vit", "cut"), ("cut", "twice")):
        data = {"x": torch.randn(4, 3, 32, 32)}
        regrow.prune(here / model, data, keep=0.8, method="random", seed=len(out), out=here / out)
    return here


def test_a_card_has_what_is_known_of_a_local_model_and_nothing_else(runs, tmp_path):
    regrow.export(runs / "cut", tmp_path / "out", format="transformers")
    card = read(tmp_path / "out")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "license": "other",
        "license_link": "LICENSE.txt",
        "tags": ["regrow", "pruned"],
    }
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "of the base model"
    stage = json.loads((runs / "cut" / "run.json").read_text())["stage"]
    assert (
        f"{stage['parameters'] / stage['before']:.1%}".replace("%", " %") in card.text and "random removed" in card.text
    )
    assert 'AutoModelForImageClassification.from_pretrained("FOLDER", trust_remote_code=True)' in card.text
    assert "| Units of " in card.text and str(runs) not in card.text, "a card has no path of this machine"


def test_no_record_of_a_run_is_exported(runs, tmp_path):
    written = regrow.export(runs / "twice", tmp_path / "out", format="transformers")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & RECORDS and {"README.md", "config.json", "model.safetensors"} <= names
    assert written.bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_a_card_has_every_run_on_the_base_model(runs, tmp_path):
    regrow.export(runs / "twice", tmp_path / "out", format="transformers")
    card = read(tmp_path / "out")
    assert card.text.count("## Prune") == 2 and card.data.license_link == "LICENSE.txt"
    assert card.text.lstrip().startswith("# vit, pruned")
    assert card.text.count("| Date |  | 20") == 2


def test_the_command_writes_the_same_card_and_says_how_to_upload(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(["export", str(runs / "cut"), "--to", "transformers", "--out", "my model"]) == 0
    assert "hf upload USER/NAME 'my model'" in " ".join(capsys.readouterr().out.split())
    regrow.export(runs / "cut", tmp_path / "python", format="transformers")
    assert read(tmp_path / "my model").content == read(tmp_path / "python").content


def test_of_a_network_in_memory_no_folder_is_read(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs)
    net = regrow.load("cut")
    net.origin = dataclasses.replace(net.origin, name="cut")
    regrow.export(net, tmp_path / "out", format="transformers")
    card = read(tmp_path / "out")
    assert card.data.tags == ["regrow"] and card.data.license is None and "## Prune" not in card.text
    net.origin = dataclasses.replace(net.origin, name="some/model")
    regrow.export(net, tmp_path / "out", format="transformers")
    assert read(tmp_path / "out").data.base_model is None


@pytest.mark.parametrize("parent, base", [({}, "org/name"), ({"weights": "0" * 64}, None), ({"name": "Net()"}, None),
                                          ({"files": {"model.safetensors": {"bytes": 1}}}, None)])  # fmt: skip
def test_a_run_knows_whether_its_model_was_one_of_the_hub(runs, tmp_path, parent, base):
    run = json.loads((runs / "cut" / "run.json").read_text())
    run["settings"]["model"] = "org/name"
    run["parent"] = {"name": "name", "weights": "", "parameters": 1, "plans": 0} | parent
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_card(tmp_path, str(tmp_path / "run"), "")
    data = read(tmp_path).data.to_dict()
    assert (data.get("base_model"), data.get("base_model_relation")) == (base, base and "finetune")


@pytest.mark.parametrize("name, base, licence", [("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
                                                  ("gemma3-270m", "google/gemma-3-270m", "gemma")])  # fmt: skip
def test_the_packaged_models_are_known(tmp_path, name, base, licence):
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_card(tmp_path, name, "")
    data = read(tmp_path).data.to_dict()
    assert (data["base_model"], data["license"], data["pipeline_tag"]) == (base, licence, "text-generation")
    assert "base_model_relation" not in data, "nothing was changed"


def test_a_folder_with_a_name_like_those_of_the_hub_is_no_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_card(tmp_path, "org/name", "")
    assert read(tmp_path).data.base_model == "org/name"
    Path("org/name").mkdir(parents=True)
    write_card(tmp_path, "org/name", "")
    assert read(tmp_path).data.base_model is None


TASKS = {
    "image-classification": ("resnet18", "vit_b_16", "swin_t"),
    "image-segmentation": ("fcn_resnet50", "deeplabv3_resnet50"),
    "object-detection": ("ssdlite320_mobilenet_v3_large", "maskrcnn_resnet50_fpn", "fcos_resnet50_fpn"),
    "video-classification": ("r3d_18", "mvit_v2_s", "swin3d_t"),
    None: ("raft_small",),
}


@pytest.mark.parametrize("task, name", [(task, name) for task, names in TASKS.items() for name in names])
def test_a_network_of_torchvision_has_its_task(tmp_path, name, task):
    (tmp_path / "network.json").write_text(json.dumps({"builder": name}))
    write_card(tmp_path, name, "")
    data = read(tmp_path).data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("torchvision", task, None)


def test_text_of_a_run_adds_no_table_and_no_metadata(runs, tmp_path):
    (tmp_path / "run").mkdir()
    run = json.loads((runs / "cut" / "run.json").read_text())
    run["settings"]["model"] = "x\n---\nlicense: mit\n---\n<script>|"
    (tmp_path / "run" / "run.json").write_text(json.dumps(run))
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    write_card(tmp_path, str(tmp_path / "run"), "")
    card = read(tmp_path)
    assert card.data.license is None and "<script" not in card.content


def test_a_link_named_like_a_licence_is_not_followed(runs, tmp_path):
    """The folder may be anyone's, and its export is uploaded: a link could lead to a private file."""
    secret = tmp_path / "secret"
    secret.write_text("a key")
    model = tmp_path / "model"
    transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, num_labels=5)).save_pretrained(model)
    (model / "LICENSE").symlink_to(secret)
    (model / "NOTICE.py").write_text("raise SystemExit")
    regrow.export(model, tmp_path / "out", format="transformers")
    assert not {"LICENSE", "NOTICE.py"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert "license" not in read(tmp_path / "out").data.to_dict()
