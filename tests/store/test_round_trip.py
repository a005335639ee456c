"""Save and load: the same network, bit for bit, in a fresh process too."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from regrow import Plan, apply, trace
from regrow.nets import Loaded, Origin
from regrow.store import StoreError, load, save
from regrow.store.models import read_shapes
from regrow.store.state import find_numbers, find_ties, named_tensors
from store import saved

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Every case, cut and saved; what it said before; and what it says in a fresh process."""
    root = tmp_path_factory.mktemp("models")
    models = {}
    for name, case in saved.CASES.items():
        model, _, plan = saved.cut(case)
        save(model, root / name, origin=case.origin(model))
        models[name] = (model, plan)
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    code = "import pathlib, sys; from store import saved; saved.load_all(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(root)], env=environment, check=True, timeout=240)
    return root, models


@pytest.mark.parametrize("name", saved.CASES)
def test_a_fresh_process_says_the_same_bit_for_bit(shop, name):
    root, models = shop
    said = load_file(root / f"{name}.answers")
    answers = saved.answers(models[name][0], saved.CASES[name])
    assert len(said) == len(answers) > 0
    assert all(torch.equal(said[str(i)], answer) for i, answer in enumerate(answers))


@pytest.mark.parametrize("name", saved.CASES)
def test_all_that_can_differ_comes_back(shop, name):
    root, models = shop
    model, again = models[name][0], load(root / name, model=saved.CASES[name].model)
    before, after = named_tensors(model), named_tensors(again)
    assert before.keys() == after.keys()
    for key, here in before.items():
        there = after[key]
        assert here.kind == there.kind and here.tensor.dtype == there.tensor.dtype
        assert torch.equal(here.tensor, there.tensor), key
        assert here.tensor.requires_grad == there.tensor.requires_grad, key
        assert there.tensor.storage_offset() == 0 and there.tensor.data_ptr() % 64 == 0
    assert find_numbers(model) == find_numbers(again)
    assert find_ties(before) == find_ties(after)
    assert all(after[name].tensor is after[first].tensor for name, first in find_ties(after).items())
    assert not any(module.training for module in again.modules())


def test_the_cases_are_what_they_claim(shop):
    root, models = shop
    added = {name: [k for k, v in read_shapes(root / name).tensors.items() if v.added] for name in saved.CASES}
    assert added["callable"] == ["own.bias"] and len(added["gemma3"]) == 2 and not added["gpt2"]
    assert not read_shapes(root / "object").compared and read_shapes(root / "callable").compared
    assert read_shapes(root / "callable").tensors["tilt"].kind == "derived"
    for name, (_, plan) in models.items():
        assert any(change.dropped for change in plan.changes.values())
        assert bool(plan.means) == bool(saved.CASES[name].means)
    changed = read_shapes(root / "llama_tied").attributes
    assert any(key.endswith("variance_epsilon") for key in changed), "the residual width was not cut"
    assert read_shapes(root / "llama_tied").tensors["model.rotary_emb.inv_freq"].kind == "derived"
    assert any(key.endswith(":groups") for key in read_shapes(root / "mobilenet_v2").attributes)
    assert {"transformer.h.0.attn:split_size", "transformer.h.0.mlp.c_fc:nf"} <= read_shapes(
        root / "gpt2"
    ).attributes.keys()


def test_tied_tensors_are_written_once(shop):
    root, _ = shop
    assert "lm_head.weight" not in load_file(root / "llama_tied" / "model.safetensors")
    assert read_shapes(root / "llama_tied").ties == {"lm_head.weight": "model.embed_tokens.weight"}


