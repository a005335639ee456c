"""The network that a learning run or a search starts from, with its weights, if it is not built anew."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from regrow import store
from regrow.core.errors import InputError
from regrow.core.progress import Progress, silent
from regrow.core.references import names_code
from regrow.core.sources import logits_in
from regrow.core.tasks import Task, first_examples, run_network
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.parents import BEFORE
from regrow.jobs.task_sequences import parse_sequence
from regrow.nets import Loaded
from regrow.nets.load import check_code
from regrow.nets.small import BUILDERS


def is_new(model: str) -> bool:
    """Whether a name has the form of a small network's, which is built with random weights.

    >>> is_new("mlp:100-100"), is_new("resnet18")
    (True, False)

    Args:
        model: The name.
    """
    small = model.partition(":")[0] in BUILDERS or re.fullmatch(r"[\w-]+:\d+(-\d+)*", model)
    return bool(small) and not Path(model).exists()


def load_start(
    model: str,
    sequences: tuple[str, ...],
    shape: str = "",
    *,
    run: Path | None = None,
    code: str = "",
    progress: Progress = silent,
) -> Loaded | None:
    """Return the network that a run trains on, in float32; ``None`` if it is built anew.

    Args:
        model: The name of the network, or a run folder.
        sequences: The names of its data, which may give the size of its images.
        shape: The shape of its input, like ``1x3x32x32``; empty: from the model, or its data.
        run: The folder of a run that is resumed, whose copy of the network is read if there is one.
        code: The function ``pkg.mod:fn`` that builds the network, if that is the user's own code and the name comes
            from a file.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: If it cannot be loaded, or ``code`` is missing or not needed.
    """
    if is_new(model):
        check_code(model, False, code)
        return None
    data = tuple(parse_sequence(one)[1] for one in sequences)
    sources = tuple(one if one == "digits" else f"data={one}" for one in data)
    spec = ModelSpec(model, "float32", input=shape, sources=sources)
    kept = run / BEFORE if run else None
    if kept and (kept / store.SHAPES).is_file():
        loaded = load_model(replace(spec, name=str(kept)), progress, code)
        return replace(loaded, origin=replace(loaded.origin, name=Path(model).name))
    if run and names_code(model):
        check_code(model, True, code)
        return load_model(replace(spec, name=code), progress)
    return load_model(spec, progress, code)


def find_start(space: str, data: str, shape: str = "", code: str = "", progress: Progress = silent) -> Loaded | None:
    """Return the network with its weights that is searched, in float32; ``None`` if the name is that of a search space.

    Args:
        space: The search space, ``pkg.mod:fn``, a run folder, or the name of a model.
        data: The name of the data, which may give the size of its images.
        shape: As for :func:`load_start`.
        code: As for :func:`load_start`.
        progress: Called with (steps done, steps in all, what is being done).

    Raises:
        ValueError: As :func:`load_start`.
    """
    if not Path(space).exists() and ":" in space and not space.startswith("torchvision:"):
        check_code(space, False, code)
        return None
    return load_start(space, (data,), shape, code=code, progress=progress)


def image_shape(loaded: Loaded) -> tuple[int, ...]:
    """Return the shape ``[C, H, W]`` of the images that a network takes.

    Args:
        loaded: The network.

    Raises:
        InputError: If it takes no images.
    """
    shape = next((arg.shape for arg in loaded.example.args if isinstance(arg, torch.Tensor)), torch.Size())
    if len(shape) != 4:
        raise InputError(
            f"{loaded.origin.name or 'the network'} takes inputs of shape {list(shape)}, and the data are images; "
            "give a network of images, or use Python with data of your own"
        )
    return tuple(shape[1:])


def check_outputs(loaded: Loaded, task: Task, classes: int) -> None:
    """Raise InputError unless a network has an output for every class.

    Args:
        loaded: The network.
        task: A task, in the form that the network takes.
        classes: The number of classes.

    Raises:
        InputError: If it has fewer outputs, or outputs of another form.
    """
    model = loaded.model.eval()
    with torch.no_grad():
        outputs = logits_in(run_network(model, first_examples(task.train, 2).inputs)).shape
    if len(outputs) != 2 or outputs[1] < classes:
        has = f"{outputs[1]} outputs" if len(outputs) == 2 else f"outputs of shape {list(outputs)}"
        raise InputError(
            f"{loaded.origin.name or 'the network'} has {has}, and the tasks have {classes} classes; "
            "give a model with an output for each class"
        )
