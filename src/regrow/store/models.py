"""Save a network of any shape to a model folder, and load it without tracing, bit for bit.

A folder holds ``model.safetensors``, ``shapes.json`` (how the network differs from its architecture, see
:class:`regrow.store.shapes.Shapes`) and, for a transformers model, the other files of a transformers folder. Nothing in
it is a pickle, and no code that it names is run.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.core.axes import Example
from regrow.core.axes.axis import to_example
from regrow.core.errors import InputError
from regrow.core.limits import read_text
from regrow.nets import Loaded, ModelError, Origin, example_for, replace_attention
from regrow.nets.loaded import check_unchanged
from regrow.store import probe
from regrow.store.atomic import write_text
from regrow.store.building import Builder, build_checked, build_fresh, describe_network, describe_origin
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.portable import main_dtype, read_tokenizer, update_origin, write_pretrained, write_tokenizer
from regrow.store.replacing import WORK, link_tree, read_whole, replace_folder, settle
from regrow.store.run_record import versions
from regrow.store.shapes import DTYPES, SHAPES, ProbeRecord, Shapes, TensorKind
from regrow.store.state import all_tensors, named_tensors, restore
from regrow.store.tensors import dtype_name
from regrow.store.weights import OutsideTensors, check_file, describe_file, read_weights, require_file, write_weights

# Files that only some saved models have.
CARRIED = (
    "modeling_regrow.py",
    "reshape_regrow.py",
    "load_regrow.py",
    "network.json",
    "buffers.safetensors",
    probe.FILE,
)
# Name patterns of all files of a saved model; those after ``SHAPES`` only of one of transformers.
FILES = (
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", *CARRIED, SHAPES),
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model"),
)

_log = logging.getLogger("regrow")


def save(
    model: nn.Module | Loaded,
    folder: str | Path,
    *,
    origin: Origin | None = None,
    tokenizer: Any | None = None,
    dtype: torch.dtype | None = None,
    example: Any = None,
) -> Path:
    """Write a model folder atomically: it holds all of the new model, or is unchanged.

    Args:
        model: The network as it is now, or the result of :func:`regrow.nets.load`, whose model may have changed.
        folder: The folder; made if needed, other files in it stay. A model saved there before is replaced: at every
            moment the folder holds all of the old model or all of the new one.
        origin: How to build the architecture, if ``model`` does not say. Else loading needs it as ``model=``.
        tokenizer: The tokenizer to save, if ``model`` does not bring one.
        dtype: The dtype in which floating-point weights are stored; unchanged if ``None``.
        example: An input that is stored with the network's output for it, so that loading can check the output: a
            tensor, a tuple of inputs, a dict of inputs by name, or an ``Example``. By default the one of ``model``, or
            one that suits the architecture.

    Returns:
        The folder.

    Raises:
        InputError: If a file of its weights was changed since it was loaded.
        StoreError: If the model cannot be rebuilt from what would be written, a parameter holds NaN or infinity
            in the dtype it would be stored in (buffers may), the folder holds a model that regrow did not write, or the
            disk is full.
    """
    if not isinstance(model, nn.Module | Loaded):
        raise StoreError(f"got a {type(model).__name__} as the model; write save(model, folder)")
    folder = Path(folder)
    if (folder / "config.json").exists() and not (folder / SHAPES).exists():
        raise StoreError(f"{folder} holds a model that regrow did not write; choose another folder")
    if (folder / WORK).exists():
        raise StoreError(f"{folder} holds a run that is not finished; choose another folder")
    if (folder / "run.json").exists() and folder.name != WORK:
        raise StoreError(f"{folder} is the folder of a run, whose record would not fit; choose another folder")
    if example is not None:
        example = to_example(example, model.model if isinstance(model, Loaded) else model)
    with replace_folder(folder) as new:
        write_model(model, new, origin=origin, tokenizer=tokenizer, dtype=dtype, example=example)
        link_other_files(folder, new)
    return folder


def write_model(
    model: nn.Module | Loaded,
    folder: Path,
    *,
    origin: Origin | None = None,
    tokenizer: Any | None = None,
    dtype: torch.dtype | None = None,
    example: Example | None = None,
    outside: OutsideTensors | None = None,
) -> None:
    """Write the files of a model into a folder, made if missing, replacing those of another model.

    Each file is written atomically, but not all of them together; use :func:`save` for a finished folder. Arguments
    and errors are those of :func:`save`. ``outside``: where the tensors are read if ``model`` has no numbers, since the
    network is larger than memory.
    """
    net, loaded = (model.model, model) if isinstance(model, Loaded) else (model, None)
    if loaded is not None:
        origin, tokenizer = origin or loaded.origin, loaded.tokenizer if tokenizer is None else tokenizer
        example = loaded.example if example is None else example
    origin = origin or describe_origin(net)
    tokenizer = getattr(net, "tokenizer", None) if tokenizer is None else tokenizer
    origin = replace(origin, name=Path(origin.name).name)  # no paths of this machine
    if origin.kind == "transformers":
        origin = update_origin(origin, net, dtype or main_dtype(net))
    fresh = build_fresh(origin)
    if fresh is not None:
        fresh = replace_attention(fresh, dict(net.named_parameters(remove_duplicate=False)))
    shapes = describe_network(net, fresh, origin, dtype)
    with explain_os_errors(folder):
        folder.mkdir(exist_ok=True)  # not its parents: a run folder that was deleted does not come back
        for path in _model_files(folder):
            path.unlink()
    if outside is None:
        tensors = all_tensors(net)
        shapes = write_weights(((name, tensors[name]) for name in shapes.tensors), shapes, folder)
        record = _write_probe(net, shapes, example, folder)
    else:
        shapes = write_weights(outside.read(shapes), shapes, folder, ahead=outside.ahead)
        with outside.open_written(folder) as running:
            record = _write_probe(running, shapes, example, folder, outside.aligned)
    if not record.header:
        _log.warning("the output of the saved model is not recorded, so that load cannot check it: %s", record.reason)
    if origin.kind == "transformers":
        write_pretrained(net, shapes, folder)
    if hasattr(tokenizer, "save_pretrained"):
        write_tokenizer(tokenizer, folder)
    if loaded is not None:
        check_unchanged(loaded.files)
    write_text(folder / SHAPES, replace(shapes, probe=record, versions=versions()).to_json())


def link_other_files(old: Path, new: Path) -> None:
    """Hard-link, or else copy, all that is not part of a model from ``old`` to ``new``; files in ``new`` stay.

    ``old`` need not exist.
    """
    if old.is_dir():
        link_tree(old, new, skip={path.name for path in _model_files(old)})


def load(
    folder: str | Path,
    *,
    model: nn.Module | Builder | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    check: bool = True,
) -> nn.Module:
    """Load a saved network of any shape, without tracing it.

    Args:
        folder: A model folder or run folder that :func:`save` or a command wrote.
        model: The unchanged architecture, or a function that builds it: needed if that is your own code, since no code
            that a folder names is run. A network given here becomes the loaded one.
        device: The device to load to.
        dtype: The dtype of floating-point weights; as saved if ``None``.
        check: Compare the record and every tensor with their recorded digests, and the network's output for the
            recorded input with the recorded output: bit for bit with the same number of threads, dtype, torch and
            processor; otherwise they may differ by three times the network's own rounding error.

    Returns:
        The network in eval mode, with ``origin`` and, where there is one, ``tokenizer`` as attributes.

    Raises:
        StoreError: If the folder is not a saved model, its files are damaged, changed or do not fit one another, the
            architecture is another one, or the output differs; names the tensor that differs.
    """
    folder = Path(folder)
    return read_whole(folder, partial(_load, folder, model, device, dtype, check=check))


def _load(
    folder: Path,
    model: nn.Module | Builder | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
    *,
    check: bool,
) -> nn.Module:
    """Load a saved network as :func:`load` does; the folder may not be replaced by another meanwhile."""
    shapes = read_shapes(folder, check=check)
    net = build_checked(folder, shapes, model, dtype)
    tensors = read_weights(folder, shapes, check=check)
    transformers = shapes.origin.kind == "transformers"
    if dtype is not None and transformers:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and shapes.tensors[name].kind is not TensorKind.DERIVED:
                tensors[name] = tensor.to(dtype)
    restore(net, shapes, tensors)
    net.eval()
    if check and shapes.probe.header:
        check_file(require_file(folder, probe.FILE), shapes.probe)
        dtypes = {DTYPES[stored.dtype] for stored in shapes.tensors.values()}
        probe.check_probe(net, folder / probe.FILE, stored=dtypes, cast=transformers and dtype is not None)
    elif check:
        reason = shapes.probe.reason
        _log.warning("%s: the output of the model was not recorded, so that it is not checked: %s", folder, reason)
    net.to(device, None if transformers else dtype)
    origin = shapes.origin
    if origin.kind == "callable" and model is not None and not isinstance(model, nn.Module):
        origin = replace(origin, builder=model)  # so that this process can save the network again
    attach_origin(net, origin, read_tokenizer(folder) if transformers else None)
    return net


def attach_origin(net: nn.Module, origin: Origin, tokenizer: Any | None) -> None:
    """Set ``origin`` and, if there is one, ``tokenizer`` as attributes of a network, unless it has such attributes."""
    for name, value in (("origin", origin), ("tokenizer", tokenizer)):
        if value is not None and not hasattr(net, name):
            setattr(net, name, value)


def read_shapes(folder: str | Path, *, check: bool = True) -> Shapes:
    """Return the validated ``shapes.json`` of a folder, or raise StoreError; ``check`` compares its own digest, too."""
    folder = Path(folder)
    settle(folder)
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; give the folder of a saved model")
    if not (folder / SHAPES).exists():
        if (folder / WORK).is_dir():
            raise StoreError(f"{folder} holds a run that is not finished; run its command again to resume it")
        if (folder / "config.json").is_file():
            raise StoreError(
                f"{folder} is a transformers folder that regrow did not write (no {SHAPES}); "
                "open it with regrow.nets.load"
            )
        raise StoreError(f"{folder} holds no saved model (no {SHAPES}); give the folder of a finished run")
    path = require_file(folder, SHAPES)
    try:
        return Shapes.from_json(read_text(path), check=check)
    except (InputError, StoreError) as error:
        raise StoreError(f"{path}: {str(error).removeprefix(f'{path} ')}") from None


def _write_probe(
    net: nn.Module, shapes: Shapes, example: Example | None, folder: Path, aligned: bool | None = None
) -> ProbeRecord:
    """Write ``probe.st``, an input and the network's output for it; return its record, or one with the reason why not.

    ``shapes``: the record of the network, for the dtypes in which it is stored; ``example``: the input; ``None``: one
    that suits the architecture; ``aligned``: as for :func:`regrow.store.probe.write_probe`.
    """
    try:
        example = example or example_for(net, shapes.origin)
        if example is None:
            raise probe.UnprobedError("no example input is known")
        held = named_tensors(net)
        cast = any(
            dtype_name(held[name].tensor.dtype) != stored.dtype
            for name, stored in shapes.tensors.items()
            if name in held
        )
        probe.write_probe(net, example, folder / probe.FILE, cast=cast, aligned=aligned)
    except (probe.UnprobedError, ModelError) as error:
        return ProbeRecord(reason=f"{error}; give one that it takes: save(…, example=input)")
    file = describe_file(folder / probe.FILE)
    return ProbeRecord(file.bytes, file.header)


def _model_files(folder: Path) -> list[Path]:
    """Return the files of the model that was saved in a folder; none unless the folder has ``shapes.json``."""
    if not (folder / SHAPES).exists():
        return []
    try:
        is_plain = read_shapes(folder, check=False).origin.kind != "transformers"
    except StoreError:
        is_plain = False
    names = FILES[: FILES.index(SHAPES) + 1] if is_plain else FILES
    return [path for path in folder.iterdir() if any(path.match(name) for name in names) and path.is_file()]
