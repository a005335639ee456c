"""One batch of a user's data: split into inputs and labels, checked, and cast to what networks and losses take."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.core.errors import first_line
from regrow.core.objectives import IGNORED
from regrow.core.sources import LABEL_KEYS, Batch, describe
from regrow.data.halves import SourceError

TOKEN_KEYS = ("input_ids", "attention_mask", "token_type_ids", *LABEL_KEYS)  # tokenizers return lists under these keys


@dataclass(frozen=True)
class ReadOptions:
    """How a user's data are read; raises SourceError for a batch size below 1."""

    batch_size: int = 32  # where the data do not come in batches
    tokenizer: object = None  # of transformers; without one, text is refused
    seq_len: int = 512  # tokens per window of text
    size: int = 224  # height and width of images that are read from files
    channels: int = 3  # of these; 1: the mean of the colours
    # Labels in the shape of ``input_ids`` are those of the tokens themselves, as transformers takes them: they are
    # shifted by one, and made of ``input_ids`` if missing. Those of a tuple are shifted if they repeat its tokens.
    shift: bool = False
    # Labels → ``decoder_input_ids`` of batches without them, for encoder-decoder models of transformers.
    decoder_inputs: Callable[[Tensor], Tensor] | None = None
    normalised: bool = True  # images from files, as torchvision's pretrained networks expect; else 0 to 1
    caches: bool = True  # whether the network takes ``use_cache``, which windows of text switch off
    dtype: torch.dtype | None = None  # to which floating-point inputs are cast; ``None``: they keep theirs

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SourceError(f"batch_size must be at least 1, got {self.batch_size}")


DEFAULTS = ReadOptions()


