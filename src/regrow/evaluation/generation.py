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
from regrow.nets.loaded import longest_input
from regrow.tracing.meta_copy import copy_model

ROWS, ROWS_ON_CPU = 128, 64  # windows that are generated at a time: a step reads all weights, whatever their number
# After how many tokens of each window the result is stored, or after half of it if that is more. An interrupted call
# resumes there. The network reads the tokens so far once more after each of these stretches, so they are few.
STRETCH = 256
_BLOCK = 256  # probabilities that are summed at a time when a token is sampled
_REMEDY = "name a causal language model of transformers, or another source"


def check_generation(model: nn.Module) -> None:
    """Raise InputError unless a network can generate text, as causal language models of transformers do."""
    problem, name = "", type(model).__name__
    if not (hasattr(model, "generate") and hasattr(model, "can_generate") and cast(Any, model).can_generate()):
        problem = f"generates, and a {name} has no generate()"
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        problem = f"continues, and a {name} is an encoder-decoder"
    if problem:
        raise InputError(f"source 'generated' is text that the model {problem}; {_REMEDY}")


def generate_tokens(
    model: nn.Module,
    tokens: Tensor,
    separator: int,
    seed: int = 0,
    *,
    progress: Progress = silent,
    store: Callable[[], None] = lambda: None,
) -> None:
    """Sample the missing tokens (below 0) of windows, ``tokens`` ``[windows, length]``, in place, at temperature 1.

    ``separator`` is the token that the network reads before each window; ``progress`` is called with tokens known and
    tokens in all, ``store`` whenever some more tokens of windows are complete (:data:`STRETCH`). After an end-of-text
    token a new text starts in the same window. The random numbers of a window depend on the seed and its index alone;
    the text depends on rounding, too, and so on the processor. The network computes in bfloat16, or in float32 on a
    processor that would be much slower in it. Raise InputError if the network cannot generate text, or has no numbers;
    RefusedError if its logits are not finite.
    """
    check_generation(model)
    missing = (tokens < 0).any(1).nonzero().flatten()
    if not len(missing):
        return
    if device_of(model).type == "meta":
        problem = "source 'generated' needs the whole network in memory, and it is read one block at a time"
        raise InputError(f"{problem}; give more --memory, or another source")
    network, length = _copy_for_sampling(model), tokens.shape[1]
    stretch = max(STRETCH, -(-length // 2))
    for rows in missing.split(_count_rows(model)):
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in rows.tolist()]
        draws = torch.stack([torch.rand(length, generator=generator) for generator in generators])
        elsewhere = int((tokens >= 0).sum()) - int((tokens[rows] >= 0).sum())  # known tokens of the other windows
        report = partial(_report, progress, elsewhere, len(rows), tokens.numel())
        done = int((tokens[rows] >= 0).sum(1).min())
        while done < length:
            end = min(length, done + stretch - done % stretch)
            known = torch.cat([tokens.new_full((len(rows), 1), separator), tokens[rows, :done]], 1)
            tokens[rows, done:end] = _sample_next(network, known, end - done, draws, report)
            store()
            done = end


def predict_generation_bytes(model: nn.Module, n: int, length: int) -> int:
    """Return the bytes that :func:`generate_tokens` needs besides the model for ``n`` windows of ``length`` tokens.

    These are a copy of the parameters that are not in :func:`sampling_dtype`, the key-value cache, and logits.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    >>> net = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    >>> dtype = sampling_dtype(net)
    >>> predict_generation_bytes(net.to(dtype), 3, 10) == 3 * 10 * 8 * dtype.itemsize + 4 * 4 * 3 * 8
    True
    """
    config, dtype, rows = cast(Any, model).config.get_text_config(), sampling_dtype(model), min(n, _count_rows(model))
    queries = getattr(config, "num_attention_heads", None) or 0  # 0: a recurrent network, whose states are small
    heads = (getattr(config, "num_key_value_heads", None) or queries) if queries else 0
    size = getattr(config, "head_dim", None) or config.hidden_size // max(1, queries)
    cache = 2 * dtype.itemsize * config.num_hidden_layers * heads * size * rows * length
    copy = sum(dtype.itemsize * p.numel() for p in model.parameters() if p.dtype != dtype)
    return copy + cache + 4 * 4 * rows * config.vocab_size  # four float32 arrays of logits


def generate_source(
    model: nn.Module, tokenizer: Any, n: int, seq_len: int, seed: int = 0, progress: Progress = silent
) -> Source:
    """Return a source of text that a model generates (:func:`generate_tokens`), in windows with shifted labels.

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
    bos = find_bos_tokens(tokenizer)
    tokens = torch.full((n, seq_len - len(bos)), -1)
    generate_tokens(model, tokens, find_separator_token(tokenizer), seed, progress=progress)
    return token_windows(GENERATED, tokens, bos, describe_generated(n, seq_len, seed))


def describe_generated(n: int, seq_len: int, seed: int) -> str:
    """Return a sentence for reports on how ``n`` windows of ``seq_len`` tokens were generated with a seed."""
    return f"generated by the model itself at temperature 1; {n} windows of {seq_len} tokens, seed {seed}"


def _report(progress: Progress, elsewhere: int, rows: int, total: int, position: int) -> None:
    """Report progress when each of ``rows`` windows has ``position`` tokens, all others ``elsewhere``, of ``total``."""
    progress(elsewhere + position * rows, total, "generating text")


def _sample_next(network: Any, known: Tensor, n: int, draws: Tensor, report: Callable[[int], None]) -> Tensor:
    """Return the next ``n`` tokens of windows, ``[windows, n]`` on the CPU.

    ``known``: the separator and the tokens so far, ``[windows, 1 + tokens]``; ``draws``: a uniform random number for
    each token of a window, ``[windows, length]``; ``report`` is called with the number of tokens before each new one.
    """

    def choose(ids: Tensor, logits: Tensor) -> Tensor:
        """Make the sampled token the only possible one, in place: a logits processor for greedy ``generate``."""
        position = ids.shape[1] - 1  # the first of ids is the separator
        report(position)
        chosen = sample(logits, draws[:, position].to(logits.device))
        return logits.zero_().scatter_(1, chosen[:, None], 1.0)

    known = known.to(device_of(network))
    result = network.generate(
        known, attention_mask=torch.ones_like(known), max_new_tokens=n, do_sample=False, logits_processor=[choose]
    )
    return result[:, known.shape[1] :].cpu()


def sampling_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which :func:`generate_tokens` computes: float32 on CPUs that are slow in bfloat16."""
    capability = torch.backends.cpu.get_cpu_capability()
    slow = device_of(model).type in ("cpu", "meta") and not capability.startswith(("AVX512", "SVE"))
    return torch.float32 if slow else torch.bfloat16


def _count_rows(model: nn.Module) -> int:
    """Return how many windows are generated at a time; one on the meta device is taken for one on a CPU."""
    return ROWS_ON_CPU if device_of(model).type in ("cpu", "meta") else ROWS


def _copy_for_sampling(model: nn.Module) -> Any:
    """Return a copy of the model in :func:`sampling_dtype` and eval mode, without generation settings as end tokens."""
    from transformers import GenerationConfig

    parameters, dtype = {id(p) for p in model.parameters()}, sampling_dtype(model)
    copy = copy_model(model, lambda tensor: tensor.detach().to(dtype) if id(tensor) in parameters else tensor).eval()
    cast(Any, copy).generation_config = GenerationConfig()
    return copy


def sample(logits: Tensor, draws: Tensor) -> Tensor:
    """Return one token per row of logits ``[rows, vocabulary]``, sampled from their softmax.

    The cumulative distribution is inverted at ``draws``, a number from 0 to below 1 per row. Raise RefusedError if a
    row has no finite largest logit.

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
    index = torch.searchsorted(inside, target - before, right=True).clamp_(max=_BLOCK - 1)
    return (block * _BLOCK + index)[:, 0].clamp_(max=size - 1)  # rounding may lead behind the last token


def reply(
    model: Any, tokenizer: Any, messages: Sequence[Mapping[str, str]], *, longest: int = 256, temperature: float = 0.0
) -> Iterator[str]:
    """Yield the reply to a conversation in pieces of whole characters, of at most ``longest`` tokens in all.

    ``messages``: mappings with ``role`` and ``content``, as of transformers' chat templates. A ``temperature`` of 0
    takes the likeliest token each time; else sampling starts from the same seed in each call. Raise ValueError if the
    conversation is empty, or fills all positions of the model.
    """
    tokens = encode_chat(tokenizer, messages).to(device_of(model))
    positions = longest_input(model)
    if not tokens.numel():
        raise ValueError("there is nothing to answer: the message is empty")
    if tokens.shape[1] >= positions:
        raise ValueError(f"the conversation has {tokens.shape[1]} tokens, the model takes {positions}; begin a new one")
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list | tuple) else [ends])}
    generator, generated = torch.Generator().manual_seed(0), list[int]()
    sent, cache = "", make_cache_arguments(model)
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


def encode_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Tensor:
    """Return a conversation as token ids, ``[1, n]`` int64; without a chat template its last message alone."""
    if getattr(tokenizer, "chat_template", None):
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(messages[-1]["content"], return_tensors="pt")
    return encoded["input_ids"].long()


def make_cache_arguments(model: nn.Module) -> dict[str, Any]:
    """Return keyword arguments that give the model an empty key-value cache; ``{}`` if it takes none."""
    from transformers import DynamicCache

    for name in ("cache", "past_key_values"):
        if name in inspect.signature(model.forward).parameters:
            return {name: DynamicCache(config=cast(Any, model).config), "use_cache": True}
    return {}
