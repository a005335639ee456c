"""What is loaded is what was saved, or an error says what differs."""

import json

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regrow import Plan, apply, trace
from regrow.core.axes import Example
from regrow.nets import ModelError, Origin, replace_attention
from regrow.nets import load as load_by_name
from regrow.store import load, save
from regrow.store.shapes import content_digest


class Crossing(nn.Module):
    """Attention whose keys and values have widths of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, kdim=7, vdim=5, batch_first=True)
        self.up, self.down = nn.Linear(12, 9), nn.Linear(9, 12)

    def forward(self, query, key, value):
        return self.down(self.up(self.attention(query, key, value)[0]).relu())


def crossing():
    torch.manual_seed(0)
    return Crossing().eval()


CROSSED = (torch.ones(2, 4, 12), torch.linspace(-1, 1, 84).reshape(2, 6, 7), torch.linspace(-1, 1, 60).reshape(2, 6, 5))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_attention_with_widths_of_its_own_comes_back(tmp_path, cut, closed, known):
    net = crossing() if closed else replace_attention(crossing())
    if cut:
        axes = trace(net, *CROSSED)
        net, _ = apply(net, axes, Plan.keeping(axes, {one.key: range(one.size - one.multiple) for one in axes.free()}))
    save(net, tmp_path, origin=Origin("callable", "", builder=crossing) if known else None)
    for mine in (crossing, crossing()):
        again = load(tmp_path, model=mine)
        assert isinstance(again.attention, nn.MultiheadAttention) == closed
        assert torch.equal(again(*CROSSED), net(*CROSSED))


def test_a_shared_attention_stays_shared_and_only_named_ones_are_opened():
    both = nn.ModuleDict({"a": nn.MultiheadAttention(6, 2), "c": nn.MultiheadAttention(6, 2)})
    both["b"] = both["a"]
    replace_attention(both, {"a.q_proj.weight", "b.q_proj.weight"})
    assert both["a"] is both["b"] and not isinstance(both["a"], nn.MultiheadAttention)
    assert isinstance(both["c"], nn.MultiheadAttention)


@pytest.fixture
def llama(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def fewer_layers(path, change):
    data = json.loads(path.read_text())
    change(data)
    if path.name == "shapes.json":
        data["sha256"] = content_digest(data)
    path.write_text(json.dumps(data))


def test_weights_that_the_configuration_does_not_describe_are_an_error(llama):
    load_by_name(str(llama))
    fewer_layers(llama / "config.json", lambda d: d.update(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"9 tensors are in the weights or in config\.json alone, 'model\.layers\.1"):
        load_by_name(str(llama))


def test_weights_that_are_missing_are_an_error(llama):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 tensors .*'model\.layers\.1\.mlp\.up_proj\.weight' first"):
        load_by_name(str(llama))


def test_a_saved_folder_with_more_weights_than_it_describes_is_refused(llama, tmp_path):
    folder = save(load_by_name(str(llama)), tmp_path / "saved")
    fewer_layers(folder / "config.json", lambda d: d.update(num_hidden_layers=1))
    fewer_layers(folder / "shapes.json", lambda d: d["origin"]["config"].update(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no place for the tensor 'model\.layers\.1"):
        load(folder)


def test_a_gguf_file_with_more_weights_than_it_describes_is_refused(llama, tmp_path):
    import gguf

    from regrow.exporters.gguf import write

    path = write(load_by_name(str(llama)).model, tmp_path / "m.gguf", dtype="f32").path
    load_by_name(str(path))
    reader = gguf.GGUFReader(path, "r+")
    field = reader.fields["llama.block_count"]
    count = field.parts[field.data[0]]
    assert count[0] == 2
    count[0] = 1
    del reader, field, count
    with pytest.raises(ModelError, match=r"weights, of which its metadata describe"):
        load_by_name(str(path))


class Holding(nn.Module):
    """A net with a scale and an offset that are plain attributes, and a list that names its weight again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale, self.weights = torch.ones(8), [self.second.weight]

    def forward(self, x):
        return self.first(x).relu() * self.scale @ self.weights[0].t() + self.second.bias


def holding():
    torch.manual_seed(1)
    return Holding().eval()