def to_batch(item: Any, where: str = "the batch", reading: ReadOptions = DEFAULTS) -> Batch:
    """Return one batch of a user's loader as inputs and labels, or raise SourceError; ``where`` names it in messages.

    ``item``: a tensor, a tuple whose last part is the labels, or a mapping by name. Labels are not checked yet.
    Of ``reading``, ``shift`` and ``decoder_inputs`` count.

    >>> to_batch({"input_ids": torch.tensor([[5, 6, 7]])}, reading=ReadOptions(shift=True)).labels
    tensor([[   6,    7, -100]])
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor | np.ndarray):
        return Batch((item,))
    if isinstance(item, Mapping):
        return _mapping_batch({str(key): value for key, value in item.items()}, where, reading)
    if isinstance(item, tuple | list) and item:
        if len(item) == 1:
            return to_batch(item[0], where, reading)
        *inputs, last = item
        if are_targets(last):
            return Batch((*inputs, last))  # detection: the network takes its targets as an input
        if are_labels(last):
            if len(inputs) == 1 and isinstance(inputs[0], Mapping):
                return Batch((), {str(key): value for key, value in inputs[0].items()}, last)
            single = len(inputs) == 1 and isinstance(inputs[0], tuple | list)
            return Batch(tuple(inputs[0] if single else inputs), {}, to_next_tokens(inputs[0], last, reading))
    got = f"a {type(item).__name__}"
    if isinstance(item, tuple | list):
        got += f" of {', '.join(type(part).__name__ for part in item[:3]) or 'nothing'}"
    problem = f"a batch must be a tensor, (inputs, labels), or a dict of tensors, got {got}"
    raise SourceError(f"{where}: {problem}; give a collate_fn that returns one of these")


def to_next_tokens(inputs: Any, labels: Any, reading: ReadOptions) -> Any:
    """Return labels; those that repeat the tokens of causal models, ``[sequences, tokens]``, are shifted by one."""
    if not reading.shift or not isinstance(inputs, Tensor) or not isinstance(labels, Tensor):
        return labels
    if labels.shape != inputs.shape or labels.dim() != 2 or inputs.is_floating_point():
        return labels
    return _shift(labels) if bool(((labels == inputs) | (labels == IGNORED)).all()) else labels


def _shift(labels: Tensor) -> Tensor:
    """Return labels, ``[sequences, tokens]``, one position earlier; the last one is ignored."""
    return torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], dim=1)


def is_example(item: Any) -> bool:
    """Whether an item, (input, label) or a dict, is one example: its label is a number, or ``input_ids`` one row."""
    label = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
    if isinstance(item, Mapping):
        label = next((item[key] for key in LABEL_KEYS if key in item), None)
        if isinstance(ids := item.get("input_ids"), Tensor) and ids.dim() == 1:
            return True
    return isinstance(label, int | float | np.generic) or (isinstance(label, Tensor) and label.dim() == 0)


def is_example_list(data: Any) -> bool:
    """Whether data are a list whose first entry is a single example, by :func:`is_example`."""
    return isinstance(data, list) and bool(data) and is_example(data[0])


def check_batch(batch: Batch, where: str, dtype: torch.dtype | None = None, first: Batch | None = None) -> Batch:
    """Return a batch whose tensors networks and losses can take, or raise SourceError that says what is wrong with it.

    ``where`` names it in messages; ``dtype``: as in :class:`ReadOptions`; ``first``: the first batch of the source,
    with which its labels must agree; ``None``: this is it. Labels of whole numbers become int64, and no tensor has a
    gradient.

    >>> check_batch(Batch((torch.ones(2, 3).double(),), labels=torch.tensor([0, 1], dtype=torch.int32)), "batch 0",
    ...     torch.float32)
    Batch(args=(tensor([[1., 1., 1.],
            [1., 1., 1.]]),), kwargs={}, labels=tensor([0, 1]))
    """
    args = tuple(check_input(value, where, dtype) for value in batch.args)
    kwargs = {key: check_input(value, where, dtype, key) for key, value in batch.kwargs.items()}
    size = count_examples(args or tuple(kwargs.values()), where)
    labels = None if batch.labels is None else check_labels(batch.labels, where, size)
    # A vector of values is a single example, unless there is a label for each.
    row = len(args) == 1 and isinstance(args[0], Tensor) and args[0].dim() == 1 and args[0].is_floating_point()
    if labels is not None and row and len(labels) != size:
        shapes = f"an input of shape {list(args[0].shape)} with labels of shape {list(labels.shape)}"
        raise SourceError(f"{where}: {shapes} is a single example; give DataLoader(data, batch_size=32)")
    if first is not None and _label_form(labels) != _label_form(first.labels):
        forms = f"has {_label_form(labels)}, and the first batch {_label_form(first.labels)}"
        raise SourceError(f"{where} {forms}; give batches of one kind, with labels")
    return replace(batch, args=args, kwargs=kwargs, labels=labels, where=where)


def count_examples(inputs: Sequence[Any], where: str) -> int:
    """Return how many examples a batch has: the length of its first input, 1 if none has one; SourceError if 0."""
    first = next((part for part in inputs if isinstance(part, Tensor | list | tuple)), None)
    if isinstance(first, Tensor) and not first.dim():
        raise SourceError(f"{where}: the input is a single number; give a tensor whose first dimension is the batch")
    if first is None:
        return 1
    if not len(first):
        raise SourceError(f"{where} is empty: its first input is {describe(first)}; leave such batches out")
    return len(first)


def from_array(value: "np.ndarray[Any, Any]", where: str) -> Tensor:
    """Return an array of numbers, of any byte order and strides, as a tensor; SourceError for other arrays."""
    try:
        return torch.as_tensor(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    except TypeError:
        raise SourceError(f"{where}: an array of {value.dtype} is no tensor; give an array of numbers") from None


def check_input(value: Any, where: str, dtype: torch.dtype | None = None, name: str = "") -> Any:
    """Return an input with its tensors as networks take them, in the floating ``dtype``; SourceError if they cannot be.

    ``name``: the argument's; one with ``mask`` or ``bias`` in it may hold −∞. ``dtype`` ``None``: as they are.
    """
    match value:
        case np.ndarray():
            value = from_array(value, where)
        case dict():
            return {key: check_input(part, where, dtype, str(key)) for key, part in value.items()}
        case list() | tuple() if any(isinstance(part, Tensor | np.ndarray | dict | list) for part in value):
            parts = [check_input(part, where, dtype, name) for part in value]
            return value._make(parts) if isinstance(value, tuple) and hasattr(value, "_make") else type(value)(parts)
    if not isinstance(value, Tensor):
        return value
    value = _check_dense(value, where, "an input")
    if value.is_floating_point() and dtype is not None:
        value = value.to(dtype)
    allow_infinity = any(word in name for word in ("mask", "bias"))  # -inf hides positions
    if problem := _find_nonfinite(value, allow_infinity):
        raise SourceError(f"{where}: an input holds {problem}; leave the example out, or fill it in")
    return value


def check_labels(labels: Any, where: str, size: int | None = None) -> Tensor:
    """Return labels as losses take them: whole numbers int64, and bool per output float32; SourceError otherwise.

    ``size``: the number of examples; only if it is 1, labels may lack a dimension for it, and become ``[1]``.

    >>> check_labels([True, False], "batch 0"), check_labels(torch.ones(1, 2, dtype=torch.bool), "batch 0")
    (tensor([1, 0]), tensor([[1., 1.]]))
    """
    if isinstance(labels, np.ndarray):
        labels = from_array(labels, where)
    elif not isinstance(labels, Tensor) and are_labels(labels):
        labels = torch.tensor(labels)
    if not isinstance(labels, Tensor):
        raise SourceError(f"{where}: labels must be a tensor, got a {type(labels).__name__}; give numbers per example")
    labels = _check_dense(labels, where, "labels are")
    if not labels.dim():
        if size != 1:
            problem = "labels have no dimension for the examples"
            raise SourceError(f"{where}: {problem}; if it is a single example, give the loader a batch_size")
        labels = labels.reshape(1)
    if problem := _find_nonfinite(labels, allow_infinity=False):
        raise SourceError(f"{where}: labels hold {problem}; leave the example out")
    if labels.dtype == torch.bool and labels.dim() > 1:
        return labels.float()
    return labels if labels.is_floating_point() else labels.long()


def _check_dense(value: Tensor, where: str, what: str) -> Tensor:
    """Return a tensor without a gradient; SourceError, about ``what``, unless it has numbers and is dense."""
    if value.device.type == "meta":
        raise SourceError(f"{where}: {what} on the device meta and has no numbers; give it on the CPU")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise SourceError(f"{where}: {what} a tensor of layout {layout}; give it dense (.to_dense())")
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return value.clone()  # which a backward pass can use
    return value.detach() if value.requires_grad else value


def _find_nonfinite(value: Tensor, allow_infinity: bool) -> str:
    """Return ``"NaN"``, or ``"infinity"`` unless it is allowed, if a tensor holds any, else an empty string."""
    # A finite sum has finite terms; a sum of finite terms may overflow.
    if not value.is_floating_point() or math.isfinite(float(value.sum())):
        return ""
    if bool(value.isnan().any()):
        return "NaN"
    return "infinity" if not allow_infinity and bool(value.isinf().any()) else ""


def _label_form(labels: Tensor | None) -> str:
    """Return, in words, whether labels are missing, floats or whole numbers; all batches of a source must be alike."""
    if labels is None:
        return "no labels"
    return "labels of floats" if labels.is_floating_point() else "labels of whole numbers"


def are_targets(value: Any) -> bool:
    """Whether a part of a batch holds the targets of a detector: a sequence of mappings, one per image."""
    return isinstance(value, Sequence) and len(value) > 0 and isinstance(value[0], Mapping)


def are_labels(value: Any) -> bool:
    """Whether a part of a batch may be labels: a tensor, an array, or a list of numbers."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(isinstance(x, int | float | np.generic) for x in value)
    return isinstance(value, Tensor | np.ndarray)


