"""Load language models (and other transformers models): from a folder, the Hugging Face hub, or a GGUF file."""

import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from pathlib import Path
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.nets.examples import PIXELS, image_example, text_example
from regrow.nets.files import (
    check_config,
    check_files,
    check_gguf,
    check_settings,
    check_tokenizer,
    check_weight_names,
    check_weights,
    model_class,
)
from regrow.nets.loaded import Loaded, ModelError, Origin, needs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_TIMEOUT = 10.0
Empty = Callable[[nn.Parameter], nn.Parameter]
"""Function of a parameter, that returns one of its shape, dtype and device without numbers."""


def load_folder(folder: Path, *, name: str, dtype: torch.dtype | None) -> Loaded:
    """Load a model and its tokenizer from a transformers folder with safetensors weights."""
    _check_folder(folder, name, dtype)
    return _load(str(folder), name=name, dtype=dtype)


def load_hub(name: str, *, dtype: torch.dtype | None) -> Loaded:
    """Load a model from the Hugging Face hub; from its local cache without network access if it is there."""
    require_transformers()
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    if not cached:
        # One quick question first: transformers alone would retry for half a minute without a network.
        try:
            HfApi().model_info(name, timeout=HUB_TIMEOUT)
        except Exception as error:
            raise ModelError(
                f"{name!r} is no folder here, and the hub does not give it ({first_line(error)}); "
                "check the name and the network, or give the folder of a downloaded model"
            ) from None
    return _load(name, name=name, dtype=dtype, local_files_only=cached)


def load_gguf(path: Path, *, name: str, dtype: torch.dtype | None) -> Loaded:
    """Load a model from a GGUF file, with its quantised weights converted to dense ones."""
    check_gguf(path, name)
    for package in ("gguf", "accelerate"):
        _require(package)
    with tempfile.TemporaryDirectory(prefix="regrow-") as alone:
        # transformers takes a folder, and would read configurations and tokenizers that happen to lie beside the file.
        (Path(alone) / "model.gguf").symlink_to(path.resolve())
        loaded = _load(alone, name=name, dtype=dtype or torch.float32, gguf_file="model.gguf")
    model: Any = loaded.model
    _check_surplus(path, model, name)
    # save_pretrained refuses a model that still calls itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    note = f"{path.name}: quantised weights, turned into dense {str(model.dtype).removeprefix('torch.')}"
    return replace(loaded, origin=origin_of(model, name), notes=(note, *loaded.notes))


def origin_of(model: "PreTrainedModel", name: str) -> Origin:
    """Return the origin of a transformers model: how to build its architecture again."""
    config = parse_configuration(model.config.to_json_string(use_diff=False))
    return Origin("transformers", type(model).__name__, _plain(config), name)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """Return a configuration, nested ones included, without paths and without entries that name code."""
    away = ("_name_or_path", "quantization_config", "auto_map", "custom_pipelines")
    return {k: _plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in away}


def parse_configuration(text: str) -> dict[str, object]:
    """Parse a transformers configuration from JSON text, which writes infinity as ``{"__float__": "Infinity"}``."""
    return json.loads(text, object_hook=lambda part: float(part["__float__"]) if part.keys() == {"__float__"} else part)


def build_transformers(origin: Origin) -> nn.Module:
    """Build a transformers architecture on the CPU; parameters are *not* initialised, buffers are right."""
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    architecture = model_class(origin.reference)
    if architecture is None:
        raise ModelError(f"transformers {transformers.__version__} has no model class {origin.reference!r}")
    settings, make = dict(origin.config), cast(Any, architecture)
    check_settings(settings)
    try:
        config = transformers.AutoConfig.for_model(settings.pop("model_type", ""), **settings)
        with quiet(), no_init_weights():
            model = make._from_config(config)
    except Exception as error:
        raise ModelError(f"cannot build {origin.reference} from its configuration: {first_line(error)}") from None
    # no_init_weights also skips the tying that initialisation would do.
    model.tie_weights()
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


def _load(where: str, *, name: str, dtype: torch.dtype | None, **files: Any) -> Loaded:
    require_transformers()
    try:
        with quiet():
            auto = _class_for(where, name, files)
            model, info = auto.from_pretrained(
                where,
                dtype=dtype or "auto",
                use_safetensors=None if "gguf_file" in files else True,
                trust_remote_code=False,
                output_loading_info=True,
                **files,
            )
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {name}: {_explained(error)}") from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{name}: the weights lack {len(missing)} parameters, {missing[0]!r} first; "
            "the file is incomplete or belongs to another configuration: download it again"
        )
    if unexpected := sorted(info["unexpected_keys"]):
        raise ModelError(
            f"{name}: the weights hold {len(unexpected)} tensors that config.json does not describe, "
            f"{unexpected[0]!r} first; the configuration belongs to another model: download both again"
        )
    return _complete(model, where, name, files)


def _complete(model: "PreTrainedModel", where: str, name: str, files: dict[str, Any]) -> Loaded:
    tokenizer = _read_tokenizer(where, files) if is_text(model) else None
    return Loaded(model.eval(), tokenizer, example_of_transformers(model), origin_of(model, name))


