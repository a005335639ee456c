"""The files that make a model folder a transformers folder: configuration, tokenizer, generation settings."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.core.errors import first_line
from regrow.nets import ModelError, Origin
from regrow.nets.files import ATTENTION, check_settings, check_tokenizer, leads_away, settings_of
from regrow.nets.language import parse_configuration, quiet, require_transformers
from regrow.store.atomic import staging_folder, sync, write_text
from regrow.store.errors import StoreError, explain_os_errors
from regrow.store.weights import inside
from regrow.tracing.stacks import DEPTHS, PER_BLOCK

INFORMATIVE = frozenset({"architectures", "transformers_version", "_name_or_path", "_attn_implementation"})
_LAYERS = re.compile(r"(num|n)(_\w+)?_layers?")


def update_origin(origin: Origin, model: object, dtype: torch.dtype) -> Origin:
    """Return the origin of a transformers model with its present depth, dtype and attention implementation."""
    config = {**origin.config, "dtype": str(dtype).removeprefix("torch.")}
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention in ATTENTION:
        config["attn_implementation"] = attention
    now: dict[str, Any] = getattr(getattr(model, "config", None), "to_dict", dict)()
    return replace(origin, config=_with_depth(config, now))


def _with_depth(config: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the present number of layers, and lists with one entry for each."""
    changed = {
        name: _with_depth(value, now[name]) if isinstance(value, dict) else now[name]
        for name, value in config.items()
        if isinstance(now.get(name), type(value)) and (name in DEPTHS | PER_BLOCK or isinstance(value, dict))
    }
    return {**config, **changed}


def write_configuration(
    origin: Origin, model: object, folder: Path, changes: Mapping[str, object] | None = None, architecture: str = ""
) -> None:
    """Write ``config.json`` (of the architecture before any cut) and ``generation_config.json``."""
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
    """Write a tokenizer's files, without paths of this machine."""
    with (
        explain_os_errors(folder),
        staging_folder(folder / "tokenizer") as stage,
    ):  # transformers would write through links
        with quiet():
            tokenizer.save_pretrained(str(stage))
        path = stage / "tokenizer_config.json"
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            kept = {key: value for key, value in settings.items() if not leads_away(key, value)}
            kept.pop("name_or_path", None)
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for one in sorted(stage.rglob("*")):
            place = folder / one.relative_to(stage)
            if one.is_dir():
                place.mkdir(exist_ok=True)
            else:
                sync(one)
                one.replace(place)
        sync(folder)


def read_tokenizer(folder: Path) -> Any | None:
    """Load the tokenizer of a model folder, or return ``None`` if it has none; no code in it is run."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        settings = json.loads(inside(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        check_tokenizer(settings)
    except ModelError as error:
        raise StoreError(f"{folder}: tokenizer_config.json: {error}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise StoreError(f"{folder}: tokenizer_config.json cannot be read ({first_line(error)}); restore it") from None
    transformers = require_transformers()
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except Exception as error:
        raise StoreError(f"{folder}: the tokenizer cannot be read ({first_line(error)}); restore its files") from None


def check_configuration(origin: Origin, folder: Path, tensors: int) -> None:
    """Raise StoreError unless a recorded configuration is safe to build and agrees with ``config.json``."""
    try:
        check_settings(origin.config)
        settings = list(settings_of(origin.config))
    except ModelError as error:
        raise StoreError(f"{folder}: shapes.json: {error}") from None
    for key, value in settings:
        if _LAYERS.fullmatch(key) and isinstance(value, int) and not 0 <= value <= max(tensors, 1):
            raise StoreError(f"{folder}: {key!r} is {value}, but {tensors} tensors are stored; restore shapes.json")
    try:
        config = parse_configuration(inside(folder, "config.json").read_text(encoding="utf-8"))
        other = next(_differing(config, origin.config), None)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{folder}: config.json cannot be read ({first_line(error)}); restore it") from None
    if other:
        key, found, expected = other
        raise StoreError(
            f"{folder}: config.json has {key} = {str(found)[:60]}, but the model was saved with "
            f"{str(expected)[:60]}; restore it"
        )


def _differing(config: Mapping[str, Any], recorded: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield the settings, nested ones included, that both configurations have and that differ."""
    for key in sorted((config.keys() & recorded.keys()) - INFORMATIVE):
        if isinstance(config[key], dict) and isinstance(recorded[key], dict):
            yield from ((f"{key}.{name}", *pair) for name, *pair in _differing(config[key], recorded[key]))
        elif config[key] != recorded[key]:
            yield key, config[key], recorded[key]


def is_pretrained(model: nn.Module) -> bool:
    """Whether the model's class is one of transformers' own."""
    return type(model).__module__.startswith("transformers.models.") and hasattr(model, "config")


def main_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of most floating-point parameters."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32
