"""Load language models (and other transformers models): from a folder, the Hugging Face hub, or a GGUF file."""

import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from regrow.core.axes import Example
from regrow.core.errors import first_line, keep_interrupts
from regrow.nets.files import (
    check_config,
    check_regular_files,
    check_settings,
    check_tokenizer,
    check_weight_paths,
    check_weights,
    find_model_class,
    parsed_gguf,
)
from regrow.nets.loaded import PIXELS, Loaded, ModelError, Origin, image_example, missing_package, text_example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_TIMEOUT = 10.0  # seconds
Emptier = Callable[[nn.Parameter], nn.Parameter]  # returns a parameter of its shape, dtype and device without numbers
ATTENTION_LAYERS = tuple(f"self_attn.{name}_proj" for name in "qkvo")  # linear layers of a Llama-like decoder layer
MLP_LAYERS = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))


@dataclass(frozen=True)
class _Location:
    """Where transformers reads a model from, and what the user calls it."""

    where: str  # a folder, or a name on the hub
    name: str  # what the user calls it, for messages
    options: Mapping[str, str | bool] = field(default_factory=dict)  # of transformers: gguf_file, local_files_only


def load_folder(folder: Path, *, name: str, dtype: torch.dtype | None) -> Loaded:
    """Load model and tokenizer from a transformers folder with safetensors; ``dtype`` ``None``: as stored."""
    check_weights(_check_folder(folder, name), name, None if dtype is None else dtype.itemsize)
    return _load(_Location(str(folder), name), dtype)


def load_hub(name: str, *, dtype: torch.dtype | None) -> Loaded:
    """Load a model by its id on the Hugging Face hub, or from the local cache, without network, if it is there."""
    require_transformers()
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not cached:  # one quick question first: transformers alone would retry for half a minute without a network
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT)
        except Exception as error:
            problem = f"{name!r} is no folder here, and the hub does not give it ({first_line(error)})"
            remedy = "check the name and the network, or give the folder of a downloaded model"
            raise ModelError(f"{problem}; {remedy}") from None
    return _load(_Location(name, name, {"local_files_only": cached}), dtype)


def load_gguf(path: Path, *, name: str, dtype: torch.dtype | None) -> Loaded:
    """Load a model from a GGUF file, with quantised weights converted to dense ones; ``dtype`` ``None``: float32."""
    for package in ("gguf", "accelerate"):
        _require(package)
    with tempfile.TemporaryDirectory(prefix="regrow-") as folder, parsed_gguf(path, name) as sizes:
        # transformers takes a folder, and would read configurations and tokenizers that happen to lie beside the file.
        (Path(folder) / "model.gguf").symlink_to(path.resolve())
        loaded = _load(_Location(folder, name, {"gguf_file": "model.gguf"}), dtype or torch.float32)
    model = cast("PreTrainedModel", loaded.model)
    _check_surplus(sizes, model, name)
    if hasattr(model.config, "quantization_config"):  # save_pretrained refuses a model that calls itself quantised
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    note = f"{path.name}: quantised weights, turned into dense {str(model.dtype).removeprefix('torch.')}"
    return replace(loaded, origin=origin_of(model, name), notes=(note, *loaded.notes))


def origin_of(model: "PreTrainedModel", name: str) -> Origin:
    """Return the origin of a transformers model, without paths and without entries that name code."""
    left_out = ("_name_or_path", "quantization_config", "auto_map", "custom_pipelines")

    def filtered(config: dict[str, object]) -> dict[str, object]:
        return {k: filtered(v) if isinstance(v, dict) else v for k, v in config.items() if k not in left_out}

    config = parse_configuration(model.config.to_json_string(use_diff=False))
    return Origin("transformers", type(model).__name__, filtered(config), name)


def parse_configuration(text: str) -> dict[str, object]:
    """Return a transformers configuration from JSON text, where ``{"__float__": "Infinity"}`` means infinity."""
    return json.loads(text, object_hook=lambda part: float(part["__float__"]) if part.keys() == {"__float__"} else part)


def build_transformers(origin: Origin) -> nn.Module:
    """Build a transformers architecture on the CPU, or raise ModelError; parameters are *not* initialised."""
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    architecture, settings = find_model_class(origin.reference), dict(origin.config)
    if architecture is None:
        raise ModelError(f"transformers {transformers.__version__} has no model class {origin.reference!r}")
    check_settings(settings)
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        with keep_interrupts(), quiet(), no_init_weights():
            model = cast(Any, architecture)._from_config(config)
    except Exception as error:
        raise ModelError(f"cannot build {origin.reference} from its configuration: {first_line(error)}") from None
    model.tie_weights()  # which initialisation would do
    return model.eval()