def _class_for(where: str, name: str, files: dict[str, Any]) -> Any:
    """Return the transformers class that the configuration of a model names."""
    transformers = require_transformers()
    settings, _ = transformers.PretrainedConfig.get_config_dict(where, **files)
    try:
        check_settings(settings, automatic=True)
    except ModelError as error:
        raise ModelError(f"{name}: config.json: {error}") from None
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **files)
    names = [name for name in getattr(config, "architectures", None) or () if isinstance(name, str)]
    known = filter(None, map(model_class, names))
    return next(known, transformers.AutoModelForCausalLM)


def _read_tokenizer(where: str, files: dict[str, Any]) -> Any | None:
    """Return the tokenizer of a transformers model, or ``None`` if it has none that can be read."""
    transformers = require_transformers()
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        with quiet():
            if "gguf_file" not in files:
                check_tokenizer(get_tokenizer_config(where, **files))
            return transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=False, **files)
    except Exception:
        # A model without a tokenizer still has a shape to change; whoever needs text will ask for one.
        return None


def is_text(model: "PreTrainedModel") -> bool:
    """Whether a transformers model takes text."""
    return model.main_input_name == "input_ids"


def example_of_transformers(model: "PreTrainedModel") -> Example:
    """Return an input of the form that a transformers model takes: tokens or an image."""
    if is_text(model):
        return text_example(model, model.config.get_text_config().vocab_size)
    size = getattr(model.config, "image_size", PIXELS)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return image_example(model, getattr(model.config, "num_channels", 3), height, width)


def _check_folder(folder: Path, name: str, dtype: torch.dtype | None, *, whole: bool = True) -> None:
    """Raise an error unless a folder holds the complete files of a transformers model."""
    if not (folder / "config.json").exists():
        raise ModelError(f"{name}: not a model folder (it has no config.json); give a transformers folder")
    check_files(folder)
    check_weight_names(folder, check_config(folder / "config.json", name), name)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{name}: holds an adapter of peft beside the model; merge it first (merge_and_unload)")
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        raise ModelError(
            f"{name}: its weights are a pickle, which could run code; convert it once: python -c "
            f'"from transformers import AutoModelForCausalLM as A; '
            f"A.from_pretrained('{name}').save_pretrained('{name}-safe')\""
        )
    if not files:
        raise ModelError(f"{name}: the folder has no .safetensors weights; download the model again")
    if whole:
        check_weights(files, name, None if dtype is None else dtype.itemsize)


def _check_surplus(path: Path, model: nn.Module, name: str) -> None:
    """Raise ModelError if a GGUF file holds weights that its metadata do not describe.

    Transformers would leave them out silently.
    """
    import gguf

    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    tied = embeddings is not None and embeddings.weight is cast(Any, model).get_input_embeddings().weight
    spare = ("rope_freqs", "rope_factors", *(("output.weight",) if tied else ()))
    tensors = {tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(path).tensors}
    held = sum(count for key, count in tensors.items() if not key.startswith(spare))
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held > taken:
        raise ModelError(
            f"{name}: the file holds {held:,} weights, of which its metadata describe {taken:,}; "
            "it is damaged or of another version: download it again"
        )


def _explained(error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it brings its own Python code, which is not run; if you trust it, build the model in a function of your "
            "own and name that: pkg.mod:fn"
        )
    if "mismatch" in text:
        return "its weights have other shapes than config.json says; a folder made by regrow opens with regrow.load"
    return f"{' '.join(str(error).split())[:200]}; its files are damaged or do not belong together: download them again"


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise needs("llm", package) from None


def load_skeleton(folder: Path, *, name: str, dtype: torch.dtype | None, stored: torch.dtype, empty: Empty) -> Loaded:
    """Build the model of a transformers folder: parameters have no numbers, buffers that code computes are right."""
    _check_folder(folder, name, None, whole=False)
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    where = str(folder)
    try:
        with quiet():
            kind = _class_for(where, name, {})
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
            recorded = getattr(config, "dtype", None)
            chosen = dtype or (getattr(torch, recorded) if isinstance(recorded, str) else recorded) or stored
            with no_init_weights(), replacing_parameters(empty):
                model = kind._from_config(config, dtype=chosen)
            model.tie_weights()
            if model.can_generate():
                with suppress(OSError):  # it has none
                    model.generation_config = transformers.GenerationConfig.from_pretrained(where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot build {name} without its weights: {first_line(error)}; prune it in memory") from None
    exact = any(getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    if chosen in (torch.float16, torch.bfloat16) and exact:
        raise ModelError(f"{name} keeps some weights in float32, which is not read block by block; prune it in memory")
    return _complete(model, where, name, {})


@contextmanager
def replacing_parameters(empty: Empty) -> Iterator[None]:
    """Context manager in which each parameter that a module registers is replaced by one without numbers.

    The hook acts in all threads: parameters of others are left as they are.
    """
    thread = get_ident()

    def replaced(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return empty(parameter) if get_ident() == thread else parameter

    # Its stub says that hooks return nothing; what they return takes the parameter's place.
    handle = register_module_parameter_registration_hook(replaced)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
