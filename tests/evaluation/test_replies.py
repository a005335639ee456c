"""What a model says next: equal to transformers' own generation, in whole characters."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regrow.evaluation.generation import encode_chat, reply
from store import saved
from zoo import ZOO


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, so that a character of several bytes comes in parts."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:53]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token=letters[0]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[5])


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma3"])
def test_it_says_what_generate_says(name, tokenizer):
    net = saved.cut(saved.CASES[name])[0] if name != "gpt2" else ZOO[name].build()
    messages = [{"role": "user", "content": "ABC"}]
    tokens = encode_chat(tokenizer, messages)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    whole = net.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :]
    expected = tokenizer.decode(whole, skip_special_tokens=True)
    pieces = list(reply(net, tokenizer, messages, longest=12))
    assert expected.startswith("".join(pieces)) and len(expected) - len("".join(pieces)) <= expected.count("\ufffd")


def test_what_is_drawn_is_the_same_each_time(tokenizer):
    net = ZOO["llama_tied"].build()
    told = ["".join(reply(net, tokenizer, [{"content": "ABC"}], longest=16, temperature=t)) for t in (5.0, 5.0, 0.0)]
    assert told[0] == told[1] != told[2]


def test_nothing_to_answer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="empty"):
        next(reply(ZOO["llama_tied"].build(), tokenizer, [{"content": ""}]))


def test_it_ends_where_the_model_knows_no_further_positions(tokenizer):
    net = ZOO["gpt2"].build()
    most = net.config.n_positions
    assert len(list(reply(net, tokenizer, [{"content": "ABC"}], longest=10 * most))) <= most - 3
    with pytest.raises(ValueError, match="begin a new one"):
        next(reply(net, tokenizer, [{"content": "A" * most}]))
