"""What makes a saved network of changed shape load where regrow is not installed.

The modules beside this one are not regrow's own code: they travel with the weights.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from regrow.nets import ModelError
from regrow.nets.attention import Attention
from regrow.nets.blocks import DecoderLayer, blocks
from regrow.nets.language import require_transformers
from regrow.store.atomic import write_text
from regrow.store.shapes import Kind, Shapes
from regrow.store.state import named_tensors

MOST_DERIVED = 2**16
"""Numbers of buffers that no state dict holds, so that they travel in the configuration."""

_BASE = "from transformers import PreTrainedModel as Base"
_CLASS = "class Regrown(Base)"


def is_changed(shapes: Shapes) -> bool:
    """Whether a network differs from what its architecture's configuration builds."""
    differing = any(one.was is not None or one.added or not one.kind.carried for one in shapes.tensors.values())
    return bool(differing or shapes.dropped or shapes.attributes or shapes.placeholders)


def record(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """How a network differs from what its architecture's configuration builds, as JSON data for ``reshape_regrow``.

    Args:
        model: The network.
        shapes: What was written of it.

    Returns:
        Every tensor of another shape, every changed number, what was dropped, and the numbers of buffers that no file
        of weights holds. ``None`` where that does not suffice: modules that only regrow has, or large such buffers.
    """
    found = named_tensors(model)
    own = {name: one for name, one in shapes.tensors.items() if one.kind is Kind.DERIVED}
    nothing = any(placeholder.gives == "nothing" for placeholder in shapes.placeholders.values())
    foreign = any(isinstance(module, Attention) for module in model.modules())
    loose = any(one.kind is Kind.ATTRIBUTE for one in shapes.tensors.values())
    if nothing or foreign or loose or sum(found[name].tensor.numel() for name in own) > MOST_DERIVED:
        return None
    return {
        "tensors": {
            name: list(one.shape)
            for name, one in shapes.tensors.items()
            if (one.was is not None or one.added) and one.kind is not Kind.DERIVED
        },
        "attributes": dict(shapes.attributes),
        "dropped": list(shapes.dropped),
        "stands": {path: placeholder.to_data() for path, placeholder in shapes.placeholders.items()},
        "derived": {
            name: {"dtype": one.dtype, "shape": list(one.shape), "numbers": found[name].tensor.flatten().tolist()}
            for name, one in own.items()
        },
    }


def settings(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """What ``config.json`` of a transformers model of changed shape says beside the architecture's configuration.

    Returns:
        ``regrow`` (:func:`record`), ``auto_map`` and, for a Llama-like decoder, ``block_configs`` as NVIDIA's tools
        write them. ``None`` where transformers could not build the network from it.
    """
    automatic = _automatic(shapes.origin.reference)
    changes = record(model, shapes) if automatic else None
    if changes is None:
        return None
    name = f"modeling_regrow.{class_name(shapes.origin.reference)}"
    data: dict[str, Any] = {"regrow": changes, "auto_map": dict.fromkeys(automatic, name)}
    try:
        return data | {"block_configs": [_block_config(block) for block in blocks(model)]}
    except ModelError:
        return data


def class_name(reference: str) -> str:
    """The class that the modelling file defines.

    >>> class_name("LlamaForCausalLM")
    'RegrownLlamaForCausalLM'
    """
    return f"Regrown{reference}"


def write_code(reference: str, folder: Path) -> None:
    """Write ``modeling_regrow.py`` with the class that it extends, and what it needs.

    Raises:
        StoreError: If the disk is full.
    """
    text = code("modeling_regrow.py")
    if not reference.isidentifier() or _BASE not in text or _CLASS not in text:
        raise ValueError(f"no class is named {reference!r}")
    text = text.replace(_BASE, f"from transformers import {reference} as Base")
    write_text(folder / "modeling_regrow.py", text.replace(_CLASS, f"class {class_name(reference)}(Base)"))
    write_text(folder / "reshape_regrow.py", code("reshape_regrow.py"))


def code(name: str) -> str:
    """The text of a file that travels."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _automatic(reference: str) -> list[str]:
    """The automatic classes of transformers that give this one."""
    from transformers.models.auto import modeling_auto

    require_transformers()
    result = []
    for name, automatic in vars(modeling_auto).items():
        mapping: Any = getattr(automatic, "_model_mapping", None)
        names: Mapping[str, Any] = getattr(mapping, "_model_mapping", {})
        if name.startswith("AutoModel") and any(
            reference in (one if isinstance(one, tuple) else (one,)) for one in names.values()
        ):
            result.append(name)
    return sorted(result)


def _block_config(block: DecoderLayer) -> dict[str, Any]:
    attention: dict[str, Any] = {"no_op": not block.heads}
    if block.heads:
        attention |= {"n_heads_in_group": block.heads // block.kv_heads, "num_key_value_heads": block.kv_heads}
    return {"attention": attention, "ffn": {"no_op": not block.width, "intermediate_size": block.width}}
