"""Export to transformers: a folder that ``from_pretrained`` loads where regrow is not installed.

If all layers have the same sizes, it becomes a plain model of its family: other numbers in ``config.json``, no code.
Otherwise the folder contains a small modelling file that builds the recorded widths (``trust_remote_code=True``).
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from regrow import store
from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.progress import Progress, silent
from regrow.exporters.staging import staging_folder
from regrow.exporters.written import CheckError, ExportError, Written
from regrow.nets import ModelError, Origin, build
from regrow.nets.blocks import ATTENTION, MLP, DecoderLayer, blocks
from regrow.nets.examples import guessed_example, written_shape
from regrow.nets.language import example_of_transformers, origin_of, quiet, require_transformers
from regrow.store import portable
from regrow.store.pretrained import update_origin
from regrow.store.shapes import Number
from regrow.store.state import find_numbers, named_tensors

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = 1e-4
"""The allowed output difference, relative to the largest output: memory layout can change rounding."""
BIASES = {"attention_bias": ATTENTION, "mlp_bias": MLP}
"""Settings of config.json that add a bias to every linear layer of a kind; missing biases become zeros."""


def write(
    model: nn.Module, out: Path, *, dtype: str = "", example: Example | None = None, progress: Progress = silent
) -> Written:
    """Write a folder for ``from_pretrained``, load it with transformers alone, and compare the outputs.

    Args:
        model: A transformers network, pruned or widened in any way.
        out: The folder: new, empty, or of an earlier export.
        dtype: The dtype in which weights are stored; unchanged if empty.
        example: An input for the comparison; ``None``: one that suits the network.
        progress: Called with (steps done, steps in all, description).

    Returns:
        What was written; ``checked`` compares the outputs of the loaded network with those of ``model``.

    Raises:
        ExportError: If transformers could not build the network, or the outputs differ.
        StoreError: If the disk is full, or the folder holds other files.
    """
    origin = getattr(model, "origin", None)
    origin = origin if isinstance(origin, Origin) else origin_of(model, type(model).__name__)
    if origin.kind != "transformers":
        raise ExportError(f"{origin.name or 'the network'} is no transformers model; export it to onnx or torchvision")
    if dtype and dtype not in DTYPES:
        raise ExportError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    stored = DTYPES[dtype] if dtype else None
    origin = update_origin(origin, model, next(model.parameters()).dtype)
    with staging_folder(out) as made:
        progress(0, 2, "writing the folder")
        same = plain(model, origin)
        if same is None:
            store.write_model(model, made, origin=origin, dtype=stored)
        else:
            store.write_model(same, made, tokenizer=getattr(model, "tokenizer", None), dtype=stored)
        carried = (made / "modeling_regrow.py").is_file()
        if not carried and portable.is_changed(store.read_shapes(made)):
            raise ExportError(
                f"transformers cannot build this {origin.reference} from what it records; export it to onnx"
            )
        progress(1, 2, "loading it with transformers")
        checked = check(model, made, stored, example, carried=carried)
        progress(2, 2, "loading it with transformers")
    note = (
        "no settings of its family give these widths: load it with trust_remote_code=True"
        if carried
        else "an ordinary model of its family: any tool that loads the family loads it, no code needed"
    )
    return Written(out, sum(path.stat().st_size for path in out.iterdir() if path.is_file()), checked, (note,))


def plain(model: nn.Module, origin: Origin) -> nn.Module | None:
    """Return the network as a plain model of its family with other settings, or ``None`` if no settings fit.

    The network built from those settings is compared with ``model``, tensor by tensor.

    Args:
        model: The network.
        origin: How its architecture is built.
    """
    try:
        settings = _settings(model, blocks(model), origin)
    except ModelError:
        settings = _hidden_settings(model, origin)
    if settings is None:
        return None
    try:
        whole, fresh = build(origin), build(replace(origin, config=settings))
    except ModelError:
        return None
    now, made = named_tensors(model), named_tensors(fresh)
    if now.keys() - made.keys() or not _alike(find_numbers(model), find_numbers(fresh), find_numbers(whole)):
        return None
    zeros = {name for name in made.keys() - now.keys() if name.endswith("_proj.bias")}
    if made.keys() - now.keys() != zeros or any(now[name].tensor.shape != made[name].tensor.shape for name in now):
        return None
    for name, here in now.items():
        there = made[name].tensor
        if here.kind == "derived" and not torch.equal(here.tensor.to(there), there):
            return None
    state = {
        name: now[name].tensor if name in now else torch.zeros_like(made[name].tensor) for name in fresh.state_dict()
    }
    fresh.load_state_dict(state, strict=True)
    fresh.to(next(model.parameters()).dtype).eval()
    setattr(fresh, "origin", replace(origin, config=settings))  # noqa: B010
    fresh.generation_config = getattr(model, "generation_config", None)  # type: ignore[assignment]
    return fresh


def _alike(now: Mapping[str, Number], made: Mapping[str, Number], before: Mapping[str, Number]) -> bool:
    """Whether the numbers in modules agree, except for sizes that no cut had to change, which are not read."""
    read = [place for place, number in now.items() if isinstance(number, float) or number != before.get(place)]
    return all(made.get(place) == now[place] for place in read)


def _settings(model: Any, found: Iterable[DecoderLayer], origin: Origin) -> dict[str, Any] | None:
    widths = {(block.heads, block.kv_heads, block.head_dim, block.width) for block in found}
    if len(widths) != 1 or 0 in (only := widths.pop()):
        return None
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    settings = {**origin.config, **dict(zip(names, only, strict=True))}
    settings["hidden_size"] = model.get_input_embeddings().weight.shape[1]
    if "rms_norm_eps" in settings:  # a narrower residual stream has another one
        settings["rms_norm_eps"] = getattr(model.model.norm, "variance_epsilon", settings["rms_norm_eps"])
    for setting, parts in BIASES.items():
        if setting in settings and any(  # families without the setting have the biases that they have
            part in parts and layer.bias is not None for block in found for part, layer in block.linear.items()
        ):
            settings[setting] = True
    return settings


def _hidden_settings(model: nn.Module, origin: Origin) -> dict[str, Any] | None:
    """Return the settings of a GPT-2-like network with its width of the hidden layers; ``None`` if they differ."""
    widths = {len(here.tensor) for name, here in named_tensors(model).items() if name.endswith("mlp.c_fc.bias")}
    if len(widths) != 1 or "n_inner" not in origin.config:
        return None
    return {**origin.config, "n_inner": widths.pop()}


def check(
    model: nn.Module, folder: Path, dtype: torch.dtype | None, example: Example | None = None, *, carried: bool
) -> dict[str, float | int | str]:
    """Load the folder with transformers' Auto class and compare its outputs with those of the network.

    Args:
        model: The network.
        folder: The folder that was written.
        dtype: The dtype in which weights were stored, if it was changed.
        example: An input; ``None``: one that suits the network.
        carried: Whether the folder contains code of this export, which is run; no other code is.

    Raises:
        ExportError: If they differ by more than the rounding of the stored dtype.
    """
    transformers = require_transformers()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    whole = f"modeling_regrow.{config['architectures'][0]}"
    automatic = next(name for name, one in config["auto_map"].items() if one == whole) if carried else ""
    maker = getattr(transformers, automatic or config["architectures"][0])
    more = {"trust_remote_code": True} if automatic else {}
    with quiet():
        again = maker.from_pretrained(str(folder), local_files_only=True, **more).eval()
        again.set_attn_implementation(getattr(model.config, "_attn_implementation", "sdpa"))
    example = example or guessed_example(model) or example_of_transformers(cast(Any, model))
    said, says = (_answers(one, example) for one in (model, again))
    difference = max((float((a - b).abs().max()) for a, b in zip(said, says, strict=True) if a.numel()), default=0.0)
    size = max((float(a.abs().max()) for a in said if a.numel()), default=0.0)
    if difference > (ROUNDING if dtype in (None, next(model.parameters()).dtype) else 0.2) * size:
        raise CheckError(f"{folder}: what transformers loads answers otherwise, by {difference:.3g}; please report it")
    return {"max_abs_diff": difference, "loaded_as": type(again).__name__}


@torch.no_grad()
def _answers(model: nn.Module, example: Example) -> list[torch.Tensor]:
    try:
        leaves = tree_leaves(model(*example.args, **example.kwargs))
    except Exception as error:
        what = f"{type(model).__name__} does not take an input of {written_shape(example)} ({first_line(error)})"
        raise ExportError(f"{what}, so that the export is not compared; give an input that it takes") from None
    return [leaf.float() for leaf in leaves if isinstance(leaf, torch.Tensor)]
