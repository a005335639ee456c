"""Replies: what a language model says next, piece by piece as it comes."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

Message = Mapping[str, str]
"""``{"role": "user" | "assistant" | "system", "content": text}``."""


def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    longest: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue a conversation, with a cache of keys and values.

    Args:
        model: A causal language model of transformers, of any widths.
        tokenizer: Its tokenizer; one without a chat template is given the last message as it stands.
        messages: What was said so far.
        longest: Tokens after which it stops; it stops earlier where the model knows no further positions.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn from softmax(logits / temperature).
        seed: Of what is drawn.

    Returns:
        Pieces of text, each whole characters; together they are the reply.

    Raises:
        ValueError: If the conversation has no tokens, too many, or does not fit the tokenizer's template.
    """
    tokens = prompt(tokenizer, messages).to(next(model.parameters()).device)
    most = _most(model)
    if not tokens.numel():
        raise ValueError("there is nothing to answer: the message is empty")
    if tokens.shape[1] >= most:
        raise ValueError(f"the conversation has {tokens.shape[1]} tokens, the model takes {most}; begin a new one")
    ends = _ends(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    said: list[int] = []
    told, cache = "", empty_cache(model)
    for _ in range(min(longest, most - tokens.shape[1])):
        with torch.no_grad():
            logits = model(tokens, **cache).logits[0, -1].float().cpu()
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in ends:
            return
        said.append(chosen)
        text = tokenizer.decode(said, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which some bytes are still to come
            yield text[len(told) :]
            told = text
        new = torch.tensor([[chosen]], device=tokens.device)
        tokens = new if cache else torch.cat([tokens, new], 1)


def prompt(tokenizer: Any, messages: Sequence[Message]) -> torch.Tensor:
    """The tokens of a conversation, ``[1, n]`` int64."""
    if getattr(tokenizer, "chat_template", None):
        try:
            found = tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # whatever a template of somebody raises
            raise ValueError(f"the tokenizer's chat template fails: {' '.join(str(error).split())[:160]}") from None
    else:
        found = tokenizer(messages[-1]["content"], return_tensors="pt")
    tokens: torch.Tensor = found["input_ids"]
    return tokens.long()


def _most(model: Any) -> int:
    """How many tokens a model has positions for."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)


def empty_cache(model: Any) -> dict[str, Any]:
    """An empty cache as an argument, which the network fills; none where it takes none."""
    from transformers import DynamicCache

    taken = inspect.signature(model.forward).parameters
    name = next((name for name in ("cache", "past_key_values") if name in taken), "")
    return {name: DynamicCache(config=model.config), "use_cache": True} if name else {}


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Every token at which a reply ends."""
    settings = getattr(model, "generation_config", None)
    result = {tokenizer.eos_token_id}
    ends = getattr(settings, "eos_token_id", None)
    result |= set(ends) if isinstance(ends, list | tuple) else {ends}
    return {int(one) for one in result if one is not None}
