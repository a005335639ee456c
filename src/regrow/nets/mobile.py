"""Networks of inverted bottlenecks (ProxylessNAS space), built from a configuration: super-network or result.

The space is that of ProxylessNAS (Cai, Zhu, Han, arXiv 1812.00332): a stem, six stages of blocks, each block a sum of
any number of inverted bottlenecks and, where it keeps the form of its input, of that input itself, and a classifier.
"""

from collections.abc import Container, Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from regrow.core.candidates import Candidates, Prefix, candidates_in
from regrow.nets.errors import ModelError
from regrow.nets.recomputed import again

OPERATIONS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")
"""The candidates: bottlenecks ``mb{kernel}e{expansion ratio}``, with the ratio before any cut, and ``skip``."""

STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))
"""Width, blocks and stride of each stage of the paper's space; its stem has 32 and 16 channels, its last layer 1280."""

MOST = 2**14


class BlockPlan(TypedDict):
    """A block: its channels, its stride, and its operations as (name, inner channels)."""

    width: int
    stride: int
    ops: list[list[str | int]]


class MobileConfig(TypedDict):
    """The configuration of :class:`Mobile`, as JSON data."""

    shape: list[int]
    classes: int
    stem: list[int]
    stride: int
    blocks: list[BlockPlan]
    mix: int
    heads: list[int]


def _operations(plan: BlockPlan) -> list[tuple[str, int]]:
    """Return the name and inner channels of each operation of a block."""
    return [(str(name), int(mid)) for name, mid in plan["ops"]]


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


def block(before: int, plan: BlockPlan) -> Candidates:
    """Build the candidate operations of a block.

    ``skip`` reads a separate input, so that it does not compete with bottlenecks.

    Args:
        before: Channels in.
        plan: ``width`` (channels out), ``stride`` and ``ops``, a list of ``[name, mid]`` with the channels inside.
    """
    ops, sources = dict[str, nn.Module](), []
    for name, mid in _operations(plan):
        skips = name == "skip"
        ops[name] = nn.Identity() if skips else Bottleneck(before, mid, plan["width"], int(name[2]), plan["stride"])
        sources.append(0 if skips else 1)
    return Candidates(ops, sources)


