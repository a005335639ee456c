"""Describe how an exported network is called: named input and output tensors, and which sizes are dynamic."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_leaves, tree_unflatten

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.sources import logits_in
from regrow.exporters.written import ExportError

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "past + sequence"
"""Names of dynamic sizes. The total counts past and new tokens, both of which the attention mask covers."""

Labels = Mapping[str, Mapping[int, str]]
"""Name of an input → dimension → name of its dynamic size."""


@dataclass(frozen=True)
class ExportedCall:
    """A network as a function of named tensors.

    Args:
        run: A module that takes the inputs in their order and returns a tuple of tensors.
        inputs: Name → the example's tensor.
        outputs: The names of the outputs.
        text: Whether it is a language model that predicts the next token.
        most: The longest sequence that it takes; 0 if unknown.
    """

    run: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    text: bool = False
    most: int = 0

    @property
    def cached(self) -> bool:
        """Whether it takes keys and values of earlier tokens."""
        return any(name.startswith("past_key_values") for name in self.inputs)


class Flat(nn.Module):
    """Wraps a network so that it takes a flat list of tensors and returns a tuple of tensors.

    Args:
        model: The network.
        leaves: All its arguments, flattened; tensors in it are replaced by those passed to ``forward``.
        spec: The structure from which they were flattened, ``(args, kwargs)``.
    """

    def __init__(self, model: nn.Module, leaves: Sequence[object], spec: TreeSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the network's output as a tuple.

        Args:
            *tensors: The input tensors, in their order.
        """
        return tuple(name_outputs(self.answer(*tensors)).values())

    def answer(self, *tensors: Tensor) -> object:
        """Return the network's output as it is.

        Args:
            *tensors: The input tensors, in their order.
        """
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        return self.model(*args, **kwargs)


class Cached(nn.Module):
    """Wraps a transformers language model so that it takes and returns keys and values as plain tensors.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``[batch, sequence, vocabulary]``, then keys and values per layer, new tokens included.

        Args:
            tensors: Tokens, the attention mask, and keys and values per layer.
        """
        from transformers import DynamicCache

        input_ids, attention_mask, *past = tensors
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return answer.logits, *_kept(answer.past_key_values)


def describe_call(model: nn.Module, example: Example, *, cache: bool = False) -> ExportedCall:
    """Describe how a network is called, by running it once on an example.

    Args:
        model: The network, in eval mode, in float32 on the CPU.
        example: The input. A language model that takes an ``attention_mask`` gets one of ones.
        cache: Whether the call takes and returns keys and values.

    Raises:
        ExportError: If the network fails on the example, returns no tensor, or has no cache although one is requested.
    """
    takes = inspect.signature(model.forward).parameters
    args, kwargs = example.args, dict(example.kwargs)
    names = [name for name, one in takes.items() if one.kind is not one.VAR_POSITIONAL]
    tokens = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if tokens is not None and (tokens.dim() != 2 or tokens.is_floating_point()):
        tokens = None
    if tokens is not None and "attention_mask" in takes and "attention_mask" not in [*names[: len(args)], *kwargs]:
        kwargs["attention_mask"] = torch.ones_like(tokens)
    if cache:
        return _cached(model, tokens)
    pairs, spec = tree_flatten_with_path((args, kwargs))
    leaves = [leaf.detach().to("cpu") if isinstance(leaf, Tensor) else leaf for _, leaf in pairs]
    leaves = [leaf.float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]
    run = Flat(model, leaves, spec)
    inputs = {
        _name(path, names): leaf for (path, _), leaf in zip(pairs, leaves, strict=True) if isinstance(leaf, Tensor)
    }
    if len(inputs) < len(run.places) or not inputs:
        raise ExportError(
            f"{len(run.places)} tensors go into the network under {len(inputs)} names; give another example"
        )
    try:
        with torch.no_grad():
            given = name_outputs(run.answer(*inputs.values()))
    except Exception as error:
        raise ExportError(
            f"the network does not take the example ({first_line(error)}); give one that it takes"
        ) from None
    if not given:
        raise ExportError("the network gives no tensor for the example; nothing can be written")
    return ExportedCall(run, inputs, tuple(given), tokens is not None and "logits" in given, _most(model))


def label_sizes(call: ExportedCall, open_to: tuple[str, ...]) -> Labels:
    """Return which sizes of the inputs are dynamic: input name → dimension → name of the size.

    Args:
        call: The description of the call.
        open_to: The names of the sizes that may be dynamic.

    >>> label_sizes(ExportedCall(nn.Identity(), {"x": torch.zeros(2, 3)}, ("output",)), ("batch", "sequence"))
    {'x': {0: 'batch'}}
    """
    batch = {tensor.shape[0] for tensor in call.inputs.values() if tensor.dim()}
    result: dict[str, dict[int, str]] = {}
    for name, tensor in call.inputs.items():
        labels = {0: BATCH} if tensor.dim() and len(batch) == 1 else {}
        if name.startswith("past_key_values"):
            labels[2] = PAST
        elif name == "attention_mask" and call.cached:
            labels[1] = TOTAL
        elif tensor.dim() == 2 and not tensor.is_floating_point():
            # What a decoder reads is as long as it likes.
            labels[1] = f"decoder {SEQUENCE}" if name.startswith("decoder") else SEQUENCE
        result[name] = {dim: label for dim, label in labels.items() if label.removeprefix("decoder ") in open_to}
    return result


