"""Tokenizers in llama.cpp's words: a rule is found by what a tokenizer does; what llama.cpp does not do is refused."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from exporters.deci import File
from exporters.test_gguf import llama
from regrow.exporters import ExportError
from regrow.exporters.gguf import write
from regrow.exporters.gguf.llama_cpp import CONTROL, NORMAL, RULES, UNUSED, USER_DEFINED, describe_tokenizer

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


def fast(made: Tokenizer, **roles: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **roles)


@pytest.mark.parametrize(("steps", "rule"), RULES.items(), ids=RULES.values())
def test_the_rule_is_found_by_what_a_tokenizer_does(steps: tuple[str, ...], rule: str) -> None:
    tokenizer = fast(bytewise(steps, whole=rule == "llama-bpe"))
    said, _ = describe_tokenizer(tokenizer, len(tokenizer))
    assert (said["tokenizer_model"], said["tokenizer_pre"]) == ("gpt2", rule)
    assert not said["add_bos_token"] and not said["add_eos_token"]
    assert [tokenizer.convert_tokens_to_ids(text) for text in said["token_list"]] == [*range(len(tokenizer))]
    assert said["token_types"][:2] == [CONTROL, CONTROL] and {*said["token_types"][2:]} == {NORMAL}
    assert all("".join(pair.split(" ")) in said["token_list"] for pair in said["token_merges"])
    assert (said["bos_token_id"], said["eos_token_id"]) == (0, 1)


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
    assert said["tokenizer.ggml.merges"] == describe_tokenizer(tokenizer, len(tokenizer))[0]["token_merges"]


def test_without_a_tokenizer_a_file_says_so(tmp_path: Path) -> None:
    done = write(llama(1), tmp_path / "model.gguf")
    assert File(done.path).said["tokenizer.ggml.model"] == "no_vocab"
    assert any("takes and gives token numbers" in note for note in done.notes)


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
    "SentencePiece": (lambda: bytewise(("words",), byte_fallback=True), "has the setting 'byte_fallback'"),
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
        describe_tokenizer(fast(build()), 302)


def test_unicode_form_is_told() -> None:
    _, notes = describe_tokenizer(fast(normalised(normalizers.NFC())), 400)
    assert any("NFC" in note for note in notes)
