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
from regrow.core.sources import Batch, logits_in
from regrow.exporters import ExportError

# Names of dynamic sizes. The total counts past and new tokens, both of which the attention mask covers.
BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "past + sequence"
Labels = Mapping[str, Mapping[int, str]]  # name of an input → dimension → name of its dynamic size


@dataclass(frozen=True)
class ExportedCall:
    """A network as a function of named tensors."""

    run: nn.Module  # takes the inputs in their order and returns a tuple of tensors
    inputs: Mapping[str, Tensor]  # name → the example's tensor
    outputs: tuple[str, ...]
    text: bool = False  # whether it is a language model that predicts the next token
    max_length: int = 0  # of a sequence; 0 if unknown

    @property
    def cached(self) -> bool:
        """Whether it takes keys and values of earlier tokens."""
        return any(name.startswith("past_key_values") for name in self.inputs)


class Flat(nn.Module):
    """Wraps a network so that it takes a flat list of tensors and returns a tuple of tensors."""

    def __init__(self, model: nn.Module, leaves: Sequence[object], spec: TreeSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        self.leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors of the network's output as a tuple."""
        return tuple(self.run_named(tensors).values())

    def run_named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the tensors of the network's output by name: only the logits if there are any."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.spec)
        output = Batch(args, kwargs).run(self.model)
        if isinstance(output, Tensor):
            return {"output": output}
        if isinstance(output, Mapping):
            if isinstance(output.get("logits"), Tensor):
                return {"logits": logits_in(output)}
            return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
        return {f"output_{i}": leaf for i, leaf in enumerate(tree_leaves(output)) if isinstance(leaf, Tensor)}


class Cached(nn.Module):
    """Wraps a transformers language model so that it takes and returns keys and values as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``[batch, sequence, vocabulary]``, then keys and values per layer, new tokens included.

        ``tensors`` are tokens, the attention mask, and keys and values per layer.
        """
        from transformers import DynamicCache

        input_ids, attention_mask, *past = tensors
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        return output.logits, *_keys_and_values(output.past_key_values)


def describe_call(model: nn.Module, example: Example, *, cache: bool = False) -> ExportedCall:
    """Describe how a network is called, by running it once on an example."""
    parameters = inspect.signature(model.forward).parameters
    args, kwargs = example.args, dict(example.kwargs)
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_POSITIONAL]
    tokens = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    if tokens is not None and (tokens.dim() != 2 or tokens.is_floating_point()):
        tokens = None
    if tokens is not None and "attention_mask" in parameters and "attention_mask" not in [*names[: len(args)], *kwargs]:
        kwargs["attention_mask"] = torch.ones_like(tokens)
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", 0)
    max_length = limit if type(limit) is int else 0
    if cache:
        return _cached_call(model, tokens, max_length)
    pairs, spec = tree_flatten_with_path((args, kwargs))
    leaves, inputs = [], {}
    for path, leaf in pairs:
        if isinstance(leaf, Tensor):
            leaf = leaf.detach().cpu()
            leaf = leaf.float() if leaf.is_floating_point() else leaf
            inputs[_name(path, names)] = leaf
        leaves.append(leaf)
    run = Flat(model, leaves, spec)
    if len(inputs) < len(run.places) or not inputs:
        counts = f"{len(run.places)} tensors go into the network under {len(inputs)} names"
        raise ExportError(f"{counts}; give another example")
    try:
        with torch.no_grad():
            outputs = run.run_named([*inputs.values()])
    except Exception as error:
        problem = f"the network does not take the example ({first_line(error)})"
        raise ExportError(f"{problem}; give one that it takes") from None
    if not outputs:
        raise ExportError("the network gives no tensor for the example; nothing can be written")
    return ExportedCall(run, inputs, tuple(outputs), tokens is not None and "logits" in outputs, max_length)


def label_sizes(call: ExportedCall, dynamic: tuple[str, ...]) -> Labels:
    """Return which sizes of the inputs are dynamic, of those whose names are in ``dynamic``.

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
        result[name] = {dim: label for dim, label in labels.items() if label.removeprefix("decoder ") in dynamic}
    return result


def sizes_of(call: ExportedCall, labels: Labels) -> dict[str, int]:
    """Return name of each dynamic size → its value in the example."""
    return {label: call.inputs[name].shape[dim] for name, dims in labels.items() for dim, label in dims.items()}


def resize_inputs(call: ExportedCall, labels: Labels, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the example inputs at other sizes: rows are repeated, and made different from one another along the batch.

    ``sizes`` has the new value of dynamic sizes by name; sizes that are not named stay.
    """
    result = {}
    for name, tensor in call.inputs.items():
        for dim, label in labels[name].items():
            if (size := sizes.get(label)) is not None:
                tensor = tensor.index_select(dim, torch.arange(size) % max(tensor.shape[dim], 1))
        if BATCH in labels[name].values() and name != "attention_mask":
            tensor = torch.stack([_vary(row, i) for i, row in enumerate(tensor)])
        result[name] = tensor
    if (mask := result.get("attention_mask")) is not None and mask.dim() == 2 and len(mask) > 1 and mask.shape[1] > 2:
        result["attention_mask"] = torch.ones_like(mask)
        result["attention_mask"][-1, -mask.shape[1] // 3 :] = 0  # a shorter text, filled up on the right
    return result


def _cached_call(model: nn.Module, tokens: Tensor | None, max_length: int) -> ExportedCall:
    """Describe a call in the middle of a text: the example's first half is in the cache, the second half is new."""
    if tokens is None or not hasattr(model, "config") or tokens.shape[1] < 6:
        raise ExportError("only a language model of transformers has keys and values to take; write without a cache")
    tokens = tokens.cpu()
    half = tokens.shape[1] // 2 - 1  # at least 2, and fewer than are new: neither is to be taken for the other
    try:
        with torch.no_grad():
            cache = model(input_ids=tokens[:, :half], use_cache=True).past_key_values
        classes = {type(layer).__name__ for layer in cache.layers}
        if classes != {"DynamicLayer"}:
            names = ", ".join(sorted(classes))
            raise ExportError(f"its cache is made of {names}, which no file holds yet; write without")
        past = _keys_and_values(cache)
    except (AttributeError, TypeError) as error:
        raise ExportError(f"its cache cannot be read ({first_line(error)}); write without a cache") from None
    inputs = {"input_ids": tokens[:, half:], "attention_mask": torch.ones_like(tokens)}
    entries = [f"{i}.{part}" for i in range(len(past) // 2) for part in ("key", "value")]
    inputs |= {f"past_key_values.{name}": tensor for name, tensor in zip(entries, past, strict=True)}
    return ExportedCall(Cached(model), inputs, ("logits", *(f"present.{name}" for name in entries)), True, max_length)


def _keys_and_values(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _vary(row: Tensor, number: int) -> Tensor:
    if not number or row.dtype == torch.bool:
        return row
    return row * (1 - 0.1 * number) if row.is_floating_point() else row.roll(number, -1) if row.dim() else row


def _name(path: tuple[Any, ...], names: list[str]) -> str:
    """Return the name of an argument: ``(0, 1, …)`` is the second positional one, ``(1, "x", …)`` the one called x."""
    where, first, *rest = [getattr(key, "idx", getattr(key, "key", key)) for key in path]
    if where == 0:
        first = names[first] if first < len(names) else f"input_{first}"
    return "_".join(map(str, [first, *rest]))
