"""Read what users pass to the Python interface: a network or its name, an example input, data, and a loss."""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from regrow.core.axes import AxisGraph, Example
from regrow.core.errors import InputError
from regrow.core.objectives import LossFunction, Objective
from regrow.core.sources import Batch, Source, device_of, find_decoder_inputs
from regrow.data.batch_forms import ReadOptions
from regrow.data.batches import INPUT_KEYS
from regrow.evaluation.measure import evaluating
from regrow.nets import Loaded, Origin
from regrow.nets.loaded import guess_example, run_error
from regrow.tracing import TraceError, trace

# A network, a name that :func:`regrow.nets.load` takes, or the path of a saved model or run folder.
ModelLike = nn.Module | str | Path
# A device, ``"auto"`` for the best one of this machine, or ``None``: where the network is.
DeviceLike = str | torch.device | None
# A loss by name, as a function (what the network returned, labels) → scalar, or ``None``: what fits the labels.
LossLike = str | LossFunction | Objective | None
# In what forward passes compute matrix products and convolutions.
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Inputs:
    """A network with everything that is needed to trace it, measure it and train it."""

    loaded: Loaded  # the network with its tokenizer and the example with which it is traced
    sources: tuple[Source, ...] = ()  # the data to calibrate or train on; empty without data
    objective: Objective | None = None  # the loss and score of the data; None without data
    tests: tuple[Source, ...] = ()  # the data on which quality is measured; without such, `sources` itself
    where: str = ""  # what messages call the batch that the example is; empty: it comes from elsewhere

    @property
    def model(self) -> nn.Module:
        """The network, on its device."""
        return self.loaded.model

    @property
    def evaluates_on_calibration(self) -> bool:
        """Whether quality is measured on ``sources``, since no other data were given (``tests`` is the same tuple)."""
        return self.tests is self.sources

    def trace(self) -> AxisGraph:
        """Return the axes of the network, traced with its example; a TraceError names the example's batch, if known."""
        try:
            return trace(self.model, *self.loaded.example.args, **self.loaded.example.kwargs)
        except TraceError as error:
            if not self.where:
                raise
            raise TraceError(f"{self.where}: {error}") from error

    def with_example(self, batch: Batch) -> "Inputs":
        """Return a copy whose example to trace with is a batch, without labels, on the device of the network."""
        batch = batch.to(device_of(self.model))
        return replace(self, loaded=replace(self.loaded, example=Example(batch.args, batch.kwargs)))

    def with_two_rows(self) -> "Inputs":
        """Return a copy whose example, if it is a batch of the data, has two rows alone, if the network takes these."""
        example = take_two_rows(self.loaded.example) if self.where else self.loaded.example
        with evaluating(self.model):  # one for a single size of batch, such as one with the edges of a graph, does not
            if example is self.loaded.example or run_error(self.model, example) is not None:
                return self
        return replace(self, loaded=replace(self.loaded, example=example))

    def for_saving(self) -> Loaded:
        """Return the network as it is saved: with two rows of its example, where the first dimension is the batch."""
        return replace(self.loaded, example=take_two_rows(self.loaded.example))


def take_two_rows(example: Example) -> Example:
    """Return an example with its first two rows alone, where its first dimension is known to be the batch.

    That is known of a single tensor, and of inputs by the names that transformers uses; else the example is whole.
    """
    parts = [*example.args, *example.kwargs.values()]
    known = not example.args and any(name in INPUT_KEYS for name in example.kwargs)
    batched = all(isinstance(part, Tensor) and part.dim() > 1 for part in parts) and len({*map(len, parts)}) == 1
    if not batched or not (known or (len(example.args) == 1 and not example.kwargs)):
        return example
    named = {name: part[:2] for name, part in example.kwargs.items()}
    return Example(tuple(part[:2] for part in example.args), named)


def choose_reading(model: nn.Module, tokenizer: Any, batch_size: int, example: Example | None = None) -> ReadOptions:
    """Return how data are read for a network: in its dtype, if it has a single one, ``batch_size`` examples at a time.

    ``tokenizer``: for text, or ``None``. Images from files have the size and channels of ``example``, or of an input
    that the network's first layer takes, and are normalised unless the network's ``origin`` denies it. Labels of
    causal language models are shifted by one token.
    """
    example = example if example is not None and example.args else guess_example(model)
    image = example.args[0] if example is not None and example.args else None
    shift = any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(model).__mro__)
    origin = getattr(model, "origin", None)
    normalised = not isinstance(origin, Origin) or origin.normalised_images
    formats = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = formats.pop() if len(formats) == 1 else None
    decoder_inputs = find_decoder_inputs(model)
    taken = inspect.signature(model.forward).parameters.values()
    caches = any(one.name == "use_cache" or one.kind is one.VAR_KEYWORD for one in taken)
    reading = ReadOptions(batch_size, tokenizer, shift=shift, normalised=normalised, dtype=dtype)
    if isinstance(image, Tensor) and image.dim() == 4:
        reading = replace(reading, size=image.shape[-1], channels=1 if image.shape[1] == 1 else 3)
    return replace(reading, decoder_inputs=decoder_inputs, caches=caches)


def require_weights(model: nn.Module) -> None:
    """Raise InputError for a network on the device ``meta``, which has no weights and cannot be run on data."""
    if device_of(model).type == "meta":
        raise InputError(
            "the network is on the device meta and has no weights; give it some: model.to_empty(device='cpu'), then "
            "model.load_state_dict(weights)"
        )


def explain_no_network(model: object, data: object) -> str:
    """Return the error message for a ``model`` that is no network; ``data``: the next argument, perhaps the network."""
    got = f"got a {type(model).__name__}"
    if isinstance(model, type):
        got = f"got the class {model.__name__}; write {model.__name__}()"
    elif isinstance(data, nn.Module):
        got += "; the network comes first, then the data"
    return f"model must be a torch.nn.Module, a model's name or a run folder, {got}"
