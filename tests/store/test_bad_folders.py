"""Folders that are damaged, tampered with or hostile: one line that names the value and the remedy, no model."""

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import regrow.store.models as store
from regrow.nets import Origin
from regrow.store import StoreError, load, save
from regrow.store.shapes import content_digest
from regrow.store.weights import describe_file
from store import saved


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    case, folder = saved.CASES["llama_tied"], tmp_path_factory.mktemp("llama")
    model = case.build()
    return save(model, folder / "m", origin=case.origin(model))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return save(saved.cut(saved.CASES["callable"])[0], tmp_path_factory.mktemp("own") / "m", origin=SMALL)


FILE = {"bytes": 1, "sha256": "0" * 64, "header": ""}
SMALL = Origin("callable", "store.saved:small", builder=lambda: saved.small())


@pytest.fixture
def folder(llama, tmp_path):
    return Path(shutil.copytree(llama, tmp_path / "m"))


@pytest.fixture
def mine(own, tmp_path):
    return Path(shutil.copytree(own, tmp_path / "own"))


def refused(folder, *words, **more):
    with pytest.raises(StoreError) as caught:
        load(folder, **more)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    missing = [word for word in words if word not in line]
    assert not missing, line
    return line


def edited(folder, change, name="shapes.json"):
    data = json.loads((folder / name).read_text())
    change(data)
    data["sha256"] = content_digest(data)
    (folder / name).write_text(json.dumps(data))
    return folder


