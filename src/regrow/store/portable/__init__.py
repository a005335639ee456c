"""Make a saved network of changed shape loadable where regrow is not installed, by code beside its weights.

The modules beside this one are copied into the model folder, and must run without regrow.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from regrow.nets import ModelError
from regrow.nets.attention import Attention
from regrow.nets.language import DecoderLayer, decoder_layers, require_transformers
from regrow.store.atomic import write_text
from regrow.store.pretrained import write_configuration
from regrow.store.shapes import Kind, Shapes
from regrow.store.state import named_tensors

MOST_DERIVED = 2**16
"""The most numbers of derived buffers (not in the state dict) that are written into the configuration."""

_CLASS = """

class {name}(Regrown, transformers.{reference}):
    \"\"\"``{reference}`` with the widths that ``config.json`` records.\"\"\"
"""
_PREFIX = """
    prefix = "{prefix}"
"""


def is_changed(shapes: Shapes) -> bool:
    """Whether a network differs from what its architecture's configuration builds."""
    differing = any(one.was is not None or one.added or not one.kind.carried for one in shapes.tensors.values())
    return bool(differing or shapes.dropped or shapes.attributes or shapes.placeholders or shapes.inserted)


def record(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """Return, as JSON data for ``reshape_regrow``, how a network differs from what its configuration builds."""
    tensors = named_tensors(model)
    derived = {name: stored for name, stored in shapes.tensors.items() if stored.kind is Kind.DERIVED}
    nothing = any(placeholder.gives == "nothing" for placeholder in shapes.placeholders.values())
    foreign = any(isinstance(module, Attention) for module in model.modules())
    loose = any(stored.kind is Kind.ATTRIBUTE for stored in shapes.tensors.values())
    if nothing or foreign or loose or sum(tensors[name].tensor.numel() for name in derived) > MOST_DERIVED:
        return None
    inserted = {path: [asdict(insertion) for insertion in row] for path, row in shapes.inserted.items()}
    return {
        "tensors": {
            name: list(stored.shape)
            for name, stored in shapes.tensors.items()
            if (stored.was is not None or stored.added) and name not in derived
        },
        "attributes": dict(shapes.attributes),
        "dropped": list(shapes.dropped),
        "stands": {path: asdict(placeholder) for path, placeholder in shapes.placeholders.items()},
        **({"inserted": inserted} if inserted else {}),
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
    """Write ``config.json``, and where its entries suffice to build a changed network, the code that does it."""
    changes = settings(model, shapes) if is_changed(shapes) else None
    if changes is None:
        write_configuration(shapes.origin, model, folder)
    else:
        write_configuration(shapes.origin, model, folder, changes, class_name(shapes.origin.reference))
        write_code(model, shapes.origin.reference, folder)


def settings(model: nn.Module, shapes: Shapes) -> dict[str, Any] | None:
    """Return the entries that ``config.json`` of a changed transformers model gets besides its configuration."""
    reference = shapes.origin.reference
    automatic = dict.fromkeys(_automatic(reference), reference)
    changes = record(model, shapes) if automatic and not shapes.inserted else None
    if changes is None:
        return None
    if within := inner(model):
        automatic["AutoModel"] = within[0]
    names = {name: f"modeling_regrow.{class_name(one)}" for name, one in sorted(automatic.items())}
    data: dict[str, Any] = {"regrow": changes, "auto_map": names}
    try:
        return data | {"block_configs": [_block_config(block) for block in decoder_layers(model)]}
    except ModelError:
        return data


def class_name(reference: str) -> str:
    """Return the name of the class that the modelling file defines for an architecture class.

    >>> class_name("LlamaForCausalLM")
    'RegrownLlamaForCausalLM'
    """
    return f"Regrown{reference}"


def inner(model: nn.Module) -> tuple[str, str] | None:
    """Return the class of the model within a network with a head, which ``AutoModel`` builds, and its name's prefix."""
    path = getattr(model, "base_model_prefix", "")
    base = getattr(model, path, None) if path else None
    name = type(base).__name__
    return (name, f"{path}.") if isinstance(base, nn.Module) and "AutoModel" in _automatic(name) else None


def write_code(model: nn.Module, reference: str, folder: Path) -> None:
    """Write ``modeling_regrow.py`` (subclasses of the architecture's classes) and ``reshape_regrow.py``."""
    classes = {reference: ""} | dict([within] if (within := inner(model)) else [])
    text = code("modeling_regrow.py")
    for name, prefix in classes.items():
        if not name.isidentifier():
            raise ValueError(f"no class is named {name!r}")
        text += _CLASS.format(name=class_name(name), reference=name)
        text += _PREFIX.format(prefix=prefix) if prefix else ""
    write_text(folder / "modeling_regrow.py", text)
    write_text(folder / "reshape_regrow.py", code("reshape_regrow.py"))


def code(name: str) -> str:
    """Return the text of a file that is copied into model folders."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _automatic(reference: str) -> list[str]:
    """Return the Auto classes of transformers whose models include the given class."""
    from transformers.models.auto import modeling_auto

    require_transformers()
    result = []
    for name, automatic in vars(modeling_auto).items():
        if name.startswith("AutoModel"):
            mapping: Any = getattr(automatic, "_model_mapping", None)
            classes: Mapping[str, Any] = getattr(mapping, "_model_mapping", {})
            if any(reference in (known if isinstance(known, tuple) else (known,)) for known in classes.values()):
                result.append(name)
    return sorted(result)


def _block_config(block: DecoderLayer) -> dict[str, Any]:
    attention: dict[str, Any] = {"no_op": not block.heads}
    if block.heads:
        attention |= {"n_heads_in_group": block.heads // block.kv_heads, "num_key_value_heads": block.kv_heads}
    return {"attention": attention, "ffn": {"no_op": not block.width, "intermediate_size": block.width}}
