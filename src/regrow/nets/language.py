"""Load language models (and other transformers models): from a folder, the Hugging Face hub, or a GGUF file."""

import importlib
import io
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from regrow.core.axes import Example
from regrow.nets.errors import ModelError, first_line, needs
from regrow.nets.examples import PIXELS, image_example, text_example
from regrow.nets.files import check_config, check_files, check_gguf, check_weight_names, check_weights
from regrow.nets.library import check_settings, check_tokenizer, model_class
from regrow.nets.loaded import Loaded, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HUB_TIMEOUT = 10.0


def load_folder(folder: Path, *, name: str, dtype: torch.dtype | None) -> Loaded:
    """Load a model and its tokenizer from a transformers folder with safetensors weights.

    Args:
        folder: The folder.
        name: The name of the model, for messages.
        dtype: The dtype of the weights; as stored if ``None``.

    Raises:
        ModelError: If the folder holds no model, only pickled weights, files that are damaged, or settings that would
            load code.
    """
    check_folder(folder, name, dtype)
    return _load(str(folder), name=name, dtype=dtype)


def load_hub(name: str, *, dtype: torch.dtype | None) -> Loaded:
    """Load a model from the Hugging Face hub; from its local cache without network access if it is there.

    Args:
        name: The hub id, ``ORG/NAME``.
        dtype: The dtype of the weights; as stored if ``None``.

    Raises:
        ModelError: If it is not cached and the hub cannot be reached or does not have it.
    """
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
    """Load a model from a GGUF file, with its quantised weights converted to dense ones.

    Args:
        path: The file.
        name: The name of the model, for messages.
        dtype: The dtype of the weights; float32 if ``None``.

    Raises:
        ModelError: If the file is not GGUF or holds an architecture that transformers cannot read from one.
    """
    check_gguf(path, name)
    for package in ("gguf", "accelerate"):
        _require(package)
    with tempfile.TemporaryDirectory(prefix="regrow-") as alone:
        # transformers takes a folder, and would read configurations and tokenizers that happen to lie beside the file.
        place = Path(alone) / "model.gguf"
        place.symlink_to(path.resolve())
        loaded = _load(alone, name=name, dtype=dtype or torch.float32, gguf_file=place.name)
    model: Any = loaded.model
    _check_surplus(path, model, name)
    # save_pretrained refuses a model that still calls itself quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    note = f"{path.name}: quantised weights, turned into dense {str(model.dtype).removeprefix('torch.')}"
    return Loaded(model, loaded.tokenizer, loaded.example, origin_of(model, name), (note, *loaded.notes))


def origin_of(model: "PreTrainedModel", name: str) -> Origin:
    """Return the origin of a transformers model: how to build its architecture again.

    Args:
        model: The model.
        name: What the user called it.
    """
    config = parse_configuration(model.config.to_json_string(use_diff=False))
    return Origin("transformers", type(model).__name__, _plain(config), name)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """Return a configuration, nested ones included, without paths and without entries that name code."""
    away = ("_name_or_path", "quantization_config", "auto_map", "custom_pipelines")
    return {k: _plain(v) if isinstance(v, dict) else v for k, v in config.items() if k not in away}


def parse_configuration(text: str) -> dict[str, object]:
    """Parse a transformers configuration from JSON text, which writes infinity as ``{"__float__": "Infinity"}``.

    Args:
        text: The JSON text.
    """
    return json.loads(text, object_hook=lambda one: float(one["__float__"]) if one.keys() == {"__float__"} else one)


def build_transformers(origin: Origin) -> nn.Module:
    """Build a transformers architecture on the CPU; parameters are *not* initialised, buffers are right.

    Args:
        origin: How to build it.

    Raises:
        ModelError: If transformers does not know the class or the configuration.
    """
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
    """Return the transformers package, or raise ModelError if it is not installed.

    Raises:
        ModelError: If it is not installed.
    """
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
            auto = class_for(where, name, files)
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
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[0]
        raise ModelError(
            f"{name}: the weights lack {len(info['missing_keys'])} parameters, {first!r} first; "
            "the file is incomplete or belongs to another configuration: download it again"
        )
    if info["unexpected_keys"]:
        first = sorted(info["unexpected_keys"])[0]
        raise ModelError(
            f"{name}: the weights hold {len(info['unexpected_keys'])} tensors that config.json does not describe, "
            f"{first!r} first; the configuration belongs to another model: download both again"
        )
    model.eval()
    tokenizer = None if not is_text(model) else read_tokenizer(where, files)
    return Loaded(model, tokenizer, example_of_transformers(model), origin_of(model, name))


def class_for(where: str, name: str, files: dict[str, Any]) -> Any:
    """Return the transformers class that the configuration of a model names.

    Args:
        where: The folder or hub id.
        name: The name of the model, for messages.
        files: Further arguments of ``from_pretrained``.

    Raises:
        ModelError: If a setting would load code.
    """
    transformers = require_transformers()
    settings, _ = transformers.PretrainedConfig.get_config_dict(where, **files)
    try:
        check_settings(settings, automatic=True)
    except ModelError as error:
        raise ModelError(f"{name}: config.json: {error}") from None
    config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **files)
    names = [one for one in getattr(config, "architectures", None) or () if isinstance(one, str)]
    known = next((kind for one in names if (kind := model_class(one)) is not None), None)
    return known or transformers.AutoModelForCausalLM


def read_tokenizer(where: str, files: dict[str, Any]) -> Any | None:
    """Return the tokenizer of a transformers model, or ``None`` if it has none that can be read.

    Args:
        where: The folder or hub id.
        files: Further arguments of ``from_pretrained``.
    """
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
    """Whether a transformers model takes text.

    Args:
        model: The model.
    """
    return model.main_input_name == "input_ids"


def example_of_transformers(model: "PreTrainedModel") -> Example:
    """Return an input of the form that a transformers model takes: tokens or an image.

    Args:
        model: The model.
    """
    if is_text(model):
        return text_example(model, model.config.get_text_config().vocab_size)
    size = getattr(model.config, "image_size", PIXELS)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return image_example(model, getattr(model.config, "num_channels", 3), height, width)


def check_folder(folder: Path, name: str, dtype: torch.dtype | None, *, whole: bool = True) -> None:
    """Raise an error unless a folder holds the complete files of a transformers model.

    Args:
        folder: The folder.
        name: The name of the model, for messages.
        dtype: The dtype that the weights will have; as stored if ``None``.
        whole: Whether all weights must fit into memory at once.

    Raises:
        ModelError: If it holds no model, only pickled weights, or files that are damaged.
        ResourceError: If the weights do not fit into memory.
    """
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
    held = {one.name: int(one.n_elements) for one in gguf.GGUFReader(path).tensors if not one.name.startswith(spare)}
    taken = sum(parameter.numel() for parameter in model.parameters())
    if sum(held.values()) > taken:
        raise ModelError(
            f"{name}: the file holds {sum(held.values()):,} weights, of which its metadata describe {taken:,}; "
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