def rewritten(folder, change):
    """Weights changed by somebody who also puts the right digest into the record."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    file = describe_file(folder / "model.safetensors")
    return edited(folder, lambda d: d["files"].update({"model.safetensors": msgspec.to_builtins(file)}))


def test_a_changed_digit_of_the_record_is_found(mine):
    """Wherever it stands; without checks such a record is read, and so is one with a new digest."""
    text = (mine / "shapes.json").read_text()
    width = json.loads(text)["attributes"]["rise:out_features"]
    for at in [at for at, one in enumerate(text) if one.isdigit()]:
        (mine / "shapes.json").write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
        with pytest.raises(StoreError, match=r"shapes\.json"):
            load(mine, model=saved.small)
    other = text.replace(f'"rise:out_features": {width}', f'"rise:out_features": {width - 1}')
    (mine / "shapes.json").write_text(other)
    refused(mine, "shapes.json", "damaged", "copy it again", model=saved.small)
    assert load(mine, model=saved.small, check=False).rise.out_features == width - 1
    edited(mine, lambda d: None)
    assert load(mine, model=saved.small).rise.out_features == width - 1


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "model.safetensors", "truncated", "copy it again")


@pytest.mark.parametrize("place", [3, 40, -1])
def test_a_flipped_bit(folder, place):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    refused(folder, "SHA-256", "copy it again")


def test_files_that_are_missing(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors is missing")
    (folder / "shapes.json").unlink()
    refused(folder, "regrow.nets.load")
    (folder / "config.json").unlink()
    refused(folder, "shapes.json")
    refused(folder / "nowhere", "no such folder")


def test_a_transformers_folder_of_others(llama, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(llama / name, tmp_path)
    refused(tmp_path, "transformers folder", "regrow.nets.load")
    with pytest.raises(StoreError, match="did not write; choose another folder"):
        save(saved.small(), tmp_path)


def test_tensors_that_are_missing_surplus_or_of_another_shape(folder):
    refused(rewritten(folder, lambda t: t.pop("model.norm.weight")), "model.norm.weight", "missing")
    refused(rewritten(folder, lambda t: t.update({"model.norm.weight": torch.ones(35)})), "(35,)", "(36,)")
    refused(rewritten(folder, lambda t: t.update({"model.norm.weight": torch.ones(36).half()})), "float16")
    refused(
        rewritten(folder, lambda t: t.update({"model.norm.weight": torch.ones(36), "evil.weight": torch.ones(2)})),
        "evil.weight",
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(folder, bad):
    refused(rewritten(folder, lambda t: t["model.norm.weight"].fill_(bad)), "36 entries of 'model.norm.weight'", "NaN")
    model = saved.small()
    model.rise.weight.data[0, 0] = bad
    with pytest.raises(StoreError, match=r"rise\.weight"):
        save(model, folder.parent / "new")
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("persistent", [True, False])
def test_buffers_hold_what_they_held(tmp_path, bad, persistent):
    """A mask may hold infinity, a record of what is unknown NaN: what is saved is loaded."""
    model = saved.small()
    model.register_buffer("mask", torch.tensor([0, bad, 0]), persistent=persistent)
    save(model, tmp_path / "m")

    def built():
        made = saved.small()
        made.register_buffer("mask", torch.zeros(3), persistent=persistent)
        return made

    assert torch.equal(load(tmp_path / "m", model=built).mask.view(torch.int32), model.mask.view(torch.int32))


def test_weights_too_large_for_the_dtype_they_are_saved_in(tmp_path):
    """They would be infinite in the file, which loading refuses."""
    model = saved.small()
    model.rise.weight.data[0, 0] = 1e30
    with pytest.raises(StoreError, match=r"1 entries of 'rise\.weight' are NaN or infinite; use another dtype"):
        save(model, tmp_path / "m", dtype=torch.float16)
    save(model, tmp_path / "m", dtype=torch.bfloat16)
    assert load(tmp_path / "m", model=saved.small, check=False).rise.weight[0, 0] > 1e29


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["tensors"][NORM].update(shape=[-36]), ("`int` >= 0", "tensors[...].shape[0]")),
        (lambda d: d["tensors"][NORM].update(shape=[10**15]), ("`int` <= 2147483647", "tensors[...].shape[0]")),
        (lambda d: d["tensors"][NORM].update(shape=[2**30]), (NORM, str(2**30))),
        (lambda d: d["tensors"][NORM].update(shape=[36.5]), ("got `float`", "tensors[...].shape[0]")),
        (lambda d: d["tensors"][NORM].update(shape="36"), ("got `str`", "tensors[...].shape")),
        (lambda d: d["tensors"][NORM].update(shape=[True]), ("got `bool`", "tensors[...].shape[0]")),
        (lambda d: d["tensors"][NORM].update(shape=[36, 1], was=[36]), (NORM,)),
        (lambda d: d["tensors"][NORM].update(was=[99]), (NORM, "99")),
        (lambda d: d["tensors"][NORM].update(dtype="float1"), ("matching regex", "tensors[...].dtype")),
        (lambda d: d["tensors"][NORM].update(dtype=["float32"]), ("got `array`", "tensors[...].dtype")),
        (lambda d: d["tensors"][NORM].update(dtype="float64"), (NORM, "float64")),
        (lambda d: d["tensors"][NORM].update(kind="code"), ("'code'", "tensors[...].kind")),
        (lambda d: d["tensors"][NORM].update(kind="buffer"), (NORM, "buffer")),
        (lambda d: d["tensors"].update({NORM: 7}), ("got `int`", "tensors[...]")),
        (lambda d: d["tensors"].update({"__class__": {"dtype": "float32", "shape": [1]}}), ("__class__",)),
        (lambda d: d["tensors"].update({"model.__init__": {"dtype": "float32", "shape": [1]}}), ("__init__",)),
        (lambda d: d["tensors"].update({"../up": {"dtype": "float32", "shape": [1], "added": True}}), ("../up",)),
        (lambda d: d["tensors"].pop(NORM), (NORM,)),
        (lambda d: d["ties"].update({NORM: "nothing"}), (NORM, "nothing")),
        (lambda d: d["ties"].update({"nobody": NORM}), ("nobody",)),
        (lambda d: d["ties"].update({"lm_head.weight": 3}), ("ties",)),
        (lambda d: d["dropped"].append("nobody"), ("nobody",)),
        (lambda d: d.update(dropped="all"), ("dropped",)),
        (lambda d: d["attributes"].update({"model.norm:variance_epsilon": float("nan")}), ("nan",)),
        (lambda d: d["attributes"].update({"lm_head:in_features": -3}), ("lm_head:in_features", "-3")),
        (lambda d: d["attributes"].update({"lm_head:in_features": 2**40}), ("lm_head:in_features",)),
        (lambda d: d["attributes"].update({"lm_head:in_features": "rm"}), ("got `str`", "attributes[...]")),
        (lambda d: d["attributes"].update({"lm_head:forward": 3}), ("lm_head:forward",)),
        (lambda d: d["attributes"].update({"lm_head": 3}), ("matching regex", "attributes")),
        (lambda d: d["attributes"].update({"../x:y": 3}), ("../x",)),
        (lambda d: d["files"].update({"../model.safetensors": FILE}), ("matching regex", "files")),
        (lambda d: d["files"].update({"/etc/passwd": FILE}), ("matching regex", "files")),
        (lambda d: d["files"].update({"model.safetensors": 3}), ("got `int`", "files[...]")),
        (lambda d: d["files"].clear(), ("missing",)),
        (lambda d: d.update(format="regrow-shapes/9"), ("regrow-shapes/2",)),
        (lambda d: d.pop("tensors"), ("tensors",)),
        (lambda d: d["origin"].update(kind="pickle"), ("pickle",)),
        (lambda d: d["origin"].update(reference="os.system"), ("os.system",)),
        (lambda d: d["origin"].update(reference="pipeline"), ("pipeline",)),
        (lambda d: d["origin"]["config"].update(hidden_size=-36), ("hidden_size",)),
        (lambda d: d["origin"]["config"].update(hidden_size=10**9), ("hidden_size",)),
        (lambda d: d["origin"]["config"].update(num_hidden_layers=10**9), ("num_hidden_layers", "tensors")),
        (lambda d: d["origin"]["config"].update(attn_implementation="some/kernel"), ("attn_implementation",)),
        (lambda d: d["origin"]["config"].update(text_config={"_attn_implementation": "a/b"}), ("_attn",)),
        (lambda d: d["origin"]["config"].update(quantization_config={"quant_method": "x"}), ("quantization",)),
        (lambda d: d["origin"]["config"].update(auto_map={"AutoConfig": "evil.C"}), ("auto_map",)),
        (lambda d: d["origin"]["config"].update(dtype="float1"), ("dtype",)),
        (lambda d: d["origin"]["config"].update(hidden_act="evil"), ("hidden_act",)),
        (lambda d: d["origin"]["config"].pop("model_type"), ()),
        (lambda d: d["origin"].update(kind="callable"), ("own code", "load(folder, model=")),
        (lambda d: d["origin"].update(kind="torchvision", config={"weights_backbone": "DEFAULT"}), ("weights",)),
    ],
)
def test_a_hostile_record(folder, change, words):
    refused(edited(folder, change), *words)


def test_records_that_are_no_records(folder):
    for text in ("", "{", "[]", "[" * 100_000, '"x"', "{}", "\ud83d"):
        (folder / "shapes.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        refused(folder, "shapes.json")
    (folder / "shapes.json").write_bytes(b"\xff\xfe")
    refused(folder, "shapes.json")


def test_widths_that_fit_the_weights_but_not_the_architecture(folder):
    """Both sizes huge, in the record and in the configuration: the architecture is built, and does not fit."""

    def wide(d):
        d["origin"]["config"].update(intermediate_size=57)

    edited(folder, wide)
    refused(edited(folder, lambda d: d.update(intermediate_size=57), "config.json"), "gate_proj", "57")


def test_a_configuration_that_was_changed(folder):
    refused(edited(folder, lambda d: d.update(hidden_size=72), "config.json"), "config.json", "hidden_size", "72")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def test_links_that_lead_out_of_the_folder(folder, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "leads out of the folder")


def test_a_tokenizer_that_leads_out_of_the_folder_or_brings_code(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "vocab_file": "../../secret.json"}))
    refused(folder, "vocab_file", "tokenizer_config.json")
    path.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (folder / "evil.py").write_text("raise SystemExit('code ran')")
    refused(folder, "tokenizer")
    path.write_text("{")
    refused(folder, "tokenizer_config.json")


def test_own_code_runs_only_if_handed_over(mine, monkeypatch):
    monkeypatch.setattr(saved, "small", lambda: pytest.fail("code that a folder names was run"))
    refused(mine, "store.saved:small", "load(folder, model=")


def test_a_builder_that_is_not_the_right_one(mine):
    refused(mine, "(11,", "(10,", model=lambda: saved.Small(11))
    refused(mine, "no place", model=nn.Linear(2, 2))
    refused(mine, "not a torch.nn.Module", model=lambda: 3)
    refused(mine, "out of luck", model=lambda: {}["out of luck"])


def test_a_built_module_can_be_handed_over(mine):
    net = saved.small()
    assert load(mine, model=net) is net and net.rise.out_features == net.rise.weight.shape[0] < 10


def test_models_without_numbers_or_a_place_in_the_architecture(tmp_path):
    with pytest.raises(StoreError, match="meta"):
        save(saved.small().to("meta"), tmp_path / "a", origin=SMALL)
    model = saved.small()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(StoreError, match=r"extra\.weight"):
        save(model, tmp_path / "b", origin=SMALL)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_model_that_was_there(own, mine, monkeypatch):
    before = {path.name: path.read_bytes() for path in mine.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    for target in ("tensors.TensorFile.write", "atomic.os.fsync"):
        with monkeypatch.context() as patch, pytest.raises(StoreError, match="disk is full") as caught:
            patch.setattr(f"regrow.store.{target}", full)
            save(saved.small(), mine, origin=SMALL)
        assert "\n" not in str(caught.value) and "free some space" in str(caught.value)
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    assert load(mine, model=saved.small) is not None
    assert store.SHAPES in before