@pytest.mark.parametrize("known", [False, True])
def test_a_tensor_that_is_a_plain_attribute_comes_back(tmp_path, known):
    net, x = holding(), torch.linspace(-1, 1, 12).reshape(2, 6)
    net.scale = torch.linspace(0.5, 2, 8)
    net.first.note = torch.arange(3)
    with torch.no_grad():
        net.second.weight.mul_(2)
    save(net, tmp_path, origin=Origin("callable", "", builder=holding) if known else None, example=x)
    again = load(tmp_path, model=holding)
    assert torch.equal(again.scale, net.scale) and torch.equal(again.first.note, torch.arange(3))
    assert again.weights[0] is again.second.weight
    assert torch.equal(again(x), net(x))
    record = json.loads((tmp_path / "shapes.json").read_text())["tensors"]
    assert record["scale"]["kind"] == "attribute" and "probe.st" in {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize("built", [torch.ones(2), None])
def test_a_tensor_in_a_list_that_a_new_network_has_not_is_refused(tmp_path, built):
    def other():
        made = holding()
        made.first.masks = {"a": [built]}
        return made

    net = holding()
    net.first.masks = {"a": [torch.zeros(2)]}
    with pytest.raises(ValueError, match=r"first\.masks\['a'\]\[0\] is a tensor in a list.*register_buffer"):
        save(net, tmp_path / "m", origin=Origin("callable", "", builder=other))
    assert not (tmp_path / "m").exists()
    net.first.masks = {"a": [torch.ones(2)]}
    if built is not None:
        save(net, tmp_path / "m", origin=Origin("callable", "", builder=other), example=torch.ones(1, 6))
        assert torch.equal(load(tmp_path / "m", model=other).first.masks["a"][0], built)


@pytest.mark.parametrize("name", ["first.forward", "first.__class__", "first.weight", "first._buffers", "no.where", ""])
def test_a_record_puts_no_attribute_in_another_place(tmp_path, name):
    net = holding()
    net.scale = torch.zeros(8)
    save(net, tmp_path)
    fewer_layers(tmp_path / "shapes.json", lambda d: d["tensors"].update({name: d["tensors"].pop("scale")}))
    with pytest.raises(ValueError, match="no place for the tensor"):
        load(tmp_path, model=holding)


def test_a_changed_tensor_is_named(tmp_path):
    from regrow.store.weights import describe_file

    net = holding()
    save(net, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["second.weight"][0, 0] += 1e-6
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    file = describe_file(tmp_path / "model.safetensors")
    fewer_layers(
        tmp_path / "shapes.json",
        lambda d: d["files"].update({"model.safetensors": msgspec.to_builtins(file)}),
    )
    with pytest.raises(ValueError, match=r"'second\.weight' does not have the recorded SHA-256"):
        load(tmp_path, model=holding)
    assert load(tmp_path, model=holding, check=False) is not None


class Powers(Holding):
    """The same weights, computed otherwise."""

    def forward(self, x):
        return super().forward(x) ** 2


def test_a_network_that_answers_otherwise_is_refused(tmp_path):
    net = holding()
    save(net, tmp_path)
    with pytest.raises(ValueError, match=r"outputs differ .* by .* check=False"):
        load(tmp_path, model=lambda: Powers())
    assert isinstance(load(tmp_path, model=lambda: Powers(), check=False), Powers)
    path = tmp_path / "probe.st"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"probe\.st .* the recorded SHA-256"):
        load(tmp_path, model=holding)


@pytest.mark.parametrize(
    ("conditions", "change", "fits"),
    [
        ({}, 1e-6, False),  # the same machine: bit for bit
        ({"threads": "99"}, 1e-6, True),  # another number of threads: within rounding
        ({"torch": "0.1"}, 1e-2, False),
    ],
)
def test_how_near_an_answer_must_be(tmp_path, conditions, change, fits):
    net = holding()
    save(net, tmp_path)

    def other():
        made = holding()
        made.second.register_forward_hook(lambda *_: None)
        made.register_forward_hook(lambda module, given, said: said * (1 + change))
        return made

    from regrow.store.probe import FILE, FORMAT
    from regrow.store.tensors import read_tensors, write_tensors
    from regrow.store.weights import describe_file

    header, tensors = read_tensors(tmp_path / FILE, FORMAT)
    header["conditions"] |= conditions
    kept = {key: value for key, value in header.items() if key not in ("format", "names", "sha256")}
    write_tensors(tmp_path / FILE, tensors, kept, FORMAT)
    file = describe_file(tmp_path / FILE)
    fewer_layers(tmp_path / "shapes.json", lambda d: d.update(probe=msgspec.to_builtins(file)))
    if fits:
        load(tmp_path, model=other)
    else:
        with pytest.raises(ValueError, match="outputs differ"):
            load(tmp_path, model=other)


def test_a_network_without_a_known_input_says_so(tmp_path, caplog):
    net = nn.Bilinear(2, 3, 4)
    save(net, tmp_path)
    why = "no example input is known; give one that it takes: save(…, example=input)"
    assert caplog.messages == [f"the output of the saved model is not recorded, so that load cannot check it: {why}"]
    told = json.loads((tmp_path / "shapes.json").read_text())["probe"]
    assert told == {"reason": "no example input is known; give one that it takes: save(…, example=input)"}
    caplog.clear()
    load(tmp_path, model=lambda: nn.Bilinear(2, 3, 4))
    assert caplog.messages == [
        f"{tmp_path}: the output of the model was not recorded, so that it is not checked: {why}"
    ]
    caplog.clear()
    load(tmp_path, model=lambda: nn.Bilinear(2, 3, 4), check=False)
    assert not caplog.messages


class Keyworded(nn.Module):
    """A net that is called with a mapping by name alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, *, batch):
        return self.layer(batch["x"])


def test_a_network_that_does_not_take_the_guessed_input_says_what_to_give(tmp_path, caplog):
    net = Keyworded().eval()
    save(net, tmp_path / "a")
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("; give one that it takes: save(…, example=input)")
    caplog.clear()
    save(net, tmp_path / "b", example=Example((), {"batch": {"x": torch.ones(1, 2)}}))
    load(tmp_path / "b", model=Keyworded)
    assert not caplog.messages


class Counting(nn.Module):
    """Keeps what it saw, and counts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.layer(x)
        return self.last


def test_saving_and_loading_leave_no_trace_of_the_probe(tmp_path):
    net = Counting().train()
    save(net, tmp_path)
    again = load(tmp_path, model=Counting)
    assert net.training and float(net.calls) == float(again.calls) == 0
    assert not hasattr(net, "last") and not hasattr(again, "last")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_ones_own_that_is_saved_in_another_dtype_comes_back(dtype, tmp_path):
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    net, x = build().eval(), torch.randn(2, 4)
    save(net, tmp_path / "net", dtype=dtype, example=x)
    loaded = load(tmp_path / "net", model=build)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    torch.testing.assert_close(loaded(x.to(dtype)).float(), net(x), rtol=0.02, atol=0.02)
