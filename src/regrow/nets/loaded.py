"""The result of loading a model: the network, an input for it, and how to build its architecture again."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from regrow.core.axes import Example
from regrow.nets.errors import ModelError
from regrow.nets.weight_files import WeightFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("transformers", "torchvision", "small", "cells", "mobile", "bench201", "callable")
_OWN = ("small", "cells", "mobile", "bench201")


@dataclass(frozen=True)
class Origin:
    """How to build an architecture again, as plain data: no weights and no code.

    Args:
        kind: ``"transformers"``, ``"torchvision"``, ``"small"``, ``"cells"``, ``"mobile"``, ``"bench201"`` or
            ``"callable"``.
        reference: The class (transformers), the model's name (torchvision, small) or ``pkg.mod:fn`` (callable), which
            is informative: it is never imported.
        config: The arguments to build it with: a transformers configuration, the builder's arguments, or nothing.
        name: What the user called the model (it may be a path); informative, nothing is built from it.
        builder: For ``"callable"``: the function that the user passed in this process; it is not saved.
    """

    kind: str
    reference: str
    config: Mapping[str, object] = field(default_factory=dict)
    name: str = ""
    builder: Callable[[], object] | None = field(default=None, compare=False, repr=False)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch dimension, if the network is built for one; else empty."""
        shape = self.config.get("shape")
        return tuple(shape) if isinstance(shape, list | tuple) else ()

    @property
    def normalised_images(self) -> bool:
        """Whether it takes images normalised as torchvision's pretrained networks do, and not of values 0 to 1."""
        return self.kind not in _OWN

    def record(self) -> dict[str, object]:
        """Return the origin as JSON data, without the function."""
        return {"kind": self.kind, "reference": self.reference, "config": dict(self.config), "name": self.name}

    def to_json(self) -> str:
        """Return the origin as JSON text."""
        return json.dumps(self.record(), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Origin":
        """Parse an origin from JSON text.

        >>> Origin.from_json(Origin("torchvision", "resnet18", {"num_classes": 10}).to_json()).config
        {'num_classes': 10}

        Args:
            text: The output of :meth:`to_json`.

        Raises:
            ModelError: If the text is not an origin.
        """
        try:
            data = json.loads(text)
            kind, reference, config = data["kind"], data["reference"], data["config"]
            name = data["name"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"not the origin of a model: {error!r}; restore the run's origin file") from None
        texts = all(isinstance(value, str) for value in (kind, reference, name))
        if kind not in KINDS or not texts or not isinstance(config, dict):
            raise ModelError(f"not the origin of a model: kind {kind!r}; known kinds: {', '.join(KINDS)}")
        return cls(kind, reference, config, name)


@dataclass(frozen=True)
class Loaded:
    """A loaded model, with all that is needed to trace and save it.

    Args:
        model: The network, in eval mode.
        tokenizer: Its tokenizer, or ``None``.
        example: An input to trace it with, on the model's device.
        origin: How to build the architecture again.
        notes: What a reader of results must know about these weights (de-quantised, random).
        guessed: Whether the shape of the example input is a guess.
        files: The files of its weights, as they were when they were opened.
    """

    model: nn.Module
    tokenizer: "PreTrainedTokenizerBase | None"
    example: Example
    origin: Origin
    notes: tuple[str, ...] = ()
    guessed: bool = False
    files: tuple[WeightFile, ...] = ()


def check_same_files(first: Loaded, second: Loaded) -> None:
    """Raise InputError if a model that was loaded twice was changed in between.

    Args:
        first: The model as it was loaded before.
        second: The model as it was loaded again.

    Raises:
        InputError: Names the first file that was changed.
    """
    for one in (*first.files, *second.files):
        one.check()