def sizes_of(call: ExportedCall, labels: Labels) -> dict[str, int]:
    """Return name of each dynamic size → its value in the example.

    Args:
        call: The description of the call.
        labels: The dynamic sizes, from :func:`label_sizes`.
    """
    return {label: call.inputs[name].shape[dim] for name, dims in labels.items() for dim, label in dims.items()}


def resize_inputs(call: ExportedCall, labels: Labels, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the example inputs at other sizes: rows are repeated, and made different from one another along the batch.

    Args:
        call: The description of the call.
        labels: The dynamic sizes, from :func:`label_sizes`.
        sizes: Name of a dynamic size → its new value. Sizes that are not named stay.
    """
    result = {}
    for name, tensor in call.inputs.items():
        for dim, label in labels[name].items():
            if (size := sizes.get(label)) is not None:
                tensor = tensor.index_select(dim, torch.arange(size) % max(tensor.shape[dim], 1))
        if BATCH in labels[name].values() and name != "attention_mask":
            tensor = torch.stack([_other(row, i) for i, row in enumerate(tensor)])
        result[name] = tensor
    if (mask := result.get("attention_mask")) is not None and mask.dim() == 2 and len(mask) > 1 and mask.shape[1] > 2:
        result["attention_mask"] = torch.ones_like(mask)
        result["attention_mask"][-1, -mask.shape[1] // 3 :] = 0  # a shorter text, filled up on the right
    return result


def name_outputs(answer: object) -> dict[str, Tensor]:
    """Return the tensors of a network's output by name: only the logits if there are any.

    Args:
        answer: The network's output.
    """
    if isinstance(answer, Tensor):
        return {"output": answer}
    if isinstance(answer, Mapping):
        if isinstance(answer.get("logits"), Tensor):
            return {"logits": logits_in(answer)}
        return {str(key): value for key, value in answer.items() if isinstance(value, Tensor)}
    return {f"output_{i}": leaf for i, leaf in enumerate(tree_leaves(answer)) if isinstance(leaf, Tensor)}


def _cached(model: nn.Module, tokens: Tensor | None) -> ExportedCall:
    """Describe a call in the middle of a text: the example's first half is in the cache, the second half is new."""
    if tokens is None or not hasattr(model, "config") or tokens.shape[1] < 6:
        raise ExportError("only a language model of transformers has keys and values to take; write without a cache")
    tokens = tokens.cpu()
    half = tokens.shape[1] // 2 - 1  # at least 2, and fewer than are new: neither is to be taken for the other
    try:
        with torch.no_grad():
            cache = model(input_ids=tokens[:, :half], use_cache=True).past_key_values
        kinds = {type(layer).__name__ for layer in cache.layers}
        if kinds != {"DynamicLayer"}:
            raise ExportError(
                f"its cache is made of {', '.join(sorted(kinds))}, which no file holds yet; write without"
            )
        kept = _kept(cache)
    except (AttributeError, TypeError) as error:
        raise ExportError(f"its cache cannot be read ({first_line(error)}); write without a cache") from None
    inputs = {"input_ids": tokens[:, half:], "attention_mask": torch.ones_like(tokens)}
    places = [f"{i}.{kind}" for i in range(len(kept) // 2) for kind in ("key", "value")]
    inputs |= {f"past_key_values.{place}": one for place, one in zip(places, kept, strict=True)}
    return ExportedCall(
        Cached(model), inputs, ("logits", *(f"present.{place}" for place in places)), True, _most(model)
    )


def _kept(cache: Any) -> list[Tensor]:
    return [one for layer in cache.layers for one in (layer.keys, layer.values)]


def _most(model: nn.Module) -> int:
    found = getattr(getattr(model, "config", None), "max_position_embeddings", 0)
    return found if type(found) is int else 0


def _other(row: Tensor, number: int) -> Tensor:
    if not number or row.dtype == torch.bool:
        return row
    return row * (1 - 0.1 * number) if row.is_floating_point() else row.roll(number, -1) if row.dim() else row


def _name(path: tuple[Any, ...], names: list[str]) -> str:
    """Return the name of an argument: ``(0, 1, …)`` is the second positional one, ``(1, "x", …)`` the one called x."""
    where, first, *rest = [getattr(key, "idx", getattr(key, "key", key)) for key in path]
    if where == 0:
        first = names[first] if first < len(names) else f"input_{first}"
    return "_".join(map(str, [first, *rest]))
