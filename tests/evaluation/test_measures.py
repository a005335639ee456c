"""Perplexity, choices, accuracy, speed and size against what they must be."""

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Product, Work
from regrow.core.sources import Batch, Source
from regrow.evaluation import (
    Choices,
    accuracy,
    choice,
    choices,
    items_in,
    macs,
    paired_difference,
    perplexity,
    quality,
    size,
    speed,
)
from regrow.evaluation.quality import Perplexity, token_losses

VOCABULARY = 97


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """A tiny Llama with a tied head."""
    transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def source(windows: int, batch_size: int, seed: int = 0, length: int = 24) -> Source:
    """Windows of random tokens with shifted labels."""
    rows = torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.cat([rows[:, 1:], torch.full((windows, 1), -100)], dim=1)
    batches = [
        Batch((inputs,), {"use_cache": False}, answers)
        for inputs, answers in zip(rows.split(batch_size), labels.split(batch_size), strict=True)
    ]
    return Source("noise", batches, "made")


class Letters:
    """A tokenizer of single characters, begun by token 0 if asked."""

    def __init__(self, begin: bool = False) -> None:
        self.begin = begin
        self.bos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The tokens of a text."""
        return {"input_ids": [0] * (self.begin and add_special_tokens) + [1 + ord(c) % (VOCABULARY - 1) for c in text]}

    def decode(self, tokens: list[int], clean_up_tokenization_spaces: bool = True) -> str:
        """Two bytes a token."""
        return "é" * len(tokens)


def test_perplexity_is_the_models_own_loss(llama: nn.Module) -> None:
    """Against the loss that transformers computes from the same labels."""
    one = source(1, 1)
    expected = llama(one.batches[0].args[0], labels=one.batches[0].args[0]).loss.item()
    measured = perplexity(llama, one, tokenizer=Letters())
    assert measured.mean == pytest.approx(expected, rel=1e-5)
    assert measured.ppl == pytest.approx(math.exp(expected), rel=1e-5)
    assert measured.tokens == (23,)
    assert measured.bits_per_byte == pytest.approx(expected / math.log(2) / 2, rel=1e-5)
    assert math.isnan(measured.error)
    assert json.loads(json.dumps(measured.record(), allow_nan=False))["error"] is None


def test_the_batch_size_does_not_matter(llama: nn.Module) -> None:
    """Per-window numbers, and their error is the textbook one for equal windows."""
    single, grouped = perplexity(llama, source(6, 1)), perplexity(llama, source(6, 4))
    assert single.nll == pytest.approx(grouped.nll, rel=1e-5)
    means = torch.tensor(single.nll, dtype=torch.float64) / 23
    assert single.error == pytest.approx(float(means.std() / math.sqrt(6)), rel=1e-9)
    assert single.bits_per_byte is None


def test_evaluating_leaves_no_trace(llama: nn.Module) -> None:
    """Modes come back, module by module, and no gradient is kept."""
    llama.train()
    llama.model.norm.eval()
    perplexity(llama, source(3, 1))
    assert llama.training
    assert not llama.model.norm.training
    assert llama.lm_head.weight.grad is None
    llama.eval()


def test_token_losses_in_any_dtype_and_only_where_asked() -> None:
    """Blocks of rows give what one float32 call gives; unlabelled positions cost nothing, even if not finite."""
    logits = torch.randn(3, 300, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 11, (3, 300), generator=torch.Generator().manual_seed(1))
    labels[:, ::3] = -100
    logits[:, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        given = logits.to(dtype)
        wanted = nn.functional.cross_entropy(given.double().transpose(1, 2), labels, reduction="none")
        assert torch.allclose(token_losses(given, labels), torch.nan_to_num(wanted) * (labels != -100), atol=1e-5)


@pytest.mark.parametrize("vocabulary", [11, 1000, 49157])
def test_token_losses_do_not_depend_on_how_many_rows_are_computed_at_once(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(1, 70, vocabulary, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, vocabulary, (1, 70), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(quality, "_ENTRIES", 256 * vocabulary)
    whole = [token_losses(logits.to(dtype), labels) for dtype in (torch.float32, torch.bfloat16)]
    for rows in (1, 3, 32):
        monkeypatch.setattr(quality, "_ENTRIES", rows * vocabulary)
        parts = [token_losses(logits.to(dtype), labels) for dtype in (torch.float32, torch.bfloat16)]
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_wrecked_model_gives_infinity_not_a_crash() -> None:
    """Beyond what a float holds; its record is still JSON."""
    wrecked = Perplexity("a", (8000.0, 9000.0), (4, 4))
    assert wrecked.ppl == math.inf
    assert json.loads(json.dumps(wrecked.record(), allow_nan=False))["ppl"] is None


def test_paired_differences_are_sharper_than_their_parts(llama: nn.Module) -> None:
    """Windows differ much, the models little: the pairs see it, the separate errors do not."""
    torch.manual_seed(1)
    other = type(llama)(llama.config)
    other.load_state_dict(llama.state_dict())
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(0.9)
    before, after = perplexity(llama, source(8, 4)), perplexity(other.eval(), source(8, 4))
    mean, error = paired_difference(before, after)
    assert mean == pytest.approx(after.mean - before.mean, rel=1e-6)
    assert error < before.error / 2
    assert paired_difference(before, before) == (0, 0)
    with pytest.raises(ValueError, match="not the same windows"):
        paired_difference(before, perplexity(llama, source(7, 4)))


def test_no_labels_is_an_error(llama: nn.Module) -> None:
    """Named source, no division by zero."""
    bare = Source("bare", [Batch((torch.ones(1, 4, dtype=torch.int64),))])
    with pytest.raises(ValueError, match="'bare' has no labels"):
        perplexity(llama, bare)
    empty = Source("empty", [Batch((torch.ones(1, 4, dtype=torch.int64),), labels=torch.full((1, 4), -100))])
    with pytest.raises(ValueError, match="'empty' has no labelled position"):
        perplexity(llama, empty)


def log_likelihood(model: nn.Module, tokens: list[int], begin: int) -> float:
    """Σ log p of the tokens from ``begin`` on, one row alone."""
    with torch.no_grad():
        table = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return float(sum(table[i - 1, tokens[i]] for i in range(begin, len(tokens))))


@pytest.mark.parametrize("begin", [False, True])
def test_choices_are_those_of_one_row_at_a_time(llama: nn.Module, begin: bool) -> None:
    """Padding and grouping change nothing; sum and per-byte may disagree."""
    letters = Letters(begin)
    generator = torch.Generator().manual_seed(5)

    def words(count: int) -> str:
        return "".join(chr(97 + int(i)) for i in torch.randint(0, 26, (count,), generator=generator))

    items = [
        {"query": words(5 + i), "choices": [words(2), words(9), words(4)][: 2 + i % 2], "gold": i % 2}
        for i in range(12)
    ]
    result = choices(llama, letters, items)
    rows = zip(items, result.right, result.right_per_byte, result.margins, result.margins_per_byte, strict=True)
    for item, right, right_per_byte, margin, margin_per_byte in rows:
        head = letters(item["query"])["input_ids"]
        scores = [
            log_likelihood(llama, head + letters(f" {c}", add_special_tokens=False)["input_ids"], len(head))
            for c in item["choices"]
        ]
        per_byte = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
        assert right == (scores.index(max(scores)) == item["gold"])
        assert right_per_byte == (per_byte.index(max(per_byte)) == item["gold"])
        for values, found in ((scores, margin), (per_byte, margin_per_byte)):
            wanted = values.pop(item["gold"])
            assert found == pytest.approx(wanted - max(values), abs=1e-4)
    assert result.chance == pytest.approx((6 / 2 + 6 / 3) / 12)
    assert result.right != result.right_per_byte
    assert result.error == pytest.approx(math.sqrt(result.accuracy * (1 - result.accuracy) / 12))


def test_beginnings_can_be_the_choice(llama: nn.Module) -> None:
    """WinoGrande's form: only the continuation is scored, after each beginning."""
    letters = Letters()
    item = {"context_options": ["he saw", "she was it"], "continuation": "there.", "gold": 0}
    scores = [log_likelihood(llama, letters(f"{c} there.")["input_ids"], len(c)) for c in item["context_options"]]
    assert choices(llama, letters, [item]).right == (scores[0] > scores[1],)


