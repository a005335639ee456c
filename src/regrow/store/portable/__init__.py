"""Make a saved network of changed shape loadable where regrow is not installed, by code beside its weights.

The modules beside this one are copied into the model folder, and must run without regrow. Here are also the other files
that make it a transformers folder: configuration, tokenizer, generation settings.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.core.errors import first_line
from regrow.nets import ModelError, Origin
from regrow.nets.attention import Attention
from regrow.nets.files import ATTENTION, check_settings, check_tokenizer, iterate_settings, leads_away
from regrow.nets.language import decoder_layers, parse_configuration, quiet, require_transformers
from regrow.store.atomic import stage_folder, sync, write_text
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.shapes import Shapes, TensorKind
from regrow.store.state import named_tensors
from regrow.store.tensors import dtype_name
from regrow.store.weights import require_file
from regrow.tracing.stacks import DEPTHS, PER_BLOCK

# Settings of a configuration that change nothing in the network that is built.
INFORMATIVE = frozenset({"architectures", "transformers_version", "_name_or_path", "_attn_implementation"})
_LAYERS = re.compile(r"(num|n)(_\w+)?_layers?")
# The most numbers of derived buffers (not in the state dict) that are written into the configuration.
MAX_DERIVED = 2**16

# What the model type in config.json starts with where the code beside it is needed: no family of transformers has it.
OWN_TYPE = "regrow_"

_CONFIG = """

class {name}(OwnType, transformers.{reference}):
    \"\"\"``{reference}`` under a model type of its own.\"\"\"
"""
_CLASS = """

class {name}(Regrown, transformers.{reference}):
    \"\"\"``{reference}`` with the widths that ``config.json`` records.\"\"\"

    config_class = {config}
"""
_PREFIX = """    prefix = "{prefix}"
"""


def is_changed(shapes: Shapes) -> bool:
    """Whether a recorded network differs in more than its weights from what its architecture's configuration builds."""
    if any(stored.was is not None or stored.added or not stored.kind.carried for stored in shapes.tensors.values()):
        return True
    return bool(shapes.dropped or shapes.attributes or shapes.placeholders or shapes.inserted)


