"""Choices whose common beginning runs once have the scores of rows that run whole."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from regrow.core.errors import InputError
from regrow.evaluation import Choices, choices

PATH = Path(__file__).parents[1] / "recipes" / "shared_beginnings.py"
WORDS = 40


def shared_choices(*args: object, **settings: object) -> Choices:
    """Run the recipe."""
    spec = importlib.util.spec_from_file_location("shared_beginnings", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.shared_choices(*args, **settings)


class Numbers:
    """A tokenizer of numbers between spaces."""

    bos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text."""
        return {"input_ids": [int(word) for word in text.split() if word.isdecimal()]}


def network(name: str) -> nn.Module:
    """A tiny causal language model; in Gemma, every other layer sees four tokens alone."""
    transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")
    small = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**small)
    else:
        layers = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**small, head_dim=8, sliding_window=4, layer_types=layers)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def items(count: int) -> list[dict]:
    """Questions of two lengths with two to four answers of different lengths, and beginnings that differ."""
    generator = torch.Generator().manual_seed(3)

    def words(n: int) -> str:
        return " ".join(str(int(one)) for one in torch.randint(1, WORDS, (n,), generator=generator))

    asked = [
        {"query": words(6 + 3 * (i % 2)), "choices": [words(1 + (i + j) % 4) for j in range(2 + i % 3)], "gold": i % 2}
        for i in range(count)
    ]
    same = words(5)
    begun = [
        {"context_options": [f"{same} {words(2)}", f"{same} {words(3)}"], "continuation": words(2), "gold": 1},
        {"context_options": ["1 2 3", "4 5"], "continuation": "6 7", "gold": 0},
    ]
    return asked + begun


@pytest.mark.parametrize("most", [1024, 12], ids=["together", "in parts"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_scores_are_those_of_whole_rows(name: str, most: int) -> None:
    model, several = network(name), items(14)
    whole = choices(model, Numbers(), several)
    widths: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, args: widths.append(args[0].numel()))
    shared = shared_choices(model, Numbers(), several, most=most)
    hook.remove()
    assert shared.margins == pytest.approx(whole.margins, abs=1e-4)
    assert shared.margins_per_byte == pytest.approx(whole.margins_per_byte, abs=1e-4)
    assert (max(widths) <= 12) == (most == 12)
    assert most == 12 or len(widths) < 12  # two passes for each of few lengths


def test_what_cannot_share_is_refused() -> None:
    with pytest.raises(InputError, match="a Plain takes no cache"):
        shared_choices(Plain(), Numbers(), items(1))


class Plain(nn.Module):
    """A model that takes tokens alone."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        return torch.zeros(*tokens.shape, WORDS)
