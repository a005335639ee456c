"""The input with which a run traces a model: from ``--input``, an earlier run's record, or the size of its images."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from regrow.core.axes import Example
from regrow.core.limits import expanded
from regrow.data.vision import side_of
from regrow.nets.examples import (
    guessed_example,
    image_example,
    read_shape,
    say_guess,
    shaped_example,
    text_example,
    written_shape,
)
from regrow.nets.loaded import Loaded, ModelError, Origin


def find_image_side(sources: Sequence[str]) -> int:
    """Return the side in pixels of the images of the first source that has square images of one size; 0 if none has.

    >>> find_image_side(["digits"]), find_image_side(["news"])
    (8, 0)

    Args:
        sources: The sources, as ``--source`` takes them.
    """
    for spec in sources:
        _, _, path = spec.partition("=")
        if side := 8 if spec == "digits" else side_of(expanded(Path(path))) if path else 0:
            return side
    return 0


def input_arguments(model: str, shape: str, sources: Sequence[str]) -> dict[str, Any]:
    """Return the keyword arguments for :func:`regrow.nets.load` that say which input the model takes.

    Args:
        model: The model's name.
        shape: The value of ``--input``; empty if it was not given.
        sources: The sources, as ``--source`` takes them.
    """
    if shape:
        return {"example": read_shape(shape)}
    return {} if Path(model).exists() else {"pixels": find_image_side(sources)}


def record_input(loaded: Loaded) -> dict[str, str]:
    """Return the entry of ``run.json`` that records the input shape of a traced model, if a single shape describes it.

    Args:
        loaded: The model.
    """
    shape = written_shape(loaded.example)
    return {"input": shape} if loaded.tokenizer is None and shape and "," not in shape else {}


def find_input(
    net: nn.Module,
    origin: Origin,
    run: Mapping[str, object],
    sources: Sequence[str],
    tokenizer: Any,
    recorded: Callable[[], Example] | None = None,
) -> Example:
    """Return an example input for the network of a run folder; a guessed one is logged.

    Args:
        net: The network.
        origin: The record of how the network was built.
        run: The content of ``run.json``; empty if there is none.
        sources: The sources on which it will be evaluated, as ``--source`` takes them.
        tokenizer: The tokenizer of a language model, or ``None``.
        recorded: Reads the input that was recorded when it was saved; ``None``: there is none.

    Raises:
        ModelError: If no input shape is known and none can be guessed.
    """
    if tokenizer is not None:
        return text_example(net, len(tokenizer))
    if isinstance(noted := run.get("input"), str):
        return shaped_example(net, read_shape(noted))
    if shape := origin.input_shape:
        return image_example(net, *shape)
    pixels = find_image_side(sources)
    if recorded is not None and not pixels:
        return recorded()
    if (guess := guessed_example(net, pixels)) is None:
        raise ModelError(f"{origin.name}: the model does not say what input it takes; give --input 1x3x32x32")
    if not pixels:
        say_guess(guess)
    return guess