def require_transformers() -> ModuleType:
    """Return the transformers package, or raise ModelError if it is not installed."""
    return _require("transformers")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, warnings and log lines of transformers in the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One bar (the de-quantising of GGUF) obeys no setting, so what is written to stderr is dropped as well.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load(location: _Location, dtype: torch.dtype | None) -> Loaded:
    """Load a model with transformers; ModelError unless weights and configuration fit; ``dtype`` None: as stored."""
    require_transformers()
    try:
        with quiet():
            model, info = _class_for(location).from_pretrained(
                location.where,
                dtype=dtype or "auto",
                use_safetensors=None if "gguf_file" in location.options else True,
                trust_remote_code=False,
                output_loading_info=True,
                **location.options,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {location.name}: {_explain_load_error(error)}") from None
    if unmatched := [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"])]:
        problem = f"{len(unmatched)} tensors are in the weights or in config.json alone, {unmatched[0]!r} first"
        raise ModelError(f"{location.name}: {problem}; download both again")
    return _to_loaded(model, location)


def _to_loaded(model: "PreTrainedModel", location: _Location) -> Loaded:
    """Return a model with its tokenizer, an example input and its origin, in eval mode."""
    tokenizer = _read_tokenizer(location) if model.main_input_name == "input_ids" else None
    return Loaded(model.eval(), tokenizer, example_of_transformers(model), origin_of(model, location.name))


def _class_for(location: _Location) -> Any:
    """Return the transformers class that config.json names, else ``AutoModelForCausalLM``; ModelError if unsafe."""
    transformers = require_transformers()
    settings, _ = transformers.PretrainedConfig.get_config_dict(location.where, **location.options)
    try:
        check_settings(settings, automatic=True)
    except ModelError as error:
        raise ModelError(f"{location.name}: config.json: {error}") from None
    config = transformers.AutoConfig.from_pretrained(location.where, trust_remote_code=False, **location.options)
    names = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    return next(filter(None, map(find_model_class, names)), transformers.AutoModelForCausalLM)


def _read_tokenizer(location: _Location) -> Any | None:
    """Return the tokenizer of a transformers model, or ``None`` if it has none that can be read."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        with quiet():
            if "gguf_file" not in location.options:
                check_tokenizer(get_tokenizer_config(location.where, **location.options))
            return AutoTokenizer.from_pretrained(location.where, trust_remote_code=False, **location.options)
    except Exception:  # a model without a tokenizer still has a shape to change; whoever needs text asks for one
        return None


def example_of_transformers(model: "PreTrainedModel") -> Example:
    """Return an input of the form that a transformers model takes: a row of tokens, or an image of its size."""
    if model.main_input_name == "input_ids":
        return text_example(model, model.config.get_text_config().vocab_size)
    size = getattr(model.config, "image_size", PIXELS)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return image_example(model, getattr(model.config, "num_channels", 3), height, width)


def _check_folder(folder: Path, name: str) -> list[Path]:
    """Return the weight files of a transformers folder; raise ModelError unless it is complete and names no code."""
    if not (folder / "config.json").exists():
        problem = "not a model folder (it has no config.json); give a transformers folder, or finish the run"
        raise ModelError(f"{name}: {problem}")
    check_regular_files(folder)
    check_weight_paths(folder, check_config(folder / "config.json", name), name)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{name}: holds an adapter of peft beside the model; merge it first (merge_and_unload)")
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        code = f"AutoModelForCausalLM as A; A.from_pretrained('{name}').save_pretrained('{name}-safe')"
        remedy = f'convert it once: python -c "from transformers import {code}"'
        raise ModelError(f"{name}: its weights are a pickle, which could run code; {remedy}")
    if not files:
        raise ModelError(f"{name}: the folder has no .safetensors weights; download the model again")
    return files


def _check_surplus(sizes: Mapping[str, int], model: "PreTrainedModel", name: str) -> None:
    """Raise ModelError if a GGUF file holds weights (``sizes``: tensor → entries) that transformers leaves out."""
    embeddings = cast(Any, model.get_output_embeddings())
    tied = embeddings is not None and embeddings.weight is cast(Any, model.get_input_embeddings()).weight
    surplus = ("rope_freqs", "rope_factors", *(("output.weight",) if tied else ()))  # no parameters of the model
    in_file = sum(size for tensor, size in sizes.items() if not tensor.startswith(surplus))
    in_model = sum(parameter.numel() for parameter in model.parameters())
    if in_file > in_model:
        problem = f"the file holds {in_file:,} weights, of which its metadata describe {in_model:,}"
        raise ModelError(f"{name}: {problem}; it is damaged or of another version: download it again")


def _explain_load_error(error: Exception) -> str:
    """Return why transformers cannot load a model, and the remedy."""
    text = str(error)
    if "trust_remote_code" in text:
        remedy = "what regrow wrote opens with its shapes.json; else name your function that builds it: pkg.mod:fn"
        return f"it brings its own Python code, which is not run; {remedy}"
    if "`deci`" in text:
        return "a GGUF file of layers of several widths is for llama.cpp alone; name the run that it was made of"
    if "mismatch" in text:
        return "its weights have other shapes than config.json says; a folder made by regrow opens with regrow.load"
    return f"{' '.join(str(error).split())[:200]}; its files are damaged or do not belong together: download them again"


def _require(package: str) -> ModuleType:
    """Return an imported package that the extra ``llm`` installs, or raise ModelError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise missing_package("llm", package) from None


def load_skeleton(folder: Path, *, name: str, dtype: torch.dtype | None, stored: torch.dtype, empty: Emptier) -> Loaded:
    """Build the model of a transformers folder without its weights: ``empty`` replaces each parameter as it is made.

    ``dtype``: of the parameters; ``None``: that which config.json names, or else ``stored``, that of the weight files.
    ``name``: the model's, in messages. Raises ModelError.
    """
    _check_folder(folder, name)
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    location = _Location(str(folder), name)
    try:
        with quiet():
            architecture = _class_for(location)
            config = transformers.AutoConfig.from_pretrained(location.where, trust_remote_code=False)
            recorded = getattr(config, "dtype", None)
            recorded = getattr(torch, recorded) if isinstance(recorded, str) else recorded
            chosen = dtype or recorded or stored
            with no_init_weights(), replacing_parameters(empty):
                model = architecture._from_config(config, dtype=chosen)
            model.tie_weights()
            if model.can_generate():
                with suppress(OSError):  # it has none
                    model.generation_config = transformers.GenerationConfig.from_pretrained(location.where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot build {name} without its weights: {first_line(error)}; prune it in memory") from None
    keeps_float32 = any(getattr(model, key, None) for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    if chosen in (torch.float16, torch.bfloat16) and keeps_float32:
        raise ModelError(f"{name} keeps some weights in float32, which is not read block by block; prune it in memory")
    return _to_loaded(model, location)


@contextmanager
def replacing_parameters(empty: Emptier) -> Iterator[None]:
    """Context manager in which ``empty`` replaces each parameter that a module of this thread registers."""
    thread = get_ident()  # the hook acts in all threads: parameters of others are left as they are

    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return empty(parameter) if get_ident() == thread else parameter

    # What the hook returns takes the parameter's place, though its stub says that hooks return nothing.
    handle = register_module_parameter_registration_hook(replace)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class DecoderLayer:
    """The sizes and linear layers of one layer of a Llama-like decoder."""

    module: nn.Module
    heads: int  # query heads; 0 if the attention was dropped
    kv_heads: int  # key-value heads
    head_dim: int  # channels per head
    width: int  # hidden neurons of the MLP; 0 if it was dropped
    linear: Mapping[str, nn.Linear]  # path within the layer → linear layer, for those that exist


def decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Return the layers of a Llama-like decoder (separate q, k, v layers, gated MLP), of any width; else ModelError."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ModelError(f"{type(model).__name__} is no Llama-like decoder: it has no model.layers")
    return [_read_layer(layer, f"{type(model).__name__}, layer {i}") for i, layer in enumerate(layers)]


def _read_layer(layer: nn.Module, name: str) -> DecoderLayer:
    """Return a decoder layer's sizes and linear layers; ModelError, with ``name``, if attention or MLP lack some."""
    modules = dict(layer.named_modules())
    paths = (*ATTENTION_LAYERS, *MLP_LAYERS)
    linear = {path: module for path in paths if isinstance(module := modules.get(path), nn.Linear)}
    for parts in (ATTENTION_LAYERS, MLP_LAYERS):
        present = [path for path in parts if path in linear]
        missing = [path for path in parts if path not in linear]
        if present and missing:  # a part that was dropped whole is fine
            raise ModelError(f"{name} is no Llama-like one: it has {present[0]} and no {missing[0]}")
    head_dim = int(getattr(modules.get("self_attn"), "head_dim", 0))
    heads, kv_heads = (linear[path].out_features // head_dim if path in linear else 0 for path in ATTENTION_LAYERS[:2])
    width = linear[MLP_LAYERS[0]].out_features if MLP_LAYERS[0] in linear else 0
    return DecoderLayer(layer, heads, kv_heads, head_dim, width, linear)
