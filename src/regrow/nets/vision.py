"""Networks for images by name: torchvision's, and small multilayer perceptrons and residual networks."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes import Example
from regrow.core.errors import first_line
from regrow.core.limits import check_memory
from regrow.nets.files import check_weights
from regrow.nets.loaded import CLIP, PIXELS, Loaded, ModelError, Origin, image_example, missing_package, run_error

MAX_SIZE = 2**16  # of widths and other sizes of a small network
MAX_STAGES = 8  # of a small residual network
FLOW_PIXELS = 128  # the least height and width that RAFT takes
GROUP_CHANNELS = 2  # channels per group of a GroupNorm: few, since a network with GroupNorm is widened by whole groups
# Arguments of torchvision's builders that would download weights.
_FETCHING = frozenset({"weights", "weights_backbone", "pretrained", "pretrained_backbone"})
# Builders that would otherwise draw their weights from scipy, one warning and many seconds each.
_SLOW_START = frozenset({"googlenet", "inception_v3"})


def load_torchvision(name: str, weights: Path | None = None, pixels: int = 0) -> Loaded:
    """Load a torchvision network with weights from a safetensors file, or with fixed random weights.

    The number of classes is that of the weights. ``pixels``: as for :func:`regrow.nets.load`. Raises ModelError.
    """
    arguments: dict[str, object] = {}
    model, notes = _build(name, arguments), tuple[str, ...]()
    if weights is None:
        notes = (f"{name}: random weights; for trained ones give torchvision:{name}:FILE.safetensors",)
    else:
        from safetensors.torch import load_file

        check_weights([weights], str(weights), None)
        state, fresh = load_file(weights), model.state_dict()
        *_, last = (key for key, value in fresh.items() if key.endswith("weight") and value.dim() >= 2)
        if last in state and len(state[last]) != len(fresh[last]):
            arguments = {"num_classes": len(state[last])}
            model = _build(name, arguments)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            detail = " ".join(str(error).split())[:160]
            raise ModelError(f"{weights} does not fit torchvision's {name}: {detail}") from None
    origin = Origin("torchvision", name, arguments, name)
    loaded = Loaded(model.eval(), None, torchvision_example(name, model), origin, notes)
    first = loaded.example.args[0]
    # One batch of images is its only input: not a list, a video or a pair.
    if pixels and len(loaded.example.args) == 1 and isinstance(first, Tensor) and first.dim() == 4:
        sized = image_example(model, 3, pixels, pixels)
        if run_error(model, sized) is None:
            return replace(loaded, example=sized)
    return replace(loaded, guessed=True)


def build_torchvision(origin: Origin) -> nn.Module:
    """Build a torchvision network on the CPU, in float32 and eval mode, with random weights, or raise ModelError."""
    for key, value in origin.config.items():
        numbers = value if isinstance(value, list | tuple) else [value]
        if key in _FETCHING or not all(number is None or isinstance(number, int | float) for number in numbers):
            raise ModelError(f"the setting {key!r} ({value!s:.60}) is no number, or would fetch weights; take it out")
    return _build(origin.reference, origin.config).eval()


def _build(name: str, arguments: Mapping[str, object]) -> nn.Module:
    """Build a torchvision network with random weights, always the same; the global random state is unchanged."""
    try:
        from torchvision.models import get_model, list_models
    except ImportError:
        raise missing_package("vision", "torchvision") from None
    if name.startswith("quantized_") or name not in list_models():
        raise ModelError(f"torchvision has no model {name!r}; torchvision.models.list_models() lists them")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return get_model(name, weights=None, **(unweighted_arguments(name) | dict(arguments)))
    except (TypeError, ValueError) as error:
        raise ModelError(f"torchvision cannot build {name} with {dict(arguments)}: {first_line(error)}") from None


def unweighted_arguments(name: str) -> dict[str, bool | None]:
    """Return keyword arguments that keep torchvision's builder ``name`` from downloads and slow initialisation."""
    result: dict[str, bool | None] = {"init_weights": False} if name in _SLOW_START else {}
    if "_rcnn" in name or name.startswith(("fcos", "retinanet", "ssd", "deeplab", "fcn_", "lraspp", "maskrcnn")):
        result["weights_backbone"] = None
    return result


def torchvision_example(name: str, model: nn.Module) -> Example:
    """Return an input of the form and size that a torchvision network was made for: images, a video, or two frames."""
    from torchvision.models import get_model_builder, get_model_weights

    # Modules are torchvision.models.detection.faster_rcnn and so on; those for classification have no folder.
    folder, _, module = get_model_builder(name).__module__.removeprefix("torchvision.models.").partition(".")
    weights = getattr(get_model_weights(name), "DEFAULT", None)
    preprocessing = getattr(getattr(weights, "transforms", None), "keywords", {})  # arguments of a partial
    size = preprocessing.get("crop_size", PIXELS)
    match folder if module else "classification":
        case "detection":
            (image,) = image_example(model, 3, PIXELS, PIXELS).args[0]
            return Example(([image],))  # a list of images
        case "video":
            height, width = size if isinstance(size, tuple) else (size, size)
            return image_example(model, 3, CLIP[0], height, width)
        case "optical_flow":
            (frames,) = image_example(model, 3, FLOW_PIXELS, FLOW_PIXELS).args
            return Example((frames, frames.flip(-1)))  # the first frames, and the second ones
        case "segmentation":
            return image_example(model, 3, PIXELS, PIXELS)
    # A vision transformer holds its own image size; published weights may have been made for another.
    side = int(getattr(model, "image_size", size))
    return image_example(model, 3, side, side)


