"""What is loaded is what was saved, or an error says what differs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regrow import Plan, apply, trace
from regrow.nets import ModelError, Origin, opened
from regrow.nets import load as load_by_name
from regrow.runs import load, save


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
    net = crossing() if closed else opened(crossing())
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
    opened(both, {"a.q_proj.weight", "b.q_proj.weight"})
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
    path.write_text(json.dumps(data))


def test_weights_that_the_configuration_does_not_describe_are_an_error(llama):
    load_by_name(str(llama))
    fewer_layers(llama / "config.json", lambda d: d.update(num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"9 tensors that config\.json does not describe, 'model\.layers\.1"):
        load_by_name(str(llama))


def test_weights_that_are_missing_are_an_error(llama):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 parameters, 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        load_by_name(str(llama))


def test_a_saved_folder_with_more_weights_than_it_describes_is_refused(llama, tmp_path):
    folder = save(load_by_name(str(llama)), tmp_path / "saved")
    fewer_layers(folder / "config.json", lambda d: d.update(num_hidden_layers=1))
    fewer_layers(folder / "shapes.json", lambda d: d["origin"]["config"].update(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"no place for the tensor 'model\.layers\.1"):
        load(folder)


def test_a_gguf_file_with_more_weights_than_it_describes_is_refused(llama, tmp_path):
    import gguf

    from regrow.export.gguf import write

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
