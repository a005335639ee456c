"""Networks of inverted bottlenecks (ProxylessNAS space), built from a configuration: super-network or result.

The space is that of ProxylessNAS (Cai, Zhu, Han, arXiv 1812.00332): a stem, six stages of blocks, each block a sum of
any number of inverted bottlenecks and, where it keeps the form of its input, of that input itself, and a classifier.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn

from regrow.core.candidates import Candidates, Prefix
from regrow.nets.loaded import ModelError
from regrow.nets.staged import StagedNetwork, check_sizes, explain_description, is_spread, norm_widths

OPERATIONS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")
"""The candidates: bottlenecks ``mb{kernel}e{expansion ratio}``, with the ratio before any cut, and ``skip``."""

STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
"""Width, blocks and stride of each stage of the paper's space; its stem has 32 and 16 channels, its last layer 1280."""


class Bottleneck(nn.Sequential):
    """An inverted bottleneck: 1 × 1 → depthwise → 1 × 1 convolution, with BatchNorm, and ReLU6 after two."""

    def __init__(self, before: int, mid: int, after: int, kernel: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(before, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            *_depthwise(mid, after, kernel, stride),
        )


def _depthwise(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(before, before, kernel, stride, kernel // 2, groups=before, bias=False),
        nn.BatchNorm2d(before),
        nn.ReLU6(),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
    ]


def block(before: int, plan: Mapping[str, Any]) -> Candidates:
    """Build the candidate operations of a block.

    ``skip`` reads a separate input, so that it does not compete with bottlenecks.

    Args:
        before: Channels in.
        plan: ``width`` (channels out), ``stride`` and ``ops``, a list of ``[name, mid]`` with the channels inside.
    """
    ops, sources = dict[str, nn.Module](), []
    for name, mid in plan["ops"]:
        skips = name == "skip"
        ops[name] = nn.Identity() if skips else Bottleneck(before, mid, plan["width"], int(name[2]), plan["stride"])
        sources.append(0 if skips else 1)
    return Candidates(ops, sources)


class Mobile(StagedNetwork):
    """A network of blocks: a stem, blocks, and classifiers behind the last block and the end of each stage.

    Args:
        config: ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (its two widths), ``stride`` of the stem,
            ``blocks`` as :func:`block` takes them, ``mix`` (channels of the 1 × 1 convolution before the last
            classifier) and ``heads``: indices of the blocks that a classifier follows, ascending.

    Raises:
        ModelError: If the configuration is invalid, or its sizes do not fit each other.
    """

    parts_name = "blocks"

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        plans = check_description(config)
        (first, width), last = plans["stem"], len(plans["blocks"]) - 1
        self.stem = nn.Sequential(
            nn.Conv2d(plans["shape"][0], first, 3, plans["stride"], 1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU6(),
            *_depthwise(first, width, 3, 1),
        )
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleDict()
        for i, plan in enumerate(plans["blocks"]):
            self.blocks.append(block(width, plan))
            width = plan["width"]
            if i in plans["heads"]:
                mix, layers = width, list[nn.Module]()
                if i == last:
                    mix = plans["mix"]
                    layers = [nn.Conv2d(width, mix, 1, bias=False), nn.BatchNorm2d(mix), nn.ReLU6()]
                layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(mix, plans["classes"])]
                self.heads[str(i)] = nn.Sequential(*layers)

    def run_part(self, part: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        """Return the output of a block; ``skip`` reads a separate input."""
        return part(second, second)

    def classify(self, head: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of a classifier."""
        return head(x)


def supernet(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 24,
    blocks: int = 4,
    stride: int = 2,
    heads: Sequence[int] = (),
    operations: Sequence[str] = OPERATIONS,
) -> dict[str, Any]:
    """Return the configuration of the super-network; the defaults are those of the paper.

    Args:
        shape: The shape of an input, ``[C, H, W]``.
        classes: The number of logits.
        width: Channels of the first stage; all other widths are scaled from ``STAGES`` by the same ratio, in multiples
            of 4.
        blocks: Blocks per stage; the last stage has one.
        stride: The stride of the stem.
        heads: Indices of blocks at which a stage of the search ends; the last block has a classifier anyway.
        operations: The candidates of each block; ``skip`` only where a block keeps the shape of its input.

    >>> config = supernet((3, 32, 32), 10, width=8, blocks=1)
    >>> [plan["width"] for plan in config["blocks"]], config["stem"], config["mix"]
    ([8, 12, 28, 32, 64, 108], [12, 4], 428)
    """

    def scaled(channels: int) -> int:
        return max(4, 4 * round(channels * width / STAGES[0][0] / 4))

    stem = [scaled(32), scaled(16)]
    before, plans = stem[1], list[dict[str, Any]]()
    for channels, many, first in STAGES:
        after = scaled(channels)
        for i in range(blocks if many > 1 else 1):
            step = first if i == 0 else 1
            names = [name for name in operations if name != "skip" or (step == 1 and before == after)]
            ops = [[name, after if name == "skip" else int(name[-1]) * before] for name in names]
            plans.append({"width": after, "stride": step, "ops": ops})
            before = after
    config = {"shape": [*shape], "classes": classes, "stem": stem, "stride": stride, "blocks": plans}
    return {**config, "mix": scaled(1280), "heads": sorted({*heads, len(plans) - 1})}


def thin(config: Mapping[str, Any], before: int, share: float) -> dict[str, Any]:
    """Return a configuration with a fraction of the operations left in its first blocks, as a search may leave it.

    The fraction of the operations of the first ``before`` blocks is rounded up; each keeps at least one.

    >>> config = thin(supernet((3, 8, 8), 2, blocks=1), before=2, share=0.3)
    >>> [[name for name, _ in plan["ops"]] for plan in config["blocks"][:3]]
    [['mb3e3', 'mb3e6'], ['mb3e3', 'mb5e6'], ['mb3e3', 'mb5e3', 'mb7e3', 'mb3e6', 'mb5e6', 'mb7e6']]
    """
    blocks, numbers = list(config["blocks"]), count()
    for i, plan in enumerate(blocks[:before]):
        kept = [op for op in plan["ops"] if is_spread(next(numbers), share)]
        blocks[i] = {**plan, "ops": kept or plan["ops"][:1]}
    return {**config, "blocks": blocks}


def prefix(config: Mapping[str, Any], first: int, last: int, share: float) -> Prefix:
    """Build the network up to block ``last``, as a stage of a search runs it; blocks before ``first`` are thinned."""
    heads = sorted({*config["heads"], last})
    return Prefix(Mobile(thin({**config, "heads": heads}, first, share)), last)


def describe(net: Mobile, config: Mapping[str, object], gone: Container[str]) -> dict[str, Any]:
    """Return the configuration that builds exactly what is left of a network, with its last classifier alone.

    Args:
        net: The network after cuts.
        config: The configuration that it was built from.
        gone: Paths of the operations that were dropped.
    """
    stem = norm_widths(net.stem)
    whole, width, blocks = check_description(config), stem[-1], list[dict[str, Any]]()
    for i, plan in enumerate(whole["blocks"]):
        left = [name for name, _ in plan["ops"] if f"blocks.{i}.ops.{name}" not in gone]
        inside = {name: norm_widths(net.get_submodule(f"blocks.{i}.ops.{name}")) for name in left if name != "skip"}
        width = next((widths[-1] for widths in inside.values()), width)
        ops = [[name, inside[name][0] if name in inside else width] for name in left]
        blocks.append({"width": width, "stride": plan["stride"], "ops": ops})
    last = len(blocks) - 1
    mix = norm_widths(net.get_submodule(f"heads.{last}"))[0]
    return {**whole, "stem": [stem[0], stem[-1]], "blocks": blocks, "mix": mix, "heads": [last]}


def check_description(config: Mapping[str, object]) -> dict[str, Any]:
    """Return a configuration of :class:`Mobile`, or raise ModelError if it is invalid; builds nothing."""
    data: Any = config
    with explain_description("blocks"):
        blocks, shape = data["blocks"], data["shape"]
        sizes = [*shape, data["classes"], *data["stem"], data["stride"], data["mix"]]
        sizes += [size for plan in blocks for size in (plan["width"], plan["stride"], *(mid for _, mid in plan["ops"]))]
        names = [[name for name, _ in plan["ops"]] for plan in blocks]
        before = [data["stem"][-1], *(plan["width"] for plan in blocks)]
        skips = [
            plan["stride"] == 1 and plan["width"] == width
            for plan, width, ops in zip(blocks, before, names, strict=False)
            if "skip" in ops
        ]
        right = (
            len(shape) == 3
            and len(data["stem"]) == 2
            and 0 < len(blocks) <= 128
            and all(0 < len(ops) == len({*ops}) and {*ops} <= {*OPERATIONS} for ops in names)
            and all(plan["stride"] in (1, 2) for plan in blocks)
            and all(type(at) is int and 0 <= at < len(blocks) for at in data["heads"])
            and len(blocks) - 1 in data["heads"]
        )
    check_sizes("blocks", sizes)
    if not right:
        raise ModelError("not the description of a network of blocks: see regrow.nets.mobile.Mobile for what it holds")
    if not all(skips):
        raise ModelError("skip is for blocks of stride 1 that are as wide as what they read; leave it out elsewhere")
    return data
