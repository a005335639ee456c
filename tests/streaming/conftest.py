"""What tests of streaming share: tiny decoders of several families in transformers folders, and text for them."""

import pytest
import torch

from regrow.core.sources import Batch, Source


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


@pytest.fixture
def sources():
    """Two sources of three batches, the last of which is padded."""
    torch.manual_seed(1)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    rows = [[torch.randint(96, (2, 12)) for _ in range(3)] for _ in range(3)]
    kwargs = [{"use_cache": False}, {"use_cache": False}, {"use_cache": False, "attention_mask": mask}]
    return [
        Source(f"s{i}", [Batch((ids,), more, ids) for ids, more in zip(row, kwargs, strict=True)])
        for i, row in enumerate(rows)
    ]
