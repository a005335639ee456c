"""Tokenizers in llama.cpp's words: a rule is found by what a tokenizer does; what llama.cpp does not do is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from exporters.deci import File
from exporters.test_gguf import llama
from regrow.exporters import ExportError
from regrow.exporters.gguf import write
from regrow.exporters.gguf.tokens import BYTE, CONTROL, NORMAL, RULES, SPACE, UNKNOWN, UNUSED, USER_DEFINED, vocabulary

TEXT = ["The cat sat on the mat, and the rat sat on the cat.", "12 + 345 = 357 of them, that is that."] * 3


def step(name: str) -> Any:
    match name:
        case "words" | "bytes":
            return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "words")
        case "digits":
            return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Split(Regex(name), "isolated")


def bytewise(steps: tuple[str, ...], whole: bool = False, **model: Any) -> Tokenizer:
    """A small one that merges bytes."""
    made = Tokenizer(models.BPE(ignore_merges=whole, **model))
    made.pre_tokenizer = pre_tokenizers.Sequence([step(name) for name in steps])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def sentencepiece(lost: int = -1) -> Tokenizer:
    """One as Llama-2's: every way to make up a token is listed, best token first."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), SPACE, *"abcehnst"]
    words = ["th", "he", f"{SPACE}t", f"{SPACE}th", "the", f"{SPACE}the", SPACE * 2, SPACE * 3, SPACE * 4]
    vocab = {token: n for n, token in enumerate([*tokens, *words])}
    ways = [(word[:i], word[i:]) for word in words for i in range(1, len(word))]
    merges = [pair for pair in ways if pair[0] in vocab and pair[1] in vocab]
    runs = sorted((pair for pair in merges if {*pair[0]} == {SPACE} == {*pair[1]}), key=lambda p: -len(p[0]))
    merges = [pair for pair in merges if pair not in runs] + runs
    made = Tokenizer(models.BPE(vocab, merges[:lost] if lost > 0 else merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


def fast(made: Tokenizer, **roles: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **roles)


@pytest.mark.parametrize(("steps", "rule"), RULES.items(), ids=RULES.values())
def test_the_rule_is_found_by_what_a_tokenizer_does(steps: tuple[str, ...], rule: str) -> None:
    tokenizer = fast(bytewise(steps, whole=rule == "llama-bpe"))
    words = vocabulary(tokenizer, len(tokenizer))
    assert (words.model, words.rule, words.begins, words.ends, words.spaced) == ("gpt2", rule, False, False, False)
    assert [tokenizer.convert_tokens_to_ids(text) for text in words.tokens] == [*range(len(tokenizer))]
    assert words.types[:2] == [CONTROL, CONTROL] and {*words.types[2:]} == {NORMAL}
    assert all("".join(pair.split(" ")) in words.tokens for pair in words.merges)
    assert (words.special["bos"], words.special["eos"]) == (0, 1)


def test_everything_reaches_the_file(tmp_path: Path) -> None:
    made = bytewise(("digits", "words"))
    made.add_tokens(["<note>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = fast(made, pad_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    model = llama(1, vocab_size=len(tokenizer) + 2)
    model.tokenizer = tokenizer
    said = File(write(model, tmp_path / "model.gguf").path).said
    assert said["tokenizer.ggml.tokens"][-3:] == ["<note>", f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert said["tokenizer.ggml.token_type"][-3:] == [USER_DEFINED, UNUSED, UNUSED]
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert said["tokenizer.ggml.add_bos_token"] is True and said["tokenizer.ggml.add_eos_token"] is True
    assert said["tokenizer.ggml.padding_token_id"] == said["tokenizer.ggml.eos_token_id"] == 1
    assert said["tokenizer.chat_template"] == tokenizer.chat_template
    assert said["tokenizer.ggml.merges"] == vocabulary(tokenizer, len(tokenizer)).merges


def test_without_a_tokenizer_a_file_says_so(tmp_path: Path) -> None:
    done = write(llama(1), tmp_path / "model.gguf")
    assert File(done.path).said["tokenizer.ggml.model"] == "no_vocab"
    assert any("takes and gives token numbers" in note for note in done.notes)


def test_sentencepiece_has_scores_in_the_order_of_merges() -> None:
    tokenizer = fast(sentencepiece())
    words = vocabulary(tokenizer, len(tokenizer))
    assert (words.model, words.begins, words.spaced) == ("llama", True, True)
    assert words.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    score = dict(zip(words.tokens, words.scores, strict=True))
    best = sorted(("th", "he", f"{SPACE}t", f"{SPACE}th", "the", f"{SPACE}the"), key=lambda token: -score[token])
    assert best == ["th", "he", f"{SPACE}t", f"{SPACE}th", "the", f"{SPACE}the"]
    assert score[SPACE * 2] == score[SPACE * 4] < score[f"{SPACE}the"]


def normalised(normalizer: Any) -> Tokenizer:
    made = bytewise(("words",))
    made.normalizer = normalizer
    return made


REFUSED = {
    "rule": (lambda: bytewise((r"\d+", "bytes")), "splits text by a rule"),
    "prefix": (lambda: prefixed(), "splits text by a rule"),
    "whole words": (lambda: bytewise(("words",), whole=True), "takes words that are tokens before any merge"),
    "no whole words": (lambda: bytewise(next(s for s, r in RULES.items() if r == "llama-bpe")), "does not take words"),
    "rewritten": (lambda: normalised(normalizers.Lowercase()), "rewrites text"),
    "dropout": (lambda: bytewise(("words",), dropout=0.1), "has the setting 'dropout'"),
    "kind": (lambda: Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")), "is WordPiece"),
    "a way that is missing": (lambda: sentencepiece(lost=3), "is not made of"),
    "too many": (lambda: added(bytewise(("words",))), "tokens, the embedding 302 rows"),
}


def prefixed() -> Tokenizer:
    made = bytewise(("words",))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def added(made: Tokenizer) -> Tokenizer:
    made.add_tokens([f"<{n}>" for n in range(99)])
    return made


@pytest.mark.parametrize(("build", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_what_llama_cpp_would_split_otherwise_is_refused(build: Any, why: str) -> None:
    with pytest.raises(ExportError, match=why):
        vocabulary(fast(build()), 302)


def test_merges_of_one_token_that_stand_apart_are_refused() -> None:
    made = sentencepiece()
    data = json.loads(made.to_str())
    merges = data["model"]["merges"]
    merges.append(merges.pop(merges.index([f"{SPACE}t", "he"])))
    with pytest.raises(ExportError, match="are apart"):
        vocabulary(fast(Tokenizer.from_str(json.dumps(data))), 300)


def test_unicode_form_and_spaces_are_told() -> None:
    words = vocabulary(fast(normalised(normalizers.NFC())), 400)
    assert any("NFC" in note for note in words.notes)
    made = sentencepiece()
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(SPACE, "first", split=False)
    words = vocabulary(fast(made), 400)
    assert words.spaced and any("begins with one" in note for note in words.notes)
