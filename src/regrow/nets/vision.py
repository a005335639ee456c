"""Load torchvision networks by name."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.nets.files import check_weights
from regrow.nets.loaded import PIXELS, Loaded, ModelError, Origin, image_example, needs, takes

# Arguments of torchvision's builders that would download weights.
_FETCHING = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone"})
# Builders that would otherwise draw their weights from scipy, one warning and many seconds each.
_SLOW_START = frozenset({"googlenet", "inception_v3"})


def known_names() -> list[str]:
    """Return the names of torchvision's networks, without quantised ones; empty if it is not installed."""
    try:
        from torchvision.models import list_models
    except ImportError:
        return []
    return [name for name in list_models() if not name.startswith("quantized_")]


def load_torchvision(name: str, weights: Path | None = None, pixels: int = 0) -> Loaded:
    """Load a torchvision network with weights from a safetensors file, or with fixed random weights."""
    arguments: dict[str, object] = {}
    model, notes = _build(name, arguments), tuple[str, ...]()
    if weights is None:
        notes = (f"{name}: random weights; for trained ones give torchvision:{name}:FILE.safetensors",)
    else:
        from safetensors.torch import load_file

        check_weights([weights], str(weights), None)
        state, fresh = load_file(weights), model.state_dict()
        last = [key for key, value in fresh.items() if key.endswith("weight") and value.dim() >= 2][-1]
        if last in state and len(state[last]) != len(fresh[last]):
            arguments = {"num_classes": len(state[last])}
            model = _build(name, arguments)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:160]
            raise ModelError(f"{weights} does not fit torchvision's {name}: {detail}") from None
    loaded = Loaded(model.eval(), None, example_of(name, model), Origin("torchvision", name, arguments, name), notes)
    first = loaded.example.args[0]
    if pixels and len(loaded.example.args) == 1 and isinstance(first, Tensor) and first.dim() == 4:
        sized = image_example(model, 3, pixels, pixels)
        if takes(model, sized):
            return replace(loaded, example=sized)
    return replace(loaded, guessed=True)


def build_torchvision(origin: Origin) -> nn.Module:
    """Build a torchvision network on the CPU, in float32 and eval mode, without trained weights."""
    for key, value in origin.config.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if key in _FETCHING or not all(number is None or isinstance(number, int | float) for number in numbers):
            raise ModelError(f"the setting {key!r} ({value!s:.60}) is no number, or would fetch weights; take it out")
    return _build(origin.reference, origin.config).eval()


def _build(name: str, arguments: Mapping[str, object]) -> nn.Module:
    try:
        from torchvision.models import get_model
    except ImportError:
        raise needs("vision", "torchvision") from None
    if name not in known_names():
        near = difflib.get_close_matches(name, known_names(), n=1)
        hint = f"; did you mean torchvision:{near[0]}?" if near else ""
        raise ModelError(f"torchvision has no model {name!r}{hint}")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_model(name, weights=None, **(unweighted_arguments(name) | dict(arguments)))
    except (TypeError, ValueError) as error:
        raise ModelError(f"torchvision cannot build {name} with {dict(arguments)}: {first_line(error)}") from None


def unweighted_arguments(name: str) -> dict[str, bool | None]:
    """Return the arguments that keep a builder from downloading weights or initialising them slowly."""
    result: dict[str, bool | None] = {"init_weights": False} if name in _SLOW_START else {}
    if "_rcnn" in name or name.startswith(("fcos", "retinanet", "ssd", "deeplab", "fcn_", "lraspp", "maskrcnn")):
        result["weights_backbone"] = None
    return result


def example_of(name: str, model: nn.Module) -> Example:
    """Return an input of the form that a torchvision network was made for."""
    from torchvision.models import get_model_builder, get_model_weights

    family = get_model_builder(name).__module__.removeprefix("torchvision.models.").split(".")
    chosen = getattr(get_model_weights(name), "DEFAULT", None)
    settings = getattr(getattr(chosen, "transforms", None), "keywords", {})
    size = settings.get("crop_size", PIXELS)
    match family[0] if len(family) > 1 else "classification":
        case "detection":
            return Example(([image_example(model, 3, PIXELS, PIXELS).args[0][0]],))
        case "video":
            height, width = size if isinstance(size, tuple) else (size, size)
            return image_example(model, 3, 16, height, width)
        case "optical_flow":
            image = image_example(model, 3, 128, 128).args[0]
            return Example((image, image.flip(-1)))
        case "segmentation":
            return image_example(model, 3, PIXELS, PIXELS)
    # A vision transformer holds its own image size; published weights may have been made for another.
    side = int(getattr(model, "image_size", size))
    return image_example(model, 3, side, side)
