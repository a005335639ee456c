"""A GGUF file says what the network says: read back tensor by tensor, and computed as llama.cpp would."""

import json
import os
from copy import deepcopy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporters.deci import File, logits
from regrow import Plan, apply, export, load, prune, recover, trace, with_branches
from regrow.core.axes.operations import Placeholder
from regrow.exporters import ExportError
from regrow.exporters import gguf as format
from regrow.exporters.gguf import LEVELS, allowed_error, encode, write
from regrow.exporters.gguf.llama_cpp import PARTS, describe_decoder
from regrow.store import save
from regrow.store.shapes import content_digest
from regrow.tracing.branches import insert_placeholders
from store.saved import Case, cut
from zoo import GROUPED, SMALL, ZOO, randomise

MEANS = ("mlp.down_proj.weight", "self_attn.o_proj.weight")


def llama(layers: int = 4, family: str = "Llama", **settings: object) -> nn.Module:
    """A small one, of random weights."""
    import transformers

    wanted = SMALL | GROUPED | {"num_hidden_layers": layers, "rope_theta": 500.0} | settings
    config = getattr(transformers, f"{family}Config")(**wanted)
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config))


def ids(tokens: int = 9) -> Tensor:
    return torch.randint(0, SMALL["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(3))


def same(model: nn.Module, path: Path, tokens: int = 9) -> None:
    """What the file computes is what the network computes."""
    with torch.no_grad():
        expected = model.double()(ids(tokens)[None], use_cache=False).logits[0]
    model.float()
    torch.testing.assert_close(logits(path, ids(tokens)), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_single", "mistral", "qwen2"])
def test_an_irregular_network_is_written_as_deci(name: str, tmp_path: Path) -> None:
    case = Case(ZOO[name].build, ZOO[name].example, lambda _: None, MEANS)
    model, _, plan = cut(case, seed=2)
    assert plan.means, "no bias, no test of biases"
    done = write(model, tmp_path / "model.gguf", dtype="f32")
    file = File(done.path)
    assert file.architecture == done.checked["architecture"] == "deci"
    assert (done.checked["max_abs_diff"], done.bytes) == (0.0, done.path.stat().st_size)
    assert "blk.0.ffn_down.bias" in file.tensors and file.kinds["blk.0.ffn_down.bias"] == "F32"
    assert ("output.weight" in file.tensors) == (not model.config.tie_word_embeddings)
    assert len({*file.number("feed_forward_length")}) > 1
    same(model, done.path, tokens=4 if name == "mistral" else 9)  # its window


def test_a_regular_network_is_written_as_llama(tmp_path: Path) -> None:
    model = llama()
    done = write(model, tmp_path / "model.gguf", dtype="f32")
    file = File(done.path)
    assert file.architecture == done.checked["architecture"] == "llama"
    assert (file.number("attention.head_count"), file.number("feed_forward_length")) == (6, 56)
    assert not any("token numbers" not in note for note in done.notes)
    same(model, done.path)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_positions_are_written_as_factors(rope: dict, tmp_path: Path) -> None:
    model = llama(2, rope_parameters=rope | {"rope_theta": 500.0})
    done = write(model, tmp_path / "model.gguf", dtype="f32")
    assert float((File(done.path).tensors["rope_freqs.weight"] - 1).abs().max()) > 0.1
    same(model, done.path)


def test_frequencies_that_half_precision_rounded_are_kept_as_they_are(tmp_path: Path) -> None:
    model = llama(2).to(torch.bfloat16)
    rounded = model.model.rotary_emb.inv_freq.float()
    file = File(write(model, tmp_path / "model.gguf", dtype="bf16").path)
    usual = 500.0 ** (-torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close((usual / file.tensors["rope_freqs.weight"]).float(), rounded)


DROPS = {
    "an attention": ["model.layers.2.self_attn"],
    "last attention": ["model.layers.3.self_attn"],
    "an MLP": ["model.layers.1.mlp"],
    "last MLP": ["model.layers.3.mlp"],
    "both of a layer": ["model.layers.3.self_attn", "model.layers.3.mlp"],
    "a layer": ["model.layers.1"],
}


@pytest.mark.parametrize("drop", DROPS.values(), ids=DROPS.keys())
def test_dropped_branches(drop: list[str], tmp_path: Path) -> None:
    model = llama()
    axes = with_branches(model, trace(model, input_ids=ids()[None]))
    apply(model, axes, Plan.dropping(axes, drop))
    done = write(model, tmp_path / "model.gguf", dtype="f32")
    file = File(done.path)
    gone = len(drop) == 2 or drop == ["model.layers.1"]
    assert file.number("block_count") == (3 if gone else 4)
    assert any("left out" in note for note in done.notes) == gone
    assert 0 not in file.per_layer("feed_forward_length"), "llama.cpp would forget the attention"
    same(model, done.path)


def test_a_first_layer_without_attention_gets_a_head_of_zeros(tmp_path: Path) -> None:
    model = llama()
    insert_placeholders(model, {"model.layers.0.self_attn": Placeholder("zero", "hidden_states", 2)})
    done = write(model, tmp_path / "model.gguf", dtype="f32")
    assert File(done.path).number("attention.head_count") == [1, 6, 6, 6]
    same(model, done.path)


QUANTISED = [type.lower() for type in LEVELS]
FITTING = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("dtype", ["f16", "bf16", *QUANTISED])
def test_types_are_as_near_as_they_can_be(dtype: str, tmp_path: Path) -> None:
    model = llama(2, hidden_size=256, intermediate_size=544, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    done = write(model, tmp_path / "model.gguf", dtype=dtype)
    file, kind = File(done.path), dtype.upper()
    for name in ("token_embd", "blk.1.attn_q", "blk.1.ffn_down"):
        assert file.kinds[f"{name}.weight"] == kind
    assert not any("--round" in note for note in done.notes)
    assert file.kinds["blk.1.ffn_norm.weight"] == "F32"
    most = {"f16": 3e-4, "bf16": 3e-3, "q8_0": 8e-3, "q5_1": 6e-2, "q5_0": 6e-2, "q4_1": 0.12, "q4_0": 0.12}[dtype]
    assert most / 10 < done.checked["relative_rms"] < most
    rows = model.model.layers[1].mlp.gate_proj.weight.detach()
    back = file.tensors["blk.1.ffn_gate.weight"].float()
    if dtype in ("f16", "bf16"):
        assert torch.equal(back, rows.to(torch.float16 if dtype == "f16" else torch.bfloat16).float())
    assert float((back - rows).norm() / rows.norm()) < most


@pytest.mark.parametrize("type", LEVELS)
def test_a_quantised_number_has_its_nearest_value_and_no_other(type: str) -> None:
    values = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    values[0] *= 1e-7  # float16 holds their step as a subnormal number
    values[1, :64], values[1, 3:5], values[2] = 0, (1, -1), 5.3
    limit, kind = allowed_error(values, type), gguf.GGMLQuantizationType[type]
    stored = encode(values, type, gguf)
    back = gguf.quants.dequantize(stored, kind)
    assert (np.abs(back - values) <= limit).all()
    changed = stored.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1]).copy()
    changed[:, -16:] ^= 0x11 if type != "Q8_0" else 1  # each number of 4 or 5 bits moves by one step, of 8 bits half
    other = gguf.quants.dequantize(changed.reshape(stored.shape), kind)
    moved = (other != back)[3:]
    assert moved.mean() == (0.5 if type == "Q8_0" else 1)
    assert (np.abs(other - values) > limit)[3:][moved].mean() > 0.97, "others lie between two values"
    changed = stored.reshape(changed.shape).copy()
    changed[:, 0] ^= 4  # of the step, 2⁻⁸ or more
    wrong = np.abs(gguf.quants.dequantize(changed.reshape(stored.shape), kind) - values) > limit
    assert wrong.reshape(-1, 32)[9:].any(-1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_network_in_four_bits_has_five(tied: bool, tmp_path: Path) -> None:
    model = llama(1, tie_word_embeddings=tied, **FITTING)
    for dtype in ("q4_0", "q5_1", "q8_0", "f16"):
        done = write(model, tmp_path / "model.gguf", dtype=dtype)
        kinds, wide = File(done.path).kinds, "Q5_0" if dtype == "q4_0" else dtype.upper()
        assert kinds.pop("token_embd.weight" if tied else "output.weight") == wide
        assert {kind for name, kind in kinds.items() if "norm" not in name} == {dtype.upper()}
        assert any("1 of the matrices in Q5_0" in note for note in done.notes) == (dtype == "q4_0")


def of_file(model: nn.Module, file: File) -> nn.Module:
    """A copy with the weights of a file, whose order of rows is undone."""
    model = deepcopy(model)
    for i, layer in enumerate(describe_decoder(model).layers):
        for path, linear in layer.linear.items():
            rows = file.tensors[f"blk.{i}.{PARTS[path]}.weight"]
            if heads := {"self_attn.q_proj": layer.heads, "self_attn.k_proj": layer.kv_heads}.get(path):
                rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
            linear.weight.data = rows.float()
    model.model.embed_tokens.weight.data = file.tensors["token_embd.weight"].float()
    model.lm_head.weight.data = file.tensors["output.weight"].float()
    return model


@pytest.mark.parametrize("dtype", ["q4_0", "q4_1"])
def test_a_pruned_and_recovered_network_is_quantised(dtype: str, tmp_path: Path) -> None:
    model = llama(2, **FITTING)
    dense = deepcopy(model)
    data = torch.randint(0, SMALL["vocab_size"], (16, 12), generator=torch.Generator().manual_seed(0))
    _, plan = prune(model, data, method="magnitude", only=["mlp"], keep=0.8, round_to=32, batch_size=4)
    recover(model, dense, plan, data, by="refit")
    path = export(model, tmp_path / "model.gguf", format="gguf", dtype=dtype).path
    file = File(path)
    assert sum(file.per_layer("feed_forward_length")) < 2 * FITTING["intermediate_size"]
    assert "blk.0.ffn_down.bias" in file.tensors, "the repair was lost"
    assert {kind for name, kind in file.kinds.items() if "_down.weight" in name} == {dtype.upper()}
    same(of_file(model, file), path)
    with torch.no_grad():
        assert not torch.allclose(logits(path, ids()), model(ids()[None]).logits[0].double(), rtol=1e-3)


def test_rows_of_no_whole_blocks_stay_wide(tmp_path: Path) -> None:
    model, _, _ = cut(Case(ZOO["llama"].build, ZOO["llama"].example, lambda _: None, MEANS))
    done = write(model, tmp_path / "model.gguf", dtype="q8_0")
    kinds = File(done.path).kinds
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert any("no multiple of 32; widths pruned with --round 32 are" in note for note in done.notes)


def test_a_file_is_called_what_most_of_it_is(tmp_path: Path) -> None:
    model = llama(1, hidden_size=64, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    file = File(write(model, tmp_path / "model.gguf", dtype="q8_0").path)
    assert file.kinds["blk.0.ffn_down.weight"] == "F16" and file.kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert file.said["general.file_type"] == 7, "which is Q8_0"


REFUSED = {
    "qwen3": (lambda: ZOO["qwen3"].build(), "q_norm.weight, for which"),
    "gemma3": (lambda: ZOO["gemma3"].build(), "for which llama.cpp's llama and deci have no place"),
    "gpt2": (lambda: ZOO["gpt2"].build(), "no model.layers"),
    "phi3": (lambda: ZOO["phi3"].build(), "no self_attn.q_proj"),
    "vision": (lambda: nn.Sequential(nn.Linear(2, 2)), "no Llama-like decoder"),
    "gelu": (lambda: llama(2, hidden_act="gelu"), "function is 'gelu'"),
    "dynamic": (lambda: llama(2, rope_parameters={"rope_type": "dynamic", "factor": 2.0}), "rope_type 'dynamic'"),
    "epsilon": (lambda: changed("model.layers.1.input_layernorm", "variance_epsilon", 0.1), "norms have different ε"),
    "values": (lambda: changed("model.layers.0.self_attn.v_proj", "out_features", 48), "heads of other sizes"),
    "groups": (lambda: changed("model.layers.0.self_attn", "num_key_value_groups", 3), "6 query heads"),
}


def changed(path: str, name: str, value: object) -> nn.Module:
    model = llama(2)
    setattr(model.get_submodule(path), name, value)
    return model


@pytest.mark.parametrize(("build", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_would_compute_otherwise_is_refused(build, why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=why):
        write(build(), tmp_path / "model.gguf")
    assert not [*tmp_path.iterdir()]


def test_a_class_that_nobody_compared_is_refused(tmp_path: Path) -> None:
    class LlamaForCausalLM(type(llama(1))):
        pass

    model = llama(1)
    model.__class__ = LlamaForCausalLM
    with pytest.raises(ExportError, match="was not compared"):
        write(model, tmp_path / "model.gguf")


def test_numbers_beyond_half_precision_are_refused_and_the_old_file_stands(tmp_path: Path) -> None:
    model, out = llama(1), tmp_path / "model.gguf"
    out.write_text("old")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = 1e5
    with pytest.raises(ExportError, match=r"blk\.0\.ffn_up\.weight holds numbers that F16 does not reach"):
        write(model, out)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    write(model, out, dtype="bf16")


@pytest.mark.parametrize("dtype", ["f32", "f16", *QUANTISED])
def test_a_file_that_says_something_else_is_noticed(dtype: str, tmp_path: Path, monkeypatch) -> None:
    model = llama(1, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)

    def wrong(values, kind, gguf):
        values = values.copy()
        values.flat[-1] += values.max() / 8
        return encode(values, kind, gguf)

    monkeypatch.setattr(format, "encode", wrong)
    with pytest.raises(ExportError, match="is off by up to"):
        write(model, tmp_path / "model.gguf", dtype=dtype)
    assert not [*tmp_path.iterdir()]


def test_a_file_that_a_full_disk_cut_short_is_noticed(tmp_path: Path, monkeypatch) -> None:
    put = format._write_file

    def short(gguf, path, *more):
        put(gguf, path, *more)
        os.truncate(path, path.stat().st_size - 1000)

    monkeypatch.setattr(format, "_write_file", short)
    with pytest.raises(ExportError, match=r"cannot be read back .*; the disk may be full: free some space"):
        write(llama(1), tmp_path / "model.gguf")
    assert not [*tmp_path.iterdir()]


def test_places_and_types_that_make_no_sense(tmp_path: Path) -> None:
    model = llama(1)
    with pytest.raises(ValueError, match="is a folder"):
        export(model, tmp_path, format="gguf")
    with pytest.raises(ValueError, match="there is no folder"):
        write(model, tmp_path / "no" / "model.gguf")
    with pytest.raises(ValueError, match="it stores f16, f32, bf16, q8_0, q5_1, q5_0, q4_1, q4_0"):
        export(model, tmp_path / "model.gguf", format="gguf", dtype="int4")


def test_a_saved_run_gives_the_same_file_and_a_name_leads_nowhere(tmp_path: Path) -> None:
    model = llama(2)
    axes = trace(model, input_ids=ids()[None])
    keep = {axis.key: range(0, axis.size, 2) for axis in axes.free() if axis.size == GROUPED["intermediate_size"]}
    apply(model, axes, Plan.keeping(axes, keep))
    path = save(deepcopy(model), tmp_path / "run") / "shapes.json"
    record = json.loads(path.read_text())
    record["origin"]["name"] = "../../ev\ud800\nil"
    path.write_text(json.dumps(record | {"sha256": content_digest(record)}))
    again = load(tmp_path / "run")
    (tmp_path / "out").mkdir()
    steps: list[tuple[int, int]] = []
    done = write(again, tmp_path / "out" / "model.gguf", progress=lambda i, n, _: steps.append((i, n)))
    assert File(done.path).said["general.name"] == "evil"
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["model.gguf"]
    assert steps == [(i, steps[-1][1]) for i in range(len(steps))] and steps[-1][0] == steps[-1][1]
    first, second = File(done.path), File(write(model, tmp_path / "model.gguf").path)
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())


def test_what_is_said_of_a_network_costs_no_copy_of_it() -> None:
    model = llama(2)
    decoder = describe_decoder(model)
    held = {id(p) for p in model.parameters()}
    assert {id(linear.weight) for one in decoder.layers for linear in one.linear.values()} <= held