def test_a_model_that_was_not_cut_is_a_transformers_folder(tmp_path):
    case = saved.CASES["llama_tied"]
    model = case.build()
    save(model, tmp_path, origin=case.origin(model))
    transformers = pytest.importorskip("transformers")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(saved.answers(plain, case)[0], saved.answers(model, case)[0])
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_configuration_is_that_of_the_whole_architecture(shop):
    root, _ = shop
    config = json.loads((root / "llama_tied" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"]) == (36, 56)
    assert (root / "llama_tied" / "generation_config.json").is_file()


def test_a_model_may_be_cut_saved_and_loaded_again_and_again(shop, tmp_path):
    case = saved.CASES["gpt2"]
    args, kwargs = case.example()
    model = load(shop[0] / "gpt2")
    axes = trace(model, *args, **kwargs)
    axis = max(axes.units(), key=lambda axis: axis.size)
    model, _ = apply(model, axes, Plan.keeping(axes, {axis.key: range(1, axis.size)}))
    save(model, tmp_path)  # the origin came with the model
    assert torch.equal(saved.answers(load(tmp_path), case)[0], saved.answers(model, case)[0])


def test_half_precision_stays_what_it_is(shop, tmp_path):
    case = saved.CASES["llama_tied"]
    model = deepcopy(shop[1]["llama_tied"][0]).to(torch.bfloat16)
    save(model, tmp_path, origin=case.origin(model))
    again = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(saved.answers(again, case)[0], saved.answers(model, case)[0])


def test_another_dtype_can_be_asked_for_and_rotary_numbers_stay_exact(shop, tmp_path):
    case = saved.CASES["llama_tied"]
    model = shop[1]["llama_tied"][0]
    save(model, tmp_path, origin=case.origin(model), dtype=torch.float16)
    half, double = load(tmp_path), load(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(half.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert next(model.parameters()).dtype == torch.float32, "saving changed the model"
    torch.testing.assert_close(
        saved.answers(double, case)[0].float(), saved.answers(model, case)[0], rtol=0.05, atol=0.05
    )


def test_a_tokenizer_travels_without_paths(tmp_path):
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {f"w{i}": i for i in range(52)} | {"[UNK]": 52}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", name_or_path="/somewhere/else", chat_template="{{ messages }}"
    )
    case = saved.CASES["gpt2"]
    model = case.build()
    save(Loaded(model, tokenizer, None, case.origin(model)), tmp_path)
    again = load(tmp_path)
    assert again.tokenizer("w3 w51 what")["input_ids"] == [3, 51, 52]
    assert again.tokenizer.chat_template == "{{ messages }}"
    assert not any("somewhere" in path.read_text(errors="replace") for path in tmp_path.iterdir())


def test_large_models_are_written_in_shards_that_transformers_reads(tmp_path, monkeypatch):
    case = saved.CASES["llama_tied"]
    model = case.build()
    monkeypatch.setattr("regrow.store.weights.SHARD_BYTES", 20_000)
    save(model, tmp_path, origin=case.origin(model))
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1 and not (tmp_path / "model.safetensors").exists()
    plain = pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path)
    for again in (load(tmp_path), plain):
        assert torch.equal(saved.answers(again, case)[0], saved.answers(model, case)[0])
    monkeypatch.undo()
    save(model, tmp_path, origin=case.origin(model))
    assert sorted(p.name for p in tmp_path.glob("*.safetensors*")) == ["model.safetensors"]


def test_saving_and_loading_leave_the_random_state(tmp_path):
    model, case = saved.small(), saved.CASES["callable"]
    state = torch.get_rng_state()
    save(model, tmp_path, origin=case.origin(model))
    load(tmp_path, model=lambda: saved.small())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropped_bias_stays_dropped(tmp_path):
    model = saved.small()
    model.rise.bias = None
    save(model, tmp_path, origin=Origin("callable", "store.saved:small", builder=saved.small))
    assert load(tmp_path, model=saved.small).rise.bias is None


def test_frozen_parameters_stay_frozen(tmp_path):
    model = saved.small()
    model.rise.weight.requires_grad_(False)
    save(model, tmp_path, origin=Origin("callable", "store.saved:small", builder=saved.small))
    again = load(tmp_path, model=saved.small)
    assert not again.rise.weight.requires_grad and again.rise.bias.requires_grad


def test_layers_that_keep_a_second_list_of_their_weights_use_the_loaded_ones(tmp_path):
    model, x = nn.LSTM(4, 3, batch_first=True), torch.randn(2, 5, 4)
    save(model, tmp_path)
    assert torch.equal(load(tmp_path, model=lambda: nn.LSTM(4, 3, batch_first=True))(x)[0], model(x)[0])


@pytest.mark.parametrize("origin", [None, Origin("callable", "store.saved:normed", builder=saved.normed)])
def test_an_epsilon_that_was_left_to_the_dtype_comes_back_as_a_number(tmp_path, origin):
    model, x = saved.normed(), torch.randn(3, 6)
    axes = trace(model, x)
    model, _ = apply(model, axes, Plan.keeping(axes, {"0.weight:0": (0, 2, 3)}))
    assert model[1].eps is not None, "the width was not folded"
    save(model, tmp_path, origin=origin)
    again = load(tmp_path, model=saved.normed)
    assert again[1].eps == model[1].eps and torch.equal(again(x), model(x))


class Counting(nn.Module):
    """Sets a number the first time it runs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        self.seen = tuple(x.shape)
        return self.fc(x)


def test_numbers_that_a_module_sets_when_it_runs_do_no_harm(tmp_path):
    model = Counting()
    model(torch.ones(1, 3))
    save(model, tmp_path)
    assert torch.equal(load(tmp_path, model=Counting)(torch.ones(1, 3)), model(torch.ones(1, 3)))


TOWER = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2}
PAIR = {"text_config": TOWER | {"vocab_size": 30}, "vision_config": TOWER | {"image_size": 16, "patch_size": 8}}
STATES = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 1, "num_heads": 4, "head_dim": 6, "n_groups": 2}


@pytest.mark.parametrize(("kind", "settings"), [("CLIPModel", PAIR), ("Mamba2ForCausalLM", STATES)])
def test_nested_and_infinite_settings_come_back(tmp_path, kind, settings):
    """One configuration holds two more, of which config.json keeps a part; the other holds an infinity."""
    transformers = pytest.importorskip("transformers")
    make = getattr(transformers, kind)
    model = make(make.config_class(**settings)).eval()
    again = load(save(model, tmp_path / "model"))
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))
    limit = getattr(model.config, "time_step_limit", None)
    assert getattr(again.config, "time_step_limit", None) == (None if limit is None else list(limit))


def test_a_nested_setting_that_differs_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save(transformers.CLIPModel(transformers.CLIPConfig(**PAIR)), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] = 14
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match=r"text_config\.hidden_size = 14"):
        load(folder)


class AddsHook(nn.Module):
    """Adds a hook in its first run, as models of transformers do that collect hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.is_ready = nn.Linear(3, 2), False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_ready:
            self.fc.register_forward_hook(lambda module, args, output: output + 1)
            self.is_ready = True
        return self.fc(x)


def test_a_hook_of_the_first_run_is_added_once(tmp_path):
    x, net = torch.randn(2, 3), AddsHook()
    expected = nn.functional.linear(x, net.fc.weight, net.fc.bias) + 1
    save(net, tmp_path / "net", example=x)
    assert torch.equal(net(x), expected)
    assert torch.equal(load(tmp_path / "net", model=AddsHook)(x), expected)


def test_files_of_ones_own_beside_a_model_stay(tmp_path):
    net, own = tmp_path / "net", ("model_finetuned.safetensors", "vocab.json", "config.json")
    save(nn.Sequential(nn.Linear(2, 2)), net)
    for name in own:
        (net / name).write_text("mine")
    save(nn.Sequential(nn.Linear(2, 2)), net)
    assert {*own} <= {path.name for path in net.iterdir()}
    (net / "run.json").write_text("{}")
    with pytest.raises(StoreError, match="is the folder of a run"):
        save(nn.Sequential(nn.Linear(2, 2)), net)
