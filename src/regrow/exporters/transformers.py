"""Export to transformers: a folder that ``from_pretrained`` loads where regrow is not installed.

If all layers have the same sizes, it becomes a plain model of its family: other numbers in ``config.json``, no code.
Otherwise the folder contains a small modelling file that builds the recorded widths (``trust_remote_code=True``).
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from regrow import store
from regrow.core.axes import Example
from regrow.core.progress import Progress
from regrow.exporters import ROUNDING, ExportError, ExportResult, compare_outputs, export_folder, folder_bytes
from regrow.nets import ModelError, Origin, build
from regrow.nets.language import (
    ATTENTION_LAYERS,
    MLP_LAYERS,
    DecoderLayer,
    decoder_layers,
    example_of_transformers,
    origin_of,
    quiet,
    require_transformers,
)
from regrow.nets.loaded import guess_example
from regrow.store import portable
from regrow.store.portable import update_origin
from regrow.store.run_folder import WritePage
from regrow.store.state import find_numbers, named_tensors
from regrow.tracing.stacks import remove_dropped

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Settings of config.json that add a bias to every linear layer of a part; missing biases become zeros.
BIASES = {"attention_bias": ATTENTION_LAYERS, "mlp_bias": MLP_LAYERS}
CONVERSION = 0.2  # the allowed output difference, relative to the largest output, if the dtype of weights changes


def write(
    model: nn.Module, out: Path, *, card: WritePage, dtype: str = "", example: Example | None = None, progress: Progress
) -> ExportResult:
    """Write a folder for ``from_pretrained``, load it with transformers alone, and compare outputs on the example.

    ``out``, ``card``: as for :func:`export_folder`; ``dtype``: of the weights, a key of ``DTYPES``; empty: as they are;
    ``example``: ``None``: one that suits the model. Raises ExportError if transformers cannot build
    the network, CheckError if outputs differ; ``out`` then stays as it was.
    """
    origin = getattr(model, "origin", None)
    origin = origin if isinstance(origin, Origin) else origin_of(model, type(model).__name__)
    if origin.kind != "transformers":
        raise ExportError(f"{origin.name or 'the network'} is no transformers model; export it to onnx or torchvision")
    stored, present = DTYPES.get(dtype), next(model.parameters()).dtype
    fewer = remove_dropped(model)
    origin = update_origin(origin, fewer, present)
    with export_folder(out, card) as folder:
        progress(0, 2, "writing the folder")
        plain = build_plain(fewer, origin)
        if plain is None:
            store.write_model(fewer, folder, origin=origin, dtype=stored)
        else:
            store.write_model(plain, folder, tokenizer=getattr(model, "tokenizer", None), dtype=stored)
        has_code = (folder / "modeling_regrow.py").is_file()
        if not has_code and portable.is_changed(store.read_shapes(folder)):
            problem = f"transformers cannot build this {origin.reference} from what it records"
            raise ExportError(f"{problem}; export it to onnx")
        progress(1, 2, "loading it with transformers")
        loaded = _load(folder, has_code, getattr(cast(Any, model).config, "_attn_implementation", "sdpa"))
        example = example or guess_example(model) or example_of_transformers(cast(Any, model))
        tolerance = ROUNDING if stored in (None, present) else CONVERSION
        difference = compare_outputs(model, loaded, example, f"{folder}: what transformers loads", tolerance)
        progress(2, 2, "loading it with transformers")
    note = "an ordinary model of its family: any tool that loads the family loads it, no code needed"
    if has_code:
        note = "no settings of its family give these widths: load it with trust_remote_code=True"
    notes = (note, *_serving_notes(fewer, out, has_code))
    loaded_as = type(loaded).__name__
    return ExportResult(out, folder_bytes(out), {"max_abs_diff": difference, "loaded_as": loaded_as}, notes)


def _serving_notes(model: nn.Module, out: Path, has_code: bool) -> list[str]:
    """Return how vLLM serves an exported Llama-like decoder, or why it does not; nothing for other networks."""
    try:
        layers = decoder_layers(model)
    except ModelError:
        return []
    if has_code and (without := [str(i) for i, layer in enumerate(layers) if not layer.heads]):
        return [f"vLLM refuses a layer without attention ({', '.join(without)}); serve it as GGUF or with transformers"]
    options = " --model-impl transformers --trust-remote-code" * has_code
    return [f"serve it: python -m vllm.entrypoints.openai.api_server --model {shlex.quote(str(out))}{options}"]


def build_plain(model: nn.Module, origin: Origin) -> nn.Module | None:
    """Return a copy of the network as a plain model of its family with other settings; ``None`` if no settings fit.

    ``origin``: how to build the unchanged family. The network built from the settings is compared with ``model`` by the
    names and shapes of tensors and by its numbers, and gets the weights; biases that it has in addition become zeros.
    """
    try:
        settings = _family_settings(model, decoder_layers(model), origin)
        if settings is None:
            return None
        original, fresh = build(origin), build(replace(origin, config=settings))
    except ModelError:
        return None
    if not _numbers_agree(fresh, model, original):
        return None
    tensors, fresh_tensors = named_tensors(model), named_tensors(fresh)
    missing = fresh_tensors.keys() - tensors.keys()
    if tensors.keys() - fresh_tensors.keys() or not all(name.endswith("_proj.bias") for name in missing):
        return None
    for name, ours in tensors.items():
        theirs = fresh_tensors[name].tensor
        differs = ours.kind == "derived" and not torch.equal(ours.tensor.to(theirs), theirs)
        if ours.tensor.shape != theirs.shape or differs:
            return None
    state = {
        name: torch.zeros_like(fresh_tensors[name].tensor) if name in missing else tensors[name].tensor
        for name in fresh.state_dict()
    }
    fresh.load_state_dict(state, strict=True)
    fresh.to(next(model.parameters()).dtype).eval()
    setattr(fresh, "origin", replace(origin, config=settings))  # noqa: B010
    fresh.generation_config = getattr(model, "generation_config", None)  # type: ignore[assignment]
    return fresh


def _numbers_agree(fresh: nn.Module, model: nn.Module, original: nn.Module) -> bool:
    """Whether attributes of ``fresh`` have the numbers of ``model``; integers as in ``original`` are not compared."""
    fresh_numbers, before = find_numbers(fresh), find_numbers(original)
    return all(
        fresh_numbers.get(path) == number
        for path, number in find_numbers(model).items()
        if isinstance(number, float) or number != before.get(path)
    )


def _family_settings(model: Any, layers: Iterable[DecoderLayer], origin: Origin) -> dict[str, Any] | None:
    """Return ``origin.config`` with the network's widths; ``None`` if layers differ in them or lack a part."""
    widths = {(layer.heads, layer.kv_heads, layer.head_dim, layer.width) for layer in layers}
    common = next(iter(widths), ())
    if len(widths) != 1 or 0 in common:
        return None
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    settings = {**origin.config, **dict(zip(names, common, strict=True))}
    settings["hidden_size"] = model.get_input_embeddings().weight.shape[1]
    if "rms_norm_eps" in settings:  # a narrower residual stream has another one
        settings["rms_norm_eps"] = getattr(model.model.norm, "variance_epsilon", settings["rms_norm_eps"])
    biased = {part for layer in layers for part, linear in layer.linear.items() if linear.bias is not None}
    for setting, parts in BIASES.items():
        if setting in settings and biased & {*parts}:  # families without the setting have the biases that they have
            settings[setting] = True
    return settings


def _load(folder: Path, has_code: bool, attention: str) -> Any:
    """Return the network in a folder as transformers' Auto class loads it, in eval mode.

    ``has_code``: the folder has code of this export, which is run; ``attention``: the attention implementation to use.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    if has_code:
        name = next(auto for auto, code in config["auto_map"].items() if code == f"modeling_regrow.{name}")
    auto = getattr(require_transformers(), name)
    with quiet():
        model = auto.from_pretrained(str(folder), local_files_only=True, trust_remote_code=has_code)
        model.eval().set_attn_implementation(attention)
    return model
