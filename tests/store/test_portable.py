"""A saved network of changed shape loads where regrow is not installed: with transformers, or torchvision, alone."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DetrConfig,
    DetrForObjectDetection,
    LlamaForCausalLM,
    ResNetConfig,
)

import regrow
from regrow.core.plan import Plan
from regrow.core.progress import silent
from regrow.exporters import ExportError
from regrow.exporters import torchvision as to_torchvision
from regrow.exporters import transformers as to_transformers
from regrow.nets import Origin
from regrow.nets.language import origin_of
from regrow.store import StoreError, load, save
from regrow.surgery import apply
from regrow.tracing import trace, with_branches
from store import saved
from zoo import ZOO

SILENT = {"card": lambda folder: None, "progress": silent}
LANGUAGE = ("llama_tied", "gpt2", "gemma3")
ALONE = """
import sys
sys.modules["regrow"] = None                        # whoever asks for it is told that it is not installed
import torch, transformers
from safetensors.torch import load_file, save_file
for folder in sys.argv[2:]:
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = load_file(sys.argv[1])["tokens"]
    with torch.no_grad():
        inner = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        states = inner(tokens, use_cache=False).last_hidden_state.contiguous()
        logits = net(tokens, use_cache=False).logits.contiguous()
        save_file({"logits": logits, "states": states}, folder + "/said")
        net.generate(tokens, max_new_tokens=4, do_sample=False)
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Networks cut in every axis and saved; what they say; and what transformers says in a process without regrow."""
    root, tokens = tmp_path_factory.mktemp("portable"), torch.arange(1, 13)[None]
    save_file({"tokens": tokens}, root / "tokens")
    said = {}
    for name in LANGUAGE:
        case = saved.CASES[name]
        model, _, _ = saved.cut(case)
        save(model, root / name, origin=case.origin(model))
        with torch.no_grad():
            states = model.base_model(tokens, use_cache=False).last_hidden_state
            said[name] = {"logits": model(tokens, use_cache=False).logits, "states": states}
    folders = [str(root / name) for name in LANGUAGE]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HOME": str(root / "cache")}
    command = [sys.executable, "-W", "ignore", "-c", ALONE, str(root / "tokens"), *folders]
    subprocess.run(command, env=environment, check=True, timeout=240, cwd=root)
    return root, said


@pytest.mark.parametrize("name", LANGUAGE)
def test_transformers_alone_says_the_same(shop, name):
    root, said = shop
    there = load_file(root / name / "said")
    assert torch.equal(there["logits"], said[name]["logits"])
    assert torch.equal(there["states"], said[name]["states"])  # AutoModel: the model without its head


def test_the_configuration_tells_every_width(shop):
    root, _ = shop
    config = json.loads((root / "llama_tied" / "config.json").read_text())
    model = load(root / "llama_tied")
    shapes = dict(model.named_parameters())
    assert config["regrow"]["tensors"]
    assert all(list(shapes[name].shape) == shape for name, shape in config["regrow"]["tensors"].items())
    assert config["architectures"] == ["RegrownLlamaForCausalLM"] and config["model_type"] == "regrow_llama"
    names = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
    assert config["auto_map"] == {auto: f"modeling_regrow.RegrownLlama{name}" for auto, name in names.items()}


def carried(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **more)


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_without_the_code_nothing_loads(shop, auto):
    root, _ = shop
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto.from_pretrained(root / "llama_tied", trust_remote_code=False)


def test_in_memory_the_family_has_its_type_and_in_files_its_own(shop, tmp_path):
    root, said = shop
    net, tokens = carried(root / "llama_tied"), load_file(root / "tokens")["tokens"]
    assert net.config.to_dict()["model_type"] == "llama"  # by which peft chooses the layers that it adapts
    net.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "regrow_llama"
    with torch.no_grad():
        assert torch.equal(
            carried(tmp_path / "again").eval()(tokens, use_cache=False).logits, said["llama_tied"]["logits"]
        )


def test_a_folder_of_the_version_before_still_loads(shop, tmp_path):
    root, _ = shop
    folder = tmp_path / "m"
    shutil.copytree(root / "llama_tied", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "regrow_gpt2"}))
    with pytest.raises(StoreError, match="model_type = gpt2"):
        load(folder)


def test_the_configuration_has_the_heads_of_layers_that_differ(tmp_path):
    net, (args, kwargs) = ZOO["llama_tied"].build(), ZOO["llama_tied"].example()
    axes = trace(net, *args, **kwargs)
    heads = next(axis for axis in axes.free() if axis.key.endswith("layers.1.self_attn.q_proj.weight:0/16"))
    apply(net, axes, Plan.keeping(axes, {heads.key: [0]}))
    save(net, tmp_path / "m", origin=origin_of(net, "cut"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    repeated = config["num_attention_heads"] // config["num_key_value_heads"]
    assert config["per_layer_config"] == {"1": {"num_attention_heads": repeated, "num_key_value_heads": 1}}
    layers = carried(tmp_path / "m").config.per_layer_config
    assert [layer.num_key_value_heads for layer in layers] == [config["num_key_value_heads"], 1]


def test_weights_of_another_shape_are_refused_aloud(shop, tmp_path):
    root, _ = shop
    folder = tmp_path / "m"
    shutil.copytree(root / "llama_tied", folder)
    with pytest.raises(ValueError, match="random numbers"):
        carried(folder, ignore_mismatched_sizes=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing_keys model\.norm\.weight"):
        carried(folder)
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises((RuntimeError, ValueError)):
        carried(folder)


def test_a_dense_model_needs_no_code(tmp_path):
    net = ZOO["llama_tied"].build()
    save(net, tmp_path / "m", origin=origin_of(net, "dense"))
    assert not (tmp_path / "m" / "modeling_regrow.py").exists()
    assert "auto_map" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_a_dropped_layer_travels(tmp_path):
    net, (args, kwargs) = ZOO["llama_tied"].build(), ZOO["llama_tied"].example()
    axes = with_branches(net, trace(net, *args, **kwargs))
    apply(net, axes, Plan.dropping(axes, ["model.layers.0.mlp"]))
    written = to_transformers.write(net, tmp_path / "m", **SILENT)
    assert written.checked == {"max_abs_diff": 0.0, "loaded_as": "RegrownLlamaForCausalLM"}


@pytest.mark.parametrize("paths", [["model.layers.1"], ["model.layers.1.self_attn", "model.layers.1.mlp"]])
@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_blocks_that_were_dropped_whole_are_left_out(tmp_path, name, paths):
    small, (args, kwargs) = ZOO[name].build(), ZOO[name].example()
    settings = small.config.to_dict() | {"num_hidden_layers": 3, "layer_types": None}
    net = type(small)(type(small.config)(**settings)).eval()
    axes = with_branches(net, trace(net, *args, **kwargs))
    apply(net, axes, Plan.dropping(axes, paths))
    written = to_transformers.write(net, tmp_path / "m", **SILENT)
    assert written.checked == {"max_abs_diff": 0.0, "loaded_as": type(net).__name__}
    assert load(tmp_path / "m").config.num_hidden_layers == 2
    assert net.config.num_hidden_layers == len(net.model.layers) == 3  # what was exported stays as it was


def test_an_export_tells_how_vllm_serves_it(tmp_path):
    notes = {}
    for module in ("mlp", "self_attn"):
        net, (args, kwargs) = ZOO["llama_tied"].build(), ZOO["llama_tied"].example()
        axes = with_branches(net, trace(net, *args, **kwargs))
        apply(net, axes, Plan.dropping(axes, [f"model.layers.1.{module}"]))
        notes[module] = to_transformers.write(net, tmp_path / f"a {module}", **SILENT).notes[-1]
    assert notes["mlp"].endswith(f"--model '{tmp_path}/a mlp' --model-impl transformers --trust-remote-code")
    assert notes["self_attn"].startswith("vLLM refuses a layer without attention (1)")


def regular():
    """A Llama of which every layer lost as many units, but others; the residual stream is narrower too."""
    net, (args, kwargs) = ZOO["llama_tied"].build(), ZOO["llama_tied"].example()
    axes = trace(net, *args, **kwargs)
    left = {"self_attn.q_proj.weight:0/16": 2, "mlp.gate_proj.weight:0": 20, "self_attn.q_proj.weight:1": 32}
    keep = {}
    for axis in axes.free():
        for end, units in left.items():
            if axis.key.endswith(end):
                keep[axis.key] = sorted(torch.randperm(axis.size)[:units].tolist())
    apply(net, axes, Plan.keeping(axes, keep))
    return net


def test_layers_that_are_all_alike_need_no_code(tmp_path):
    net = regular()
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.randn(32))  # as compensation leaves one
    written = to_transformers.write(net, tmp_path / "m", **SILENT)
    assert written.checked["loaded_as"] == "LlamaForCausalLM" and "no code" in written.notes[0]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["mlp_bias"] is True and config["intermediate_size"] == 20 and "regrow" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=False)
    assert type(again) is LlamaForCausalLM and not again.model.layers[0].mlp.up_proj.bias.any()


def test_image_networks_travel_with_a_builder(tmp_path):
    case = saved.CASES["resnet18"]
    net, _, _ = saved.cut(case)
    net.origin = Origin("torchvision", "resnet18", {}, "resnet18")
    written = to_torchvision.write(net, tmp_path / "m", **SILENT)
    assert written.checked == {"max_abs_diff": 0.0}
    code = (
        "import sys; sys.modules['regrow'] = None; from load_regrow import load; print(len(list(load().parameters())))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path / "m", check=True, timeout=120)


def test_what_cannot_travel_is_refused(tmp_path):
    net = ZOO["llama_tied"].build()
    with pytest.raises(ValueError, match="float8"):
        regrow.export(net, tmp_path / "m", format="transformers", dtype="float8")
    with pytest.raises(ExportError, match="no torchvision network"):
        to_torchvision.write(net, tmp_path / "m", **SILENT)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="choose another folder"):
        to_transformers.write(net, tmp_path / "others", **SILENT)


def test_parts_with_other_attention_are_built_again(tmp_path):
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"])
    of_part = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in of_part.items()}
    config = DetrConfig(backbone_config=backbone, d_model=16, num_queries=5, num_labels=3, **sizes)
    net, example = DetrForObjectDetection(config).eval(), {"pixel_values": torch.randn(1, 3, 32, 32)}
    save(net, tmp_path / "net", example=example)
    assert torch.equal(load(tmp_path / "net")(**example).logits, net(**example).logits)