def small(spec: str, shape: Sequence[int], classes: int, seed: int = 0) -> tuple[nn.Module, Origin]:
    """Return a network built by its short name, in eval mode with random weights, and its origin, or raise ModelError.

    ``shape``: of an input, without the batch dimension. ``mlp:100-100`` names widths of hidden layers, ``resnet:16-3``
    the width of the first stage, and stages of one residual block each. ``resnet-gn:16-3`` is the same with GroupNorm,
    whose output depends on the input alone, while BatchNorm's depends on running statistics of earlier batches.

    >>> net, origin = small("mlp:8-6", (1, 4, 4), 3)
    >>> net(torch.zeros(2, 1, 4, 4)).shape, origin.config["widths"]
    (torch.Size([2, 3]), [8, 6])
    """
    kind, _, numbers = spec.partition(":")
    if kind not in BUILDERS or not re.fullmatch(r"\d{1,5}(-\d{1,5})*", numbers):
        forms = "mlp:100-100 (hidden widths), resnet:16-3 (width, stages) or resnet-gn:16-3 (the same with GroupNorm)"
        raise ModelError(f"no small network {spec!r}; write {forms}")
    config = {"widths": [int(n) for n in numbers.split("-")], "shape": list(map(int, shape)), "classes": classes}
    origin = Origin("small", kind, config, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_small(origin), origin


def build_small(origin: Origin) -> nn.Module:
    """Build the small network of an origin, in eval mode; ModelError if it is invalid, ResourceError if too large."""
    config: Mapping[str, Any] = origin.config
    lists = [config.get("widths"), config.get("shape")]
    numbers = [config.get("classes"), *(n for part in lists if isinstance(part, list) for n in part)]
    are_lists = all(isinstance(part, list) and 0 < len(part) <= 64 for part in lists)
    are_sizes = all(type(n) is int and 0 < n <= MAX_SIZE for n in numbers)
    if origin.reference not in BUILDERS or not are_lists or not are_sizes:
        problem = f"{origin.reference!r} with {dict(config)!s:.80} is not a small network"
        remedy = "use other sizes, or restore the file that they come from"
        raise ModelError(f"{problem}, whose sizes are 1 to {MAX_SIZE:,}; {remedy}")
    build = partial(BUILDERS[origin.reference], config["widths"], config["shape"], config["classes"])
    with torch.device("meta"):
        tensors = build().state_dict().values()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    name = f"the network {origin.reference}:{'-'.join(map(str, config['widths']))}"
    check_memory(needed, name, "take a smaller network")
    return build().eval()


def mlp(widths: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """Build a multilayer perceptron for inputs ``[N, *shape]``, which are flattened: linear layers with ReLUs between.

    ``widths``: of the hidden layers.
    """
    net = nn.Sequential(nn.Flatten())
    for before, after in pairwise([prod(shape), *widths]):
        net.extend([nn.Linear(before, after), nn.ReLU()])
    return net.append(nn.Linear(widths[-1], classes))


class ResidualBlock(nn.Module):
    """A residual block: shortcut(x) + norm(conv(relu(norm(conv(x))))), followed by a ReLU.

    The shortcut is a 1 × 1 convolution if width or resolution changes. ``norm``: channels → a normalisation layer.
    """

    def __init__(self, before: int, after: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), norm(after)
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``[N, before, H, W]`` → ``[N, after, H / stride, W / stride]``."""
        hidden = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.shortcut(x) + self.bn2(self.conv2(hidden)))


def resnet(
    numbers: Sequence[int], shape: Sequence[int], classes: int, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """Build a small residual network for images of a shape ``[C, H, W]``: stem, stages of one block, linear head.

    ``numbers``: the width of the first stage, and the number of stages (3 if absent, at most 8), as in ``resnet:16-3``.
    Each stage is twice as wide as the one before, at half its resolution. ``norm``: channels → a normalisation layer.
    """
    width = numbers[0]
    stages = numbers[1] if len(numbers) > 1 else 3
    widths = [width * 2**i for i in range(min(stages, MAX_STAGES))]
    net = nn.Sequential(nn.Conv2d(shape[0], width, 3, 1, 1, bias=False), norm(width), nn.ReLU())
    for i, (before, after) in enumerate(pairwise([width, *widths])):
        net.append(ResidualBlock(before, after, 1 if i == 0 else 2, norm))
    return net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)])


def resnet_gn(numbers: Sequence[int], shape: Sequence[int], classes: int) -> nn.Module:
    """Build a small residual network as :func:`resnet` does, with GroupNorm, two channels per group."""
    if numbers[0] % GROUP_CHANNELS:
        raise ModelError(f"resnet-gn:{numbers[0]} has groups of {GROUP_CHANNELS} channels; take an even width")
    return resnet(numbers, shape, classes, lambda n: nn.GroupNorm(n // GROUP_CHANNELS, n))


BUILDERS: dict[str, Callable[[Sequence[int], Sequence[int], int], nn.Module]] = {
    "mlp": mlp,
    "resnet": resnet,
    "resnet-gn": resnet_gn,
}
