"""Chat with a language model: generate a reply and stream its text."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from regrow.core.sources import device_of

if TYPE_CHECKING:
    from transformers import DynamicCache

Message = Mapping[str, str]
"""``{"role": "user" | "assistant" | "system", "content": text}``."""


class CacheArguments(TypedDict, total=False):
    """Keyword arguments with which a language model reads and fills a key-value cache."""

    cache: "DynamicCache"
    past_key_values: "DynamicCache"
    use_cache: bool


def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    longest: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Generate the reply to a conversation as a stream of text pieces, with a key-value cache.

    Args:
        model: A causal language model of transformers, of any widths.
        tokenizer: Its tokenizer; if it has no chat template, the last message is passed as plain text.
        messages: The conversation so far.
        longest: The most tokens of the reply; fewer if the model has no further positions.
        temperature: 0 takes the likeliest token; otherwise tokens are sampled from softmax(logits / temperature).
        seed: The random seed of the sampling.

    Returns:
        Pieces of text, each of whole characters; joined they are the reply.

    Raises:
        ValueError: If the conversation has no tokens, too many, or is rejected by the tokenizer's template.
    """
    tokens = prompt(tokenizer, messages).to(device_of(model))
    most = _most(model)
    if not tokens.numel():
        raise ValueError("there is nothing to answer: the message is empty")
    if tokens.shape[1] >= most:
        raise ValueError(f"the conversation has {tokens.shape[1]} tokens, the model takes {most}; begin a new one")
    ends = _ends(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    generated: list[int] = []
    sent, cache = "", empty_cache(model)
    for _ in range(min(longest, most - tokens.shape[1])):
        with torch.no_grad():
            logits = model(tokens, **cache).logits[0, -1].float().cpu()
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in ends:
            return
        generated.append(chosen)
        text = tokenizer.decode(generated, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which some bytes are still to come
            yield text[len(sent) :]
            sent = text
        new = torch.tensor([[chosen]], device=tokens.device)
        tokens = new if cache else torch.cat([tokens, new], 1)


def prompt(tokenizer: Any, messages: Sequence[Message]) -> torch.Tensor:
    """Return the tokens of a conversation, ``[1, n]`` int64.

    Args:
        tokenizer: The tokenizer.
        messages: The conversation so far.
    """
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
    """Return how many positions a model has."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31)


def empty_cache(model: nn.Module) -> CacheArguments:
    """Return an empty key-value cache as keyword arguments for the model; none if it takes no cache.

    Args:
        model: The model.
    """
    from transformers import DynamicCache

    taken = inspect.signature(model.forward).parameters
    if "cache" in taken:
        return {"cache": DynamicCache(config=model.config), "use_cache": True}
    if "past_key_values" in taken:
        return {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    return {}


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return every token that ends a reply."""
    settings = getattr(model, "generation_config", None)
    result = {tokenizer.eos_token_id}
    ends = getattr(settings, "eos_token_id", None)
    result |= set(ends) if isinstance(ends, list | tuple) else {ends}
    return {int(one) for one in result if one is not None}
