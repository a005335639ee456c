"""Generate text with a language model: windows of tokens to calibrate on, and replies in a chat."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.core.errors import InputError, RefusedError
from regrow.core.names import GENERATED
from regrow.core.progress import Progress, silent
from regrow.core.sources import Batch, Source, device_of
from regrow.data.text import find_bos_tokens, find_separator_token, token_windows
from regrow.tracing.meta_copy import copy_model

ROWS, ROWS_ON_CPU = 128, 32  # windows that are generated at a time: a step reads all weights, whatever their number
# After how many tokens of each window the result is stored, or after half of it if that is more. An interrupted call
# resumes there. The network reads the tokens so far once more at each of these places, so they are few.
STRETCH = 256
_BLOCK = 256
_REMEDY = "name a causal language model of transformers, or another source"


def check_generation(model: nn.Module) -> None:
    """Raise InputError unless a network can generate text."""
    if not (hasattr(model, "generate") and getattr(model, "can_generate", bool)()):
        problem = f"source 'generated' is text that the model generates, and a {type(model).__name__} has no generate()"
        raise InputError(f"{problem}; {_REMEDY}")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        problem = (
            f"source 'generated' is text that the model continues, and a {type(model).__name__} is an encoder-decoder"
        )
        raise InputError(f"{problem}; {_REMEDY}")


def generate_tokens(
    model: nn.Module,
    tokens: Tensor,
    start: int,
    seed: int = 0,
    *,
    progress: Progress = silent,
    store: Callable[[], None] = lambda: None,
) -> None:
    """Sample the missing tokens of windows in place, at temperature 1 from the whole vocabulary.

    After an end-of-text token a new text starts in the same window. The random numbers of a window depend on the seed
    and its index alone; the text depends on rounding, too, and so on the processor. The network computes in bfloat16,
    or in float32 on a processor that would be much slower in it.
    """
    check_generation(model)
    missing = (tokens < 0).any(1).nonzero().flatten()
    if not len(missing):
        return
    if device_of(model).type == "meta":
        problem = "source 'generated' needs the whole network in memory, and it is read one block at a time"
        raise InputError(f"{problem}; give more --memory, or another source")
    writer, length = _copy_to_sample(model), tokens.shape[1]
    stretch = max(STRETCH, -(-length // 2))
    for rows in missing.split(_count_rows(model)):
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in rows.tolist()]
        draws = torch.stack([torch.rand(length, generator=generator) for generator in generators])
        done = int((tokens[rows] >= 0).sum(1).min())
        while done < length:
            last = min(length, done + stretch - done % stretch)
            known = torch.cat([tokens.new_full((len(rows), 1), start), tokens[rows, :done]], 1)
            before = int((tokens >= 0).sum()) - int((tokens[rows, done:] >= 0).sum())
            report = partial(_report, progress, before - done * len(rows), len(rows), tokens.numel())
            tokens[rows, done:last] = _continue(writer, known, last - done, draws, report)
            store()
            done = last


def predict_generation(model: nn.Module, n: int, length: int) -> int:
    """Return what :func:`generate_tokens` needs besides the model, in bytes: a copy, the cache, and logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    >>> net = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> dtype = sampling_dtype(net)
    >>> predict_generation(net.to(dtype), 3, 10) == 3 * 10 * 8 * dtype.itemsize + 4 * 4 * 3 * 8
    True
    """
    config, dtype, rows = cast(Any, model).config.get_text_config(), sampling_dtype(model), min(n, _count_rows(model))
    queries = getattr(config, "num_attention_heads", None) or 0  # 0: a recurrent network, whose states are small
    heads = (getattr(config, "num_key_value_heads", None) or queries) if queries else 0
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, queries)
    cache = 2 * dtype.itemsize * config.num_hidden_layers * heads * size * rows * length
    copy = sum(dtype.itemsize * p.numel() for p in model.parameters() if p.dtype != dtype)
    return copy + cache + 4 * 4 * rows * config.vocab_size


def generate_source(
    model: nn.Module, tokenizer: Any, n: int, seq_len: int, seed: int = 0, progress: Progress = silent
) -> Source:
    """Return a source of text that a model generates (:func:`generate_tokens`), in the form of other windows.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer.
        n: The number of windows.
        seq_len: Tokens per window.
        seed: The random seed.
        progress: Called with (tokens so far, tokens in all, what is being done).

    Raises:
        InputError: If the model cannot generate text.
        SourceError: If the tokenizer has no token with which a document starts.
    """
    start = find_bos_tokens(tokenizer)
    tokens = torch.full((n, seq_len - len(start)), -1)
    generate_tokens(model, tokens, find_separator_token(tokenizer), seed, progress=progress)
    return token_windows(GENERATED, tokens, start, describe_generated(n, seq_len, seed))


def describe_generated(n: int, seq_len: int, seed: int) -> str:
    """Return where the windows come from, for reports."""
    return f"generated by the model itself at temperature 1; {n} windows of {seq_len} tokens, seed {seed}"


def _report(progress: Progress, before: int, rows: int, total: int, position: int) -> None:
    progress(before + position * rows, total, "generating text")


def _continue(writer: Any, known: Tensor, more: int, draws: Tensor, report: Callable[[int], None]) -> Tensor:
    """Return ``more`` tokens behind those that are known, ``[windows, more]``, sampled by random numbers."""

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        # A logits processor of transformers that leaves the greedy choice of ``generate`` no token but the sampled one.
        position = ids.shape[1] - 1
        report(position)
        chosen = sample(logits, draws[:, position].to(logits.device))
        return logits.zero_().scatter_(1, chosen[:, None], 1.0)

    known = known.to(device_of(writer))
    result = writer.generate(
        known, attention_mask=torch.ones_like(known), max_new_tokens=more, do_sample=False, logits_processor=[choose]
    )
    return result[:, known.shape[1] :].cpu()


def sampling_dtype(model: nn.Module) -> torch.dtype:
    """Return what :func:`generate_tokens` computes in: float32 on processors that are slow in bfloat16."""
    capability = torch.backends.cpu.get_cpu_capability()
    slow = device_of(model).type in ("cpu", "meta") and not capability.startswith(("AVX512", "SVE"))
    return torch.float32 if slow else torch.bfloat16


def _count_rows(model: nn.Module) -> int:
    """Return how many windows are generated at a time; a network without numbers will run on the processor."""
    return ROWS_ON_CPU if device_of(model).type in ("cpu", "meta") else ROWS


def _copy_to_sample(model: nn.Module) -> Any:
    """Return a copy to sample from, in :func:`sampling_dtype`: no dropout, no settings such as tokens that end it."""
    from transformers import GenerationConfig

    parameters, dtype = {id(p) for p in model.parameters()}, sampling_dtype(model)
    copy = copy_model(model, lambda tensor: tensor.detach().to(dtype) if id(tensor) in parameters else tensor).eval()
    cast(Any, copy).generation_config = GenerationConfig()
    return copy


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """Return one token per row, sampled from softmax(logits) by inverting its cumulative distribution.

    >>> sample(torch.tensor([[0.5, 0.25, 0.25]]).log().expand(3, 3), torch.tensor([0.4, 0.6, 0.9])).tolist()
    [0, 1, 2]
    """
    top = logits.amax(1, keepdim=True)
    if not torch.isfinite(top).all():
        raise RefusedError("the logits of the model are not finite, so no text can be sampled; check its weights")
    size = logits.shape[1]
    weights = F.pad(logits.float(), (0, -size % _BLOCK), value=-math.inf).sub_(top.float()).exp_()
    weights = weights.view(len(logits), -1, _BLOCK)  # sums of blocks first: a running sum is slow
    sums = weights.sum(2).cumsum(1)
    target = draws.float()[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, target, right=True).clamp_(max=sums.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    inside = weights.gather(1, block[:, :, None].expand(-1, 1, _BLOCK))[:, 0].cumsum(1)
    place = torch.searchsorted(inside, target - before, right=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + place)[:, 0].clamp_(max=size - 1)


def reply(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    longest: int = 256,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Generate the reply to a conversation as a stream of text pieces of whole characters, with a key-value cache."""
    tokens = prompt(tokenizer, messages).to(device_of(model))
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31
    if not tokens.numel():
        raise ValueError("there is nothing to answer: the message is empty")
    if tokens.shape[1] >= positions:
        raise ValueError(f"the conversation has {tokens.shape[1]} tokens, the model takes {positions}; begin a new one")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])}
    generator, generated = torch.Generator().manual_seed(0), list[int]()
    sent, cache = "", empty_cache(model)
    for _ in range(min(longest, positions - tokens.shape[1])):
        with torch.no_grad():
            logits = Batch((tokens,), cache).run(model).logits[0, -1].float().cpu()
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen in stops:
            return
        generated.append(chosen)
        text = tokenizer.decode(generated, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # a character of which some bytes are still to come
            yield text[len(sent) :]
            sent = text
        new = torch.tensor([[chosen]], device=tokens.device)
        tokens = new if cache else torch.cat([tokens, new], 1)


def prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Return the tokens of a conversation, ``[1, n]`` int64."""
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    return encoded["input_ids"].long()


def empty_cache(model: nn.Module) -> dict[str, Any]:
    """Return an empty key-value cache as keyword arguments for the model; none if it takes no cache."""
    from transformers import DynamicCache

    for name in ("cache", "past_key_values"):
        if name in inspect.signature(model.forward).parameters:
            return {name: DynamicCache(config=cast(Any, model).config), "use_cache": True}
    return {}