def _mapping_batch(item: dict[str, Any], where: str, reading: ReadOptions) -> Batch:
    """Return a batch of a mapping, with inputs that transformers makes of labels, or labels that it makes of inputs.

    Labels stand under one of ``LABEL_KEYS``. They are checked here in these cases, else by whoever reads the batch.
    """
    item = {key: _to_tensor(value, where) if key in TOKEN_KEYS else value for key, value in item.items()}
    if any(are_targets(item.get(key)) for key in LABEL_KEYS):
        return Batch((), item)  # detection: the network takes its targets as an input
    labels = next((item.pop(key) for key in LABEL_KEYS if key in item), None)
    ids = item.get("input_ids")
    labels = _to_tensor(labels, where)
    given = "decoder_input_ids" in item or not isinstance(labels, Tensor) or labels.is_floating_point()
    if reading.decoder_inputs is not None and not given and labels.dim() == 2:
        labels = check_labels(labels, where)
        item["decoder_input_ids"] = reading.decoder_inputs(labels)
    if not reading.shift or not isinstance(ids, Tensor):
        return Batch((), item, labels)
    if ids.dim() != 2:
        raise SourceError(f"{where}: input_ids have shape {list(ids.shape)}; give [sequences, tokens] in each batch")
    if labels is None:
        mask = item.get("attention_mask")
        labels = ids
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            labels = ids.masked_fill(mask == 0, IGNORED)
    labels = check_labels(labels, where, len(ids))
    if labels.shape == ids.shape:  # one label per sequence is no next token
        labels = _shift(labels)
    return Batch((), item, labels)


def _to_tensor(value: Any, where: str) -> Any:
    """Return an array or lists of numbers as a tensor, anything else as it is; SourceError for uneven lists."""
    if isinstance(value, np.ndarray):
        return from_array(value, where)
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    if not isinstance(value, list) or not isinstance(first, int | float):
        return value
    try:
        return torch.tensor(value)
    except (ValueError, TypeError, OverflowError) as error:
        problem = f"lists of numbers are no tensor: {first_line(error)}"
        raise SourceError(f"{where}: {problem}; pad them to one length") from error
