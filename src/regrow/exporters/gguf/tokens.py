"""Describe a tokenizer in llama.cpp's terms: tokens, token types, merges, and the name of its splitting rule.

llama.cpp does not read the rule by which a tokenizer splits text; it knows rules by name. The rules here were compared
with it. Any other is rejected, since a file that splits text in another way than its network learnt gives bad text and
no error.
"""

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from regrow.exporters import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # GGUF's numbers for token types
SPACE = "\u2581"  # which SentencePiece uses for a space

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Steps of a pre-tokenizer → llama.cpp's name of the rule (``words``: GPT-2's regular expression in ByteLevel).
RULES: Mapping[tuple[str, ...], str] = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", "bytes"): "llama-bpe",
    (rf"{_WORDS}|\p{{N}}|{_REST}", "bytes"): "qwen2",
}
WHOLE_WORDS = {"llama-bpe"}  # rules for which llama.cpp keeps a word that is a token as it is, before any merge


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer data of a GGUF file."""

    model: str  # ``"gpt2"`` (merges of bytes), ``"llama"`` (SentencePiece) or ``"no_vocab"``
    rule: str = ""  # llama.cpp's name of the rule that splits text
    tokens: Sequence[str] = ()
    types: Sequence[int] = ()  # the GGUF type of each token
    merges: Sequence[str] = ()  # the BPE merges, best first; empty for SentencePiece
    scores: Sequence[float] = ()  # the score of each token for SentencePiece: a better merge has a higher score
    special: Mapping[str, int] = field(default_factory=dict)  # GGUF's name of a role (``bos``, ``eos``) → token id
    begins: bool = False  # whether the beginning-of-text token is added
    ends: bool = False  # whether the end-of-text token is added
    spaced: bool = False  # whether a space is added before the text
    template: str = ""  # the chat template, in jinja
    notes: Sequence[str] = ()


def vocabulary(tokenizer: Any | None, rows: int) -> Vocabulary:
    """Convert a tokenizer of transformers to GGUF's form; raise ExportError if llama.cpp would tokenize differently."""
    if tokenizer is None:
        return Vocabulary(
            "no_vocab", notes=["there is no tokenizer: llama.cpp takes and gives token numbers, not text"]
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(f"{type(tokenizer).__name__} is not backed by a tokenizer.json, of which GGUF is made")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"the tokenizer is {model.get('type')}; GGUF files are written for plain BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise ExportError(f"the tokenizer has the setting {name!r}; GGUF files are written for plain BPE")
    tokens, types = _tokens(data, rows)
    begins, ends = _ends(tokenizer)
    notes: list[str] = []
    if any(token.get("lstrip") or token.get("rstrip") for token in data["added_tokens"]):
        notes.append("some special tokens swallow spaces beside them, which llama.cpp does not do")
    template = getattr(tokenizer, "chat_template", None)
    special = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk", "pad")}
    bytewise = not model.get("byte_fallback")
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    scores: list[float] = []
    if not bytewise:
        ranks = _ranks([(left, right) for left, right in pairs], tokens, model["vocab"])
        scores = [-float(ranks.get(t, 0)) if k == NORMAL else -1e6 for t, k in zip(tokens, types, strict=True)]
    elif normalizer := data.get("normalizer"):
        if normalizer.get("type") != "NFC":
            raise ExportError(f"the tokenizer rewrites text ({_text_of(normalizer)}), which llama.cpp does not do")
        notes.append("the tokenizer puts text into Unicode form NFC first; llama.cpp expects it to be so")
    return Vocabulary(
        "gpt2" if bytewise else "llama",
        _rule(data) if bytewise else "default",
        tokens,
        types,
        merges=[" ".join(pair) for pair in pairs] if bytewise else (),
        scores=scores,
        special={role: number for role, number in special.items() if isinstance(number, int)},
        begins=begins,
        ends=ends,
        spaced=not bytewise and _adds_space(data, notes),
        template=template.encode("utf-8", "replace").decode() if isinstance(template, str) else "",
        notes=notes,
    )


def _tokens(data: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Return the text and type of the token of every embedding row; rows without a token are marked unused."""
    model = data["model"]
    known = {number: (text, NORMAL) for text, number in model["vocab"].items()}
    if model.get("byte_fallback"):
        for text, number in model["vocab"].items():
            if text == model.get("unk_token"):
                known[number] = (text, UNKNOWN)
            elif _is_byte(text):
                known[number] = (text, BYTE)
    for token in data["added_tokens"]:
        if known.get(token["id"], ("", NORMAL))[1] == NORMAL:
            known[token["id"]] = (token["content"], CONTROL if token["special"] else USER_DEFINED)
    if known and max(known) >= rows:
        sizes = f"{max(known) + 1} tokens, the embedding {rows} rows"
        raise ExportError(f"the tokenizer has {sizes}; give the one it was for")
    texts, types = zip(*(known.get(n, (f"[PAD{n}]", UNUSED)) for n in range(rows)), strict=True)
    if len({*texts}) < rows or "" in texts:
        raise ExportError("two tokens have the same text, or one has none; llama.cpp takes no such tokenizer")
    return list(texts), list(types)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _rule(data: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the rule that splits text before merges."""
    steps = tuple(map(_describe_step, _flat(data.get("pre_tokenizer"))))
    rule = RULES.get(steps, "")
    if not rule:
        problem = "the tokenizer splits text by a rule of which we know no name in llama.cpp"
        known = ", ".join(sorted(RULES.values()))
        raise ExportError(f"{problem} ({_text_of(data.get('pre_tokenizer'))}); known are {known}")
    whole = bool(data["model"].get("ignore_merges"))
    if whole != (rule in WHOLE_WORDS):
        how = "takes" if whole else "does not take"
        raise ExportError(f"the tokenizer {how} words that are tokens before any merge, unlike {rule!r} in llama.cpp")
    return rule


def _flat(steps: Any) -> list[Mapping[str, Any]]:
    """Return the steps of a tokenizer component as a flat list."""
    if not steps:
        return []
    if steps.get("type") == "Sequence":
        inner: list[Any] = next((steps[name] for name in ("pretokenizers", "normalizers") if name in steps), [])
        return [flat for step in inner for flat in _flat(step)]
    return [steps]


def _describe_step(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return "words" if step.get("use_regex", True) else "bytes"
        case {"type": "Digits", "individual_digits": True}:
            return "digits"
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return str(pattern)
    return f"? {step.get('type')}"


def _text_of(part: Any) -> str:
    text = json.dumps(part, ensure_ascii=False)
    return text if len(text) < 120 else f"{text[:119]}…"


def _adds_space(data: Mapping[str, Any], notes: list[str]) -> bool:
    """Return whether SentencePiece adds a space before text; ``notes`` gets what differs in llama.cpp."""
    adds = replaces = False
    for step in (*_flat(data.get("normalizer")), *_flat(data.get("pre_tokenizer"))):
        match step:
            case {"type": "Prepend", "prepend": prepend} if prepend == SPACE:
                adds = True
            case {"type": "Replace", "pattern": {"String": " "}, "content": content} if content == SPACE:
                replaces = True
            case {"type": "Metaspace", "replacement": sign, "prepend_scheme": scheme, "split": False} if sign == SPACE:
                adds, replaces = scheme != "never", True
                if adds:
                    notes.append("llama.cpp puts a space before text that begins with one too; the tokenizer does not")
            case _:
                raise ExportError(f"the tokenizer does more to text than llama.cpp's SentencePiece: {_text_of(step)}")
    if not replaces:
        raise ExportError("the tokenizer leaves spaces as they are, unlike SentencePiece")
    return adds


def _ranks(pairs: Sequence[tuple[str, str]], tokens: Sequence[str], vocab: Collection[str]) -> dict[str, int]:
    """Return the rank of each token in the order of merges.

    llama.cpp joins any two pieces that form a token, the best token first; a tokenizer.json lists pairs. Both give the
    same result if every split of a token is listed, and all splits of one token are adjacent. Runs of one character
    (spaces) may share a rank: the first one grows as long as it can either way.
    """
    made = [left + right for left, right in pairs]
    last = {token: i for i, token in enumerate(made)}
    ranks: dict[str, int] = {}
    rank = end = 0
    for i, token in enumerate(made):
        if i > end or not i:
            rank, end = rank + 1, i
        end = max(end, last[token])
        ranks[token] = rank
    shared = Counter(ranks.values())
    if mixed := next((token for token, at in ranks.items() if shared[at] > 1 and len({*token}) > 1), ""):
        raise ExportError(f"the merges of the token {mixed!r} are apart; SentencePiece has one place for a token")
    listed = {*pairs}
    for token in tokens:
        if token in vocab and not _is_byte(token):
            splits = ((token[:i], token[i:]) for i in range(1, len(token)))
            if lost := next((s for s in splits if s[0] in vocab and s[1] in vocab and s not in listed), None):
                raise ExportError(f"{token!r} is not made of {lost[0]!r} and {lost[1]!r}, as SentencePiece would do")
    return ranks


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Return whether the tokenizer adds its token at the beginning of text, and at the end; it must add no others."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
    before, after = (full[:at], full[at + len(bare) :]) if at is not None else (full, [])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(f"the tokenizer puts tokens around text ({full} for {bare}) that llama.cpp would not")
    return bool(before), bool(after)


def write_vocabulary(words: Vocabulary, writer: "GGUFWriter") -> None:
    """Write the tokenizer data to a GGUF file's metadata."""
    writer.add_tokenizer_model(words.model)
    if words.model == "no_vocab":
        return
    writer.add_tokenizer_pre(words.rule)
    writer.add_token_list(list(words.tokens))
    writer.add_token_types(list(words.types))
    if words.scores:
        writer.add_token_scores(list(words.scores))
    if words.merges:
        writer.add_token_merges(list(words.merges))
    for role, number in words.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    writer.add_add_eos_token(words.ends)
    writer.add_add_space_prefix(words.spaced)
    if words.template:
        writer.add_chat_template(words.template)
