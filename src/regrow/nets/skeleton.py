"""Build a transformers model from its folder without the numbers of its weights, which are read later, one by one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from regrow.nets.errors import ModelError, first_line
from regrow.nets.language import (
    check_folder,
    class_for,
    example_of_transformers,
    is_text,
    origin_of,
    quiet,
    read_tokenizer,
    require_transformers,
)
from regrow.nets.loaded import Loaded

Empty = Callable[[nn.Parameter], nn.Parameter]
"""Function of a parameter, that returns one of its shape, dtype and device without numbers."""


def load_skeleton(folder: Path, *, name: str, dtype: torch.dtype | None, stored: torch.dtype, empty: Empty) -> Loaded:
    """Build the model of a transformers folder; parameters have no numbers, buffers that the code computes are right.

    Args:
        folder: The folder.
        name: The name of the model, for messages.
        dtype: The dtype of the weights; as the configuration says, or else as stored, if ``None``.
        stored: The dtype in which the weights are stored.
        empty: Returns a parameter without numbers in the place of another.

    Raises:
        ModelError: If the folder holds no model, or its files name code or other weights.
    """
    check_folder(folder, name, None, whole=False)
    transformers = require_transformers()
    from transformers.initialization import no_init_weights

    where = str(folder)
    try:
        with quiet():
            kind = class_for(where, name, {})
            config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
            chosen = dtype or _recorded_dtype(config) or stored
            with no_init_weights(), replacing_parameters(empty):
                model = kind._from_config(config, dtype=chosen)
            model.tie_weights()
            _read_generation_settings(model, where)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"cannot build {name} without its weights: {first_line(error)}; prune it in memory") from None
    if chosen in (torch.float16, torch.bfloat16) and _has_exact_parts(model):
        raise ModelError(f"{name} keeps some weights in float32, which is not read block by block; prune it in memory")
    tokenizer = read_tokenizer(where, {}) if is_text(model) else None
    example = example_of_transformers(model)
    return Loaded(model.eval(), tokenizer, example, origin_of(model, name))


@contextmanager
def replacing_parameters(empty: Empty) -> Iterator[None]:
    """Context manager in which each parameter that a module registers is replaced by one without numbers.

    The hook acts in all threads: parameters of others are left as they are.

    Args:
        empty: Returns a parameter without numbers in the place of another.
    """
    own = get_ident()

    def replaced(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return empty(parameter) if get_ident() == own else parameter

    # Its stub says that hooks return nothing; what they return takes the parameter's place.
    handle = register_module_parameter_registration_hook(replaced)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _recorded_dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _read_generation_settings(model: Any, where: str) -> None:
    from transformers import GenerationConfig

    if model.can_generate():
        with suppress(OSError):  # it has none
            model.generation_config = GenerationConfig.from_pretrained(where)


def _has_exact_parts(model: Any) -> bool:
    return bool(getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None))
