"""The input that a run traces a model with: as it was given, as an earlier run noted it, or of its source's images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regrow.axes import Example
from regrow.data.vision import side_of
from regrow.limits import expanded
from regrow.nets.errors import ModelError
from regrow.nets.examples import (
    guessed_example,
    image_example,
    read_shape,
    say_guess,
    shaped_example,
    text_example,
    written_shape,
)
from regrow.nets.loaded import Loaded, Origin


def pixels_of(sources: Sequence[str]) -> int:
    """The side of the images of the first source that has any of one size; 0 if none has.

    >>> pixels_of(["digits"]), pixels_of(["news"])
    (8, 0)

    Args:
        sources: As ``--source`` takes them.
    """
    for spec in sources:
        _, _, path = spec.partition("=")
        if side := 8 if spec == "digits" else side_of(expanded(Path(path))) if path else 0:
            return side
    return 0


def asked_input(model: str, shape: str, sources: Sequence[str]) -> dict[str, Any]:
    """What :func:`regrow.nets.load` is told of the input of a model.

    Args:
        model: Its name.
        shape: As ``--input`` takes it; empty if it was not given.
        sources: As ``--source`` takes them.
    """
    if shape:
        return {"example": read_shape(shape)}
    return {} if Path(model).exists() else {"pixels": pixels_of(sources)}


def noted_input(loaded: Loaded) -> dict[str, str]:
    """What ``run.json`` notes of the input that a model was traced with, where a shape says it.

    Args:
        loaded: The model.
    """
    shape = written_shape(loaded.example)
    return {"input": shape} if loaded.tokenizer is None and "," not in shape else {}


def input_of(net: nn.Module, origin: Origin, run: dict[str, Any], sources: Sequence[str], tokenizer: Any) -> Example:
    """An input for the network of a run folder; one that is a guess is logged.

    Args:
        net: The network.
        origin: How it was built.
        run: What ``run.json`` says; empty if there is none.
        sources: What it will be evaluated on.
        tokenizer: Its tokenizer, if it has one.

    Raises:
        ModelError: If nothing says what it takes.
    """
    if tokenizer is not None:
        return text_example(net, len(tokenizer))
    if isinstance(noted := run.get("input"), str):
        return shaped_example(net, read_shape(noted))
    if shape := origin.config.get("shape"):
        return image_example(net, *shape)
    pixels = pixels_of(sources)
    if (found := guessed_example(net, pixels)) is None:
        raise ModelError(f"{origin.name}: the model does not say what input it takes; give --input 1x3x32x32")
    if not pixels:
        say_guess(found)
    return found
