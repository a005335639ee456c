"""Streamed = in memory: the same sums of the inputs of every weight, bit for bit, with one block in memory."""

import pytest
import torch

from regrow import nets
from regrow.evidence import Need
from regrow.scoring import collect
from regrow.sources import Batch, Source
from regrow.streaming.opening import open_network
from regrow.tracing import trace


def configurations():
    """Tiny decoders of several families: plain, with learned positions, tied, with windows and norms of their own."""
    from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig

    common = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "llama": LlamaConfig(**common, **heads, tie_word_embeddings=False),
        "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        "gemma3": Gemma3TextConfig(**common, **heads, head_dim=8, sliding_window=4),
    }


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma3"])
def folder(request, tmp_path_factory):
    """A transformers folder of a tiny random decoder, in several shards."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configurations()[request.param])
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path, max_shard_size="30KB")
    return path


def sources():
    """Two sources of three batches, the last of which is padded."""
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    rows = [[torch.randint(96, (2, 12)) for _ in range(3)] for _ in range(2)]
    kwargs = [{"use_cache": False}, {"use_cache": False}, {"use_cache": False, "attention_mask": mask}]
    return [
        Source(f"s{i}", [Batch((ids,), more, ids) for ids, more in zip(row, kwargs, strict=True)])
        for i, row in enumerate(rows)
    ]


@pytest.mark.parametrize("on_disk", [False, True])
def test_streamed_sums_are_those_of_the_whole_network(folder, on_disk, tmp_path):
    loaded = nets.load(str(folder))
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    opened = open_network(str(folder))
    assert [axis.key for axis in opened.axes] == [axis.key for axis in axes]
    network = opened.network(tmp_path if on_disk else None)
    assert len(network.blocks) == 3
    options = {"needs": {Need.ACTIVATIONS}, "shards": 3, "units": [*axes]}
    whole = collect(loaded.model, axes, sources(), **options)
    streamed = collect(opened.loaded.model, opened.axes, sources(), visits=network, **options)
    assert not any(tmp_path.iterdir())
    for name, shards in whole.items():
        for one, other in zip(shards, streamed[name], strict=True):
            assert one.tokens == other.tokens
            assert list(one.moments) == list(other.moments)
            for weight, sums in one.moments.items():
                for part in ("count", "total", "square", "sequences", "mean_total", "mean_square"):
                    assert torch.equal(*(torch.as_tensor(getattr(m, part)) for m in (sums, other.moments[weight])))


def test_streamed_outputs_are_those_of_the_whole_network(folder):
    loaded, network = nets.load(str(folder)), open_network(str(folder)).network()
    batches = [batch for source in sources() for batch in source]
    with torch.no_grad():
        for batch, output in zip(batches, network.outputs(batches), strict=True):
            assert torch.equal(output.logits, loaded.model(*batch.args, **batch.kwargs).logits)
        with network.on_demand() as model:
            assert torch.equal(model(*batches[0].args).logits, loaded.model(*batches[0].args).logits)