def record_changes(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """Return, as JSON data for ``reshape_regrow.reshape``, how a network differs from what its configuration builds.

    ``shapes``: the network's record. ``None`` if it differs in ways that ``reshape_regrow`` does not know: inserted
    blocks, opened attention, tensors as plain attributes, many derived buffers, or modules that give ``None``.
    """
    tensors = named_tensors(model)
    derived = {name: stored for name, stored in shapes.tensors.items() if stored.kind is TensorKind.DERIVED}
    own_modules = any(isinstance(module, Attention) for module in model.modules())
    empty = any(placeholder.gives == "nothing" for placeholder in shapes.placeholders.values())
    plain_attributes = any(stored.kind is TensorKind.ATTRIBUTE for stored in shapes.tensors.values())
    too_many = sum(tensors[name].tensor.numel() for name in derived) > MAX_DERIVED
    if own_modules or empty or plain_attributes or too_many or shapes.inserted:
        return None
    return {
        "tensors": {
            name: list(stored.shape)
            for name, stored in shapes.tensors.items()
            if (stored.was is not None or stored.added) and name not in derived
        },
        "attributes": dict(shapes.attributes),
        "dropped": list(shapes.dropped),
        "stands": {path: asdict(placeholder) for path, placeholder in shapes.placeholders.items()},
        "derived": {
            name: {
                "dtype": stored.dtype,
                "shape": list(stored.shape),
                "numbers": tensors[name].tensor.flatten().tolist(),
            }
            for name, stored in derived.items()
        },
    }


def write_pretrained(model: nn.Module, shapes: Shapes, folder: Path) -> None:
    """Write ``config.json``, and for a changed network code that rebuilds it by entries there, if that is possible."""
    changes = config_entries(model, shapes) if is_changed(shapes) else None
    if changes is None:
        write_configuration(shapes.origin, model, folder)
    else:
        write_configuration(shapes.origin, model, folder, changes, class_name(shapes.origin.reference))
        write_code(model, shapes.origin, folder)


def config_entries(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """Return what ``config.json`` of a changed transformers model gets besides its configuration, as JSON data.

    The entries are ``regrow`` (:func:`record_changes`), ``auto_map`` (Auto class → class in the modelling file), a
    ``model_type`` of its own and ``per_layer_config`` (:func:`list_heads`). ``None`` if transformers has no Auto class
    for it, or :func:`record_changes` returns ``None``.
    """
    reference = shapes.origin.reference
    references = dict.fromkeys(_auto_class_names(reference), reference)
    changes = record_changes(model, shapes) if references else None
    if changes is None:
        return None
    if inner := find_inner_model(model):
        references["AutoModel"] = inner[0]
    references["AutoConfig"] = _config_class(shapes.origin)
    auto_map = {auto: f"modeling_regrow.{class_name(name)}" for auto, name in sorted(references.items())}
    entries: dict[str, Any] = {
        "regrow": changes,
        "auto_map": auto_map,
        "model_type": f"{OWN_TYPE}{shapes.origin.config['model_type']}",
    }
    if heads := list_heads(model, shapes.origin.config):
        entries |= {"per_layer_config": heads, "allow_global_per_layer_attribute_access": True}
    return entries


def list_heads(model: nn.Module, config: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return layer → numbers of heads that are not those of ``config``: vLLM takes them from ``config.json``.

    Empty for networks that are no Llama-like decoders; layers whose attention was dropped are left out.
    """
    try:
        layers = decoder_layers(model)
    except ModelError:
        return {}
    heads = {
        str(i): {"num_attention_heads": layer.heads, "num_key_value_heads": layer.kv_heads}
        for i, layer in enumerate(layers)
        if layer.heads
    }
    return {i: numbers for i, numbers in heads.items() if any(config.get(name) != n for name, n in numbers.items())}


def _config_class(origin: Origin) -> str:
    """Return the name of the class of transformers that holds the configuration of an architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return str(CONFIG_MAPPING_NAMES[origin.config["model_type"]])


def class_name(reference: str) -> str:
    """Return the name of the class that the modelling file defines for a class of transformers.

    >>> class_name("LlamaForCausalLM")
    'RegrownLlamaForCausalLM'
    """
    return f"Regrown{reference}"


def find_inner_model(model: nn.Module) -> tuple[str, str] | None:
    """Return (class name, prefix) of the model below the head, which ``AutoModel`` builds; ``None``: no such one.

    The prefix is what its tensors' names begin with in the whole network, such as ``model.``.
    """
    path = getattr(model, "base_model_prefix", "")
    base = getattr(model, path, None) if path else None
    name = type(base).__name__
    return (name, f"{path}.") if isinstance(base, nn.Module) and "AutoModel" in _auto_class_names(name) else None


def write_code(model: nn.Module, origin: Origin, folder: Path) -> None:
    """Write ``reshape_regrow.py`` and ``modeling_regrow.py``, with subclasses of the classes that ``origin`` names."""
    classes = {origin.reference: ""}  # class of transformers → prefix of its tensors' names
    if inner := find_inner_model(model):
        classes |= dict([inner])
    config = _config_class(origin)
    text = read_template("modeling_regrow.py") + _CONFIG.format(name=class_name(config), reference=config)
    for name, prefix in classes.items():
        if not name.isidentifier():
            raise ValueError(f"no class is named {name!r}")
        text += _CLASS.format(name=class_name(name), reference=name, config=class_name(config))
        text += _PREFIX.format(prefix=prefix) if prefix else ""
    write_text(folder / "modeling_regrow.py", text)
    write_text(folder / "reshape_regrow.py", read_template("reshape_regrow.py"))


def read_template(name: str) -> str:
    """Return the text of a file of this package that model folders get, such as ``reshape_regrow.py``."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _auto_class_names(reference: str) -> list[str]:
    """Return the names of transformers' Auto classes, sorted, that can build the class named ``reference``."""
    from transformers.models.auto import modeling_auto

    require_transformers()
    result = []
    for name, auto_class in vars(modeling_auto).items():
        if name.startswith("AutoModel"):
            mapping = getattr(auto_class, "_model_mapping", None)
            classes: Mapping[str, Any] = getattr(mapping, "_model_mapping", {})  # a name, or a tuple of names
            if any(reference in (names if isinstance(names, tuple) else (names,)) for names in classes.values()):
                result.append(name)
    return sorted(result)


def update_origin(origin: Origin, model: object, dtype: torch.dtype) -> Origin:
    """Return a copy of ``origin`` with the present depth and attention (if all parts have one), and ``dtype``."""
    config = {**origin.config, "dtype": dtype_name(dtype)}
    parts = model.modules() if isinstance(model, nn.Module) else [model]
    configs = [part.config for part in parts if hasattr(part, "config")]
    attention = {getattr(one, "_attn_implementation", None) for one in configs}
    if len(attention) == 1 and attention <= {*ATTENTION}:
        config["attn_implementation"] = attention.pop()
    now: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return replace(origin, config=_with_depth(config, now))


def _with_depth(config: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``config``; settings that count layers or have an entry for each are taken from ``now``."""
    changed = {
        name: _with_depth(value, now[name]) if isinstance(value, dict) else now[name]
        for name, value in config.items()
        if isinstance(now.get(name), type(value)) and (name in DEPTHS | PER_BLOCK or isinstance(value, dict))
    }
    return {**config, **changed}


def write_configuration(
    origin: Origin, model: object, folder: Path, changes: Mapping[str, object] | None = None, architecture: str = ""
) -> None:
    """Write ``config.json`` (of the architecture before any cut) and, if the model has one, ``generation_config.json``.

    ``origin``: what builds the architecture; ``model``: the transformers model, for its generation settings;
    ``changes``: further entries (:func:`config_entries`); ``architecture``: the class name that the file has in place
    of ``origin.reference``. Raises StoreError if transformers cannot make the configuration.
    """
    settings = dict(origin.config)
    settings.pop("attn_implementation", None)
    try:
        with quiet():
            config = require_transformers().AutoConfig.for_model(settings.pop("model_type", ""), **settings)
    except Exception as error:
        raise StoreError(
            f"transformers cannot make the configuration of {origin.name!r}: {first_line(error)}"
        ) from None
    config.architectures = [architecture or origin.reference]
    text = config.to_json_string()
    if changes:
        text = json.dumps(json.loads(text) | dict(changes), indent=2, sort_keys=True) + "\n"
    write_text(folder / "config.json", text)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        write_text(folder / "generation_config.json", generation.to_json_string())


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a transformers tokenizer's files into a folder, without paths of this machine; raises StoreError."""
    with (
        explain_os_errors(folder),
        stage_folder(folder / "tokenizer") as stage,
    ):  # transformers would write through links
        with quiet():
            tokenizer.save_pretrained(str(stage))
        path = stage / "tokenizer_config.json"
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings = {key: value for key, value in settings.items() if not leads_away(key, value)}
            settings.pop("name_or_path", None)
            path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for path_in_stage in sorted(stage.rglob("*")):
            target = folder / path_in_stage.relative_to(stage)
            if path_in_stage.is_dir():
                target.mkdir(exist_ok=True)
            else:
                sync(path_in_stage)
                path_in_stage.replace(target)
        sync(folder)


def read_tokenizer(folder: Path) -> Any | None:
    """Load the tokenizer of a model folder; ``None`` if it has none, StoreError if it is damaged; no code is run."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    auto_class = require_transformers().AutoTokenizer
    try:
        check_tokenizer(json.loads(require_file(folder, "tokenizer_config.json").read_text(encoding="utf-8")))
        with quiet():
            return auto_class.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise StoreError(f"{folder}: tokenizer_config.json cannot be used ({first_line(error)}); restore it") from None


def check_configuration(origin: Origin, folder: Path, tensors: int) -> None:
    """Raise StoreError unless the configuration in ``origin`` is safe to build and agrees with ``config.json``.

    ``folder``: the model folder; ``tensors``: how many tensors it stores: a configuration of more layers is damaged.
    """
    try:
        check_settings(origin.config)
        settings = list(iterate_settings(origin.config))
    except ModelError as error:
        raise StoreError(f"{folder}: shapes.json: {error}") from None
    for key, value in settings:
        if _LAYERS.fullmatch(key) and isinstance(value, int) and not 0 <= value <= max(tensors, 1):
            raise StoreError(f"{folder}: {key!r} is {value}, but {tensors} tensors are stored; restore shapes.json")
    try:
        config = parse_configuration(require_file(folder, "config.json").read_text(encoding="utf-8"))
        config["model_type"] = str(config.get("model_type")).removeprefix(OWN_TYPE)
        difference = next(_differing(config, origin.config), None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{folder}: config.json cannot be read ({first_line(error)}); restore it") from None
    if difference:
        key, actual, expected = difference
        raise StoreError(
            f"{folder}: config.json has {key} = {str(actual)[:60]}, but the model was saved with "
            f"{str(expected)[:60]}; restore it"
        )


def _differing(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value, recorded value) of settings, nested ones included, that both have and that differ."""
    for key in sorted((config.keys() & recorded.keys()) - INFORMATIVE):
        if isinstance(config[key], dict) and isinstance(recorded[key], dict):
            yield from ((f"{key}.{name}", *pair) for name, *pair in _differing(config[key], recorded[key]))
        elif config[key] != recorded[key]:
            yield key, config[key], recorded[key]


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model's class is one of transformers' own and has a configuration."""
    return type(model).__module__.startswith("transformers.models.") and hasattr(model, "config")


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most floating-point weights, counted by entries; float32 without any."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32
