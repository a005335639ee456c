"""Text that a language model generates: the distribution of its tokens, and calls that go on where one was stopped."""

import pytest
import torch

from regrow.core.errors import InputError
from regrow.evaluation import generation
from regrow.evaluation.generation import (
    check_generation,
    generate_tokens,
    predict_generation_bytes,
    sample,
    sampling_dtype,
)

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 300, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(eos_token_id=5, attention_dropout=0.5, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


def test_tokens_are_sampled_from_the_softmax():
    """Evenly spaced draws hit each token as often as its probability says, over several blocks and in any row."""
    torch.manual_seed(0)
    logits = torch.randn(1, 700)
    draws = (torch.arange(5_000) + 0.5) / 5_000
    counts = sample(logits.expand(len(draws), -1), draws).bincount(minlength=700) / len(draws)
    torch.testing.assert_close(counts, logits[0].softmax(0), atol=3e-4, rtol=0)


@pytest.mark.parametrize(("stretch", "sizes"), [(4, [10, 20, 25]), (6, [12, 20, 26]), (16, [20])])
def test_a_stopped_call_goes_on_to_the_same_text(llama, monkeypatch, stretch, sizes):
    """Stretches and batches are stored; text does not stop at the token that ends it, nor does the model change."""
    monkeypatch.setattr(generation, "ROWS_ON_CPU", 2)
    monkeypatch.setattr(generation, "STRETCH", stretch)
    settings = llama.generation_config.to_dict()
    whole = torch.full((3, 10), -1)
    generate_tokens(llama, whole, 0, seed=3)
    assert whole.min() >= 0 and whole.max() < 300
    stops = torch.full((3, 10), -1)
    stored = []

    def store():
        stored.append(int((stops >= 0).sum()))
        raise KeyboardInterrupt

    for _ in sizes:
        with pytest.raises(KeyboardInterrupt):
            generate_tokens(llama, stops, 0, seed=3, store=store)
    assert stored == sizes
    shown = []
    generate_tokens(llama, stops, 0, seed=3, progress=lambda *row: shown.append(row))
    assert torch.equal(stops, whole) and shown[0] == (sizes[-1], 30, "generating text")
    other = torch.full((3, 10), -1)
    generate_tokens(llama, other, 0, seed=4)
    assert not torch.equal(other, whole)
    assert llama.generation_config.to_dict() == settings and llama.lm_head.weight.dtype == torch.float32


def test_other_networks_are_refused():
    with pytest.raises(InputError, match=r"a Linear has no generate\(\); name a causal language model"):
        check_generation(torch.nn.Linear(2, 2))
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    with pytest.raises(InputError, match="T5ForConditionalGeneration is an encoder-decoder; name a causal"):
        check_generation(transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=16, **sizes)))


def test_a_network_in_training_mode_is_sampled_without_dropout(llama):
    one, two = (torch.full((2, 10), -1) for _ in range(2))
    generate_tokens(llama, one, 0)
    generate_tokens(llama.train(), two, 0)
    assert llama.training and torch.equal(one, two)
    llama.eval()


def test_a_network_without_attention_has_no_cache():
    config = transformers.MambaConfig(vocab_size=16, hidden_size=8, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    assert predict_generation_bytes(model.to(sampling_dtype(model)), 3, 10) == 16 * 3 * 16


@pytest.mark.parametrize(
    ("capability", "kind"), [("AVX2", torch.float32), ("DEFAULT", torch.float32), ("AVX512", torch.bfloat16)]
)
def test_text_is_sampled_in_the_faster_dtype(llama, monkeypatch, capability, kind):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    ran, forward = [], type(llama.lm_head).forward
    monkeypatch.setattr(type(llama.lm_head), "forward", lambda self, x: ran.append(x.dtype) or forward(self, x))
    generate_tokens(llama, torch.full((1, 3), -1), 0)
    assert {*ran} == {kind}
