"""lm-eval and we ask a model the same: equal answers item by item, on a network of irregular widths."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laws
from regrow import apply, trace
from regrow.evaluation import choices, harness, items_in

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")
LETTERS = "abcdefghij klmnopqrstuvwxyzäöüßéλ.?\n"


@pytest.fixture(scope="module")
def lm_eval() -> Any:
    """The harness."""
    return pytest.importorskip("lm_eval", reason="needs regrow[harness]")


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "begun"])
def asked(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    """A tiny network cut irregularly, and a tokenizer of letters that may begin every text with a token of its own."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<s>", "#", *LETTERS])}, unk_token="#"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    if request.param:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<s>", unk_token="#", pad_token="<s>"
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    axes = trace(model, torch.arange(14)[None], use_cache=False)
    apply(model, axes, laws.random_plan(axes, torch.Generator().manual_seed(3), floor=2))
    assert len({layer.mlp.up_proj.out_features for layer in model.model.layers}) == 2
    return model, tokenizer


def words(count: int, generator: torch.Generator) -> str:
    """Letters in any order; no blank at an end."""
    drawn = torch.randint(0, len(LETTERS) - 1, (count,), generator=generator).tolist()
    return "".join(LETTERS[i] for i in drawn).strip() + "."


def write(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, items)))
    return str(path)


@pytest.mark.parametrize("end", ["", " ", "\n"])
def test_the_harness_and_we_are_right_on_the_same_items(
    lm_eval: Any, asked: tuple[nn.Module, Any], tmp_path: Path, end: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    items = [
        {
            "query": words(6 + i % 5, generator) + end,
            "choices": [words(size, generator) for size in (2, 12, 5)][: 2 + i % 2],
            "gold": i % 2,
        }
        for i in range(40)
    ]
    file = write(tmp_path / "made.jsonl", items)
    told: list[tuple[int, int, str]] = []
    ours = choices(*asked, items_in(Path(file)))
    (found,) = harness(*asked, file, progress=lambda *one: told.append(one))
    assert (found.task, found.items) == ("made", 40)
    assert found.per_item["acc"] == ours.right
    assert found.metrics["acc"] == pytest.approx(ours.accuracy)
    assert told and told[-1][1] == sum(len(item["choices"]) for item in items)
    if end != "\n":  # there the harness counts the line break to the ending, so lengths differ
        assert found.per_item["acc_bytes"] == ours.right_per_byte
        assert found.metrics["acc_bytes"] == pytest.approx(ours.accuracy_per_byte)
        assert found.per_item["acc_bytes"] != found.per_item["acc"]
    json.dumps(found.record())


def test_per_character_and_per_byte_are_the_same_in_ascii(
    lm_eval: Any, asked: tuple[nn.Module, Any], tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(6)

    def plain(count: int) -> str:
        return "".join(c for c in words(count, generator) if c.isascii())

    items = [{"query": plain(9), "choices": [plain(3), plain(14)], "gold": i % 2} for i in range(30)]
    (found,) = harness(*asked, write(tmp_path / "made.jsonl", items))
    assert found.per_item["acc_norm"] == choices(*asked, items).right_per_byte
    (few,) = harness(*asked, write(tmp_path / "made.jsonl", items), items=7)
    assert few.per_item["acc_norm"] == found.per_item["acc_norm"][:7]


def test_beginnings_can_be_the_choice(lm_eval: Any, asked: tuple[nn.Module, Any], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    items = [
        {"context_options": [words(7, generator), words(9, generator)], "continuation": words(6, generator), "gold": 1}
        for _ in range(30)
    ]
    (found,) = harness(*asked, write(tmp_path / "made.jsonl", items))
    assert found.per_item["acc"] == choices(*asked, items).right
    assert 0 < found.metrics["acc"] < 1


@pytest.mark.parametrize("asked", [False], indirect=True)
def test_what_cannot_be_run_is_told_in_one_line(
    lm_eval: Any, asked: tuple[nn.Module, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = [{"query": query, "choices": ["a", "b"], "gold": 0} for query in ("a", "b\n")]
    with pytest.raises(ValueError, match="split the file"):
        harness(*asked, write(tmp_path / "mixed.jsonl", mixed))
    with pytest.raises(ValueError, match="did you mean 'arc_easy'"):
        harness(*asked, "arc_eazy")
    with pytest.raises(ValueError, match="cannot read the items"):
        harness(*asked, str(tmp_path / "missing.jsonl"))
    with pytest.raises(ValueError, match=r"'arc_easy' cannot be loaded .* connect, or give a file") as caught:
        harness(*asked, "arc_easy")  # the suite runs without a network
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="only language models of transformers"):
        harness(nn.Linear(2, 2), None, "arc_easy")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install 'regrow\[harness\]'"):
        harness(*asked, "arc_easy")