def test_an_ending_without_a_context_is_scored_from_its_first_token(llama: nn.Module) -> None:
    """A tokenizer without a token for the beginning: the one for the end of a text stands there."""
    letters = Letters()
    letters.eos_token_id = 3
    result = choices(llama, letters, [{"query": "", "choices": ["a", "bc"], "gold": 0}])
    scores = [log_likelihood(llama, [3, *letters(c)["input_ids"]], 1) for c in ("a", "bc")]
    assert result.margins[0] == pytest.approx(scores[0] - scores[1], abs=1e-4)


def test_long_rows_lose_their_beginning(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a malformed item is named."""
    seen: list[int] = []
    hook = llama.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    monkeypatch.setattr(choice, "LONGEST", 40)
    choices(llama, Letters(), [{"query": "q" * 500, "choices": ["a", "b"], "gold": 0}])
    hook.remove()
    assert max(seen) == 39
    for bad in (
        {"query": "a", "choices": ["b"], "gold": 1},
        {"query": "a"},
        [],
        {"query": 1, "choices": ["b"], "gold": 0},
    ):
        with pytest.raises(ValueError, match="item 0 is not a choice"):
            choices(llama, Letters(), [bad])


def test_an_item_with_a_single_choice_has_no_finite_margin() -> None:
    result = Choices("a", (True, False), (True, True), 0.5, (math.inf, 0.5), (0.5, 0.1))
    assert result.record()["margins"] == [None, 0.5]


def test_items_are_read_from_files(tmp_path: Path) -> None:
    """Plain and gzipped; errors name the place."""
    item = {"query": "a", "choices": ["b", "c"], "gold": 1}
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write(f"{json.dumps(item)}\n" * 3)
    assert items_in(tmp_path / "x.jsonl.gz") == [item] * 3
    assert items_in(tmp_path / "x.jsonl.gz", 2) == [item] * 2
    (tmp_path / "y.jsonl").write_text(f'{json.dumps(item)}\n{{"query": "a"}}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*y\.jsonl"):
        items_in(tmp_path / "y.jsonl")
    with pytest.raises(ValueError, match="check the path"):
        items_in(tmp_path / "gone.jsonl")


def test_accuracy_counts_labelled_images() -> None:
    """Two of three right, one not asked; a class the model does not know is an error."""
    pixels = torch.eye(4)
    net = nn.Identity()
    result = accuracy(net, Source("s", [Batch((pixels,), labels=torch.tensor([0, 1, 0, -100]))]))
    assert result.right == (True, True, False)
    assert result.error == pytest.approx(math.sqrt(2 / 9 / 3))
    with pytest.raises(ValueError, match="class 4, the model knows 4"):
        accuracy(net, Source("s", [Batch((pixels,), labels=torch.tensor([0, 1, 4, 2]))]))


class Busy(nn.Module):
    """A network that fills so many bytes, and writes down that it was called."""

    def __init__(self, name: str, bytes_needed: int, calls: list[str]) -> None:
        super().__init__()
        self.name, self.bytes_needed, self.calls = name, bytes_needed, calls

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls.append(self.name)
        return torch.ones(self.bytes_needed // 4).sum() + tokens.sum()


def test_a_call_is_timed() -> None:
    """After a call that is not timed; the network with more to do is slower."""
    calls: list[str] = []
    nets = {"small": Busy("small", 1000, calls), "big": Busy("big", 30_000_000, calls)}
    batch = Batch((torch.ones(2, 8, dtype=torch.int64),))
    result = {name: speed(net, batch, repeats=3) for name, net in nets.items()}
    assert calls == ["small"] * 4 + ["big"] * 4
    for measured in result.values():
        assert len(measured["seconds"]) == 3
        assert measured["per_second"] == pytest.approx(16 / measured["seconds_median"])
    assert result["big"]["seconds_median"] > result["small"]["seconds_median"]
    with pytest.raises(ValueError, match="at least 1 repeat"):
        speed(nets["small"], Batch(), repeats=0)


def test_tied_parameters_count_once(llama: nn.Module, tmp_path: Path) -> None:
    """In the sum, among the counted, and on disk: as many bytes as the file holds, its header aside."""
    measured = size(llama, ["lm_head.weight", "model.embed_tokens.weight"])
    assert measured["parameters"] == sum(p.numel() for p in llama.parameters())
    assert measured["counted"] == VOCABULARY * 32
    llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert measured["bytes"] == file.stat().st_size - header
    assert size(llama, dtype=torch.bfloat16)["bytes"] == measured["bytes"] / 2
    with pytest.raises(KeyError, match="nothing"):
        size(llama, ["nothing"])


def test_macs_follow_the_sizes_of_the_axes() -> None:
    """The product of planned dimensions, summed over the contractions."""
    graph = AxisGraph(
        {"a": Axis("a", 3, ()), "b": Axis("b", 5, ())},
        {},
        frozenset(),
        work=(Work("x", "linear", (2, "a", "b")), Work("y", "linear", (2, Product(("a", 4)), 7))),
    )
    assert macs(graph) == 2 * 3 * 5 + 2 * 12 * 7