class Mobile(nn.Module):
    """A network of blocks: a stem, blocks, and classifiers behind the last block and the end of each stage.

    If ``recomputed`` is set, blocks are computed again in the backward pass (gradient checkpointing), to save memory.

    Args:
        config: ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (its two widths), ``stride`` of the stem,
            ``blocks`` as :func:`block` takes them, ``mix`` (channels of the 1 × 1 convolution before the last
            classifier) and ``heads``: indices of the blocks that a classifier follows, ascending.

    Raises:
        ModelError: If the configuration is invalid, or its sizes do not fit each other.
    """

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
        self.recomputed = False
        self.active: int | None = None
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

    def upto(self, x: Tensor, last: int) -> Tensor:
        """Return the logits, ``[N, classes]``, of the classifier behind block ``last``; later blocks do not run.

        Args:
            x: ``[N, C, H, W]``.
            last: The index of a block that a classifier follows.
        """
        return self._heads(x, [last])[0]

    def within(self, name: str, last: int) -> bool:
        """Whether a parameter is used by :meth:`upto`.

        Args:
            name: The parameter's name.
            last: The index of the last block that runs.
        """
        part, _, rest = name.partition(".")
        number = int(rest.partition(".")[0])
        return part == "stem" or (number <= last if part == "blocks" else number == last)

    def needed(self) -> list[tuple[str, ...]]:
        """Return sets of operations of each of which one must stay: those of each block."""
        return [*candidates_in(self).values()]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the logits behind block ``active``, or of every classifier if ``active`` is ``None``."""
        result = self._heads(x, sorted(map(int, self.heads)) if self.active is None else [self.active])
        return result[0] if len(result) == 1 else tuple(result)

    def _heads(self, x: Tensor, wanted: Sequence[int]) -> list[Tensor]:
        result = []
        # Depthwise convolutions are faster in this layout on a CPU, most of all those of few channels.
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i in range(wanted[-1] + 1):
            run = partial(again, self.blocks[i]) if self.recomputed and self.training else self.blocks[i]
            x = run(x, x)
            if i in wanted:
                result.append(self.heads[str(i)](x))
        return result


def supernet(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 24,
    blocks: int = 4,
    stride: int = 2,
    heads: Sequence[int] = (),
    operations: Sequence[str] = OPERATIONS,
) -> MobileConfig:
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
    before, result = stem[1], list[BlockPlan]()
    for channels, many, first in STAGES:
        after = scaled(channels)
        for i in range(blocks if many > 1 else 1):
            step = first if i == 0 else 1
            names = [name for name in operations if name != "skip" or (step == 1 and before == after)]
            ops: list[list[str | int]] = [[name, after if name == "skip" else int(name[-1]) * before] for name in names]
            result.append({"width": after, "stride": step, "ops": ops})
            before = after
    ends = sorted({*heads, len(result) - 1})
    return {
        "shape": [*shape],
        "classes": classes,
        "stem": stem,
        "stride": stride,
        "blocks": result,
        "mix": scaled(1280),
        "heads": ends,
    }


def thin(config: MobileConfig, before: int, share: float) -> MobileConfig:
    """Return a configuration with a fraction of the operations left in its first blocks, as a search may leave it.

    Args:
        config: The configuration of a network.
        before: The number of blocks, from the first, that are thinned; each keeps at least one operation.
        share: The fraction of their operations that stays, rounded up.

    >>> config = thin(supernet((3, 8, 8), 2, blocks=1), before=2, share=0.3)
    >>> [[name for name, _ in plan["ops"]] for plan in config["blocks"][:3]]
    [['mb3e3', 'mb3e6'], ['mb3e3', 'mb5e6'], ['mb3e3', 'mb5e3', 'mb7e3', 'mb3e6', 'mb5e6', 'mb7e6']]
    """
    result, n = list[BlockPlan](), 0
    for i, plan in enumerate(config["blocks"]):
        kept = []
        for op in plan["ops"]:
            if i >= before or ceil(round((n + 1) * share, 9)) > ceil(round(n * share, 9)):
                kept.append(op)
            n += 1
        result.append({**plan, "ops": kept or plan["ops"][:1]})
    return {**config, "blocks": result}


def prefix(config: MobileConfig, first: int, last: int, share: float) -> Prefix:
    """Build the network up to a block, as a stage of a search runs it.

    Args:
        config: The configuration of the whole network.
        first: The index of the first block that has all its operations; earlier ones are thinned.
        last: The index of the last block that runs.
        share: The fraction of the operations that earlier blocks keep.
    """
    heads = sorted({*config["heads"], last})
    return Prefix(Mobile(thin({**config, "heads": heads}, first, share)), last)


def describe(net: Mobile, config: Mapping[str, object], gone: Container[str]) -> MobileConfig:
    """Return the configuration that builds exactly what is left of a network, with its last classifier alone.

    Args:
        net: The network after cuts.
        config: The configuration that it was built from.
        gone: Paths of the operations that were dropped.
    """
    stem = [_features(net.stem, 1), _features(net.stem, -1)]
    whole, width, result = check_description(config), stem[1], list[BlockPlan]()
    for i, plan in enumerate(whole["blocks"]):
        left = [(name, f"blocks.{i}.ops.{name}") for name, _ in _operations(plan)]
        left = [(name, path) for name, path in left if path not in gone]
        inside = {name: _features(net.get_submodule(path), 1) for name, path in left if name != "skip"}
        after = [_features(net.get_submodule(path), -1) for name, path in left if name != "skip"]
        width = after[0] if after else width
        ops: list[list[str | int]] = [[name, inside.get(name, width)] for name, _ in left]
        result.append({"width": width, "stride": plan["stride"], "ops": ops})
    last = len(result) - 1
    mix = _features(net.get_submodule(f"heads.{last}"), 1)
    return {**whole, "stem": stem, "blocks": result, "mix": mix, "heads": [last]}


def _features(module: nn.Module, at: int) -> int:
    """Return the channels of the BatchNorm at an index of a sequential module."""
    assert isinstance(module, nn.Sequential)
    norm = module[at]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm.num_features


def check_description(config: Mapping[str, object]) -> MobileConfig:
    """Return a configuration of :class:`Mobile`, or raise ModelError if it is invalid; builds nothing.

    Args:
        config: The configuration.

    Raises:
        ModelError: If it is invalid; says what is wrong.
    """
    data: Any = config
    try:
        blocks, shape = data["blocks"], data["shape"]
        sizes = [*shape, data["classes"], *data["stem"], data["stride"], data["mix"]]
        sizes += [size for plan in blocks for size in (plan["width"], plan["stride"], *(mid for _, mid in plan["ops"]))]
        names = [[name for name, _ in plan["ops"]] for plan in blocks]
        before = [data["stem"][-1], *(plan["width"] for plan in blocks)]
        skips = [
            plan["stride"] == 1 and plan["width"] == wide
            for plan, wide, own in zip(blocks, before, names, strict=False)
            if "skip" in own
        ]
        right = (
            len(shape) == 3
            and len(data["stem"]) == 2
            and 0 < len(blocks) <= 128
            and all(0 < len(own) == len({*own}) and {*own} <= {*OPERATIONS} for own in names)
            and all(plan["stride"] in (1, 2) for plan in blocks)
            and all(type(at) is int and 0 <= at < len(blocks) for at in data["heads"])
            and len(blocks) - 1 in data["heads"]
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"not the description of a network of blocks: {error!r:.80}") from None
    if odd := [size for size in sizes if type(size) is not int or not 0 < size <= MOST]:
        raise ModelError(f"a network of blocks has sizes from 1 to {MOST}; got {odd[0]!r:.40}")
    if not right:
        raise ModelError("not the description of a network of blocks: see regrow.nets.mobile.Mobile for what it holds")
    if not all(skips):
        raise ModelError("skip is for blocks of stride 1 that are as wide as what they read; leave it out elsewhere")
    return data
