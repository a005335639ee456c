"""Networks of inverted bottlenecks (ProxylessNAS space), built from a configuration: super-network or result.

The space is that of ProxylessNAS (Cai, Zhu, Han, arXiv 1812.00332): a stem, six stages of blocks, each block a sum of
any number of inverted bottlenecks and, where it keeps the form of its input, of that input itself, and a classifier.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from itertools import count
from typing import Any

from torch import Tensor, nn

from regrow.core.candidates import Candidates
from regrow.nets import staged
from regrow.nets.loaded import ModelError
from regrow.nets.staged import StagedNetwork, norm_widths

# Bottlenecks mb{kernel}e{expansion ratio}, with the ratio before any cut, and the identity.
OPERATIONS = ("mb3e3", "mb5e3", "mb7e3", "mb3e6", "mb5e6", "mb7e6", "skip")

MOST_BLOCKS = 128

# Width, blocks and stride of each stage of the paper's space; its stem has 32 and 16 channels, its last layer 1280.
STAGES = ((24, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1))


class Bottleneck(nn.Sequential):
    """Inverted bottleneck: 1 × 1 convolution to ``mid`` channels, depthwise, 1 × 1 to ``after``, with BatchNorms.

    After the first two there is a ReLU6.
    """

    def __init__(self, before: int, mid: int, after: int, kernel: int, stride: int) -> None:
        super().__init__(nn.Conv2d(before, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6())
        self.extend(_depthwise(mid, after, kernel, stride))


def _depthwise(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
    """Build the layers of a depthwise and a 1 × 1 convolution to ``after`` channels, with BatchNorms, ReLU6 between."""
    return [
        nn.Conv2d(before, before, kernel, stride, kernel // 2, groups=before, bias=False),
        nn.BatchNorm2d(before),
        nn.ReLU6(),
        nn.Conv2d(before, after, 1, bias=False),
        nn.BatchNorm2d(after),
    ]


def build_block(before: int, plan: Mapping[str, Any]) -> Candidates:
    """Build the candidate operations of a block on ``before`` channels.

    ``plan`` has ``width`` (channels out), ``stride`` and ``ops``: a list of [name, channels inside]. The block is
    called with its input twice: ``skip`` reads the first, bottlenecks the second, so that they share no softmax in a
    search.
    """
    ops, sources = dict[str, nn.Module](), []
    for name, mid in plan["ops"]:
        is_skip = name == "skip"
        # The kernel size is the third character, as of mb5e3.
        ops[name] = nn.Identity() if is_skip else Bottleneck(before, mid, plan["width"], int(name[2]), plan["stride"])
        sources.append(0 if is_skip else 1)
    return Candidates(ops, sources)


class Mobile(StagedNetwork):
    """A network of blocks: a stem, blocks, and classifiers behind the last block and the end of each stage.

    ``config`` holds ``shape`` of an input ``[C, H, W]``, ``classes``, ``stem`` (its two widths), ``stride`` of the
    stem, ``blocks`` (the ``plan`` of each :func:`build_block`), ``mix`` (channels of the 1 × 1 convolution before the
    last classifier) and ``heads``: indices of the blocks that a classifier follows, ascending.
    """

    parts_name = "blocks"

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        check_description(config)
        (first, width), blocks = config["stem"], config["blocks"]
        self.stem = staged.build_stem(config, first).append(nn.ReLU6()).extend(_depthwise(first, width, 3, 1))
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleDict()
        for i, plan in enumerate(blocks):
            self.blocks.append(build_block(width, plan))
            width = channels = plan["width"]
            if i in config["heads"]:
                self.heads[str(i)] = head = nn.Sequential()
                if i == len(blocks) - 1:
                    channels = config["mix"]
                    head.extend([nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6()])
                head.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config["classes"])])

    def run_part(self, part: Callable[..., Tensor], first: Tensor, second: Tensor) -> Tensor:
        """Return the output of a block for that of the block before it, ``second``; ``first`` is not used."""
        return part(second, second)


def supernet_config(
    shape: Sequence[int],
    classes: int,
    *,
    width: int = 24,
    blocks: int = 4,
    stride: int = 2,
    heads: Sequence[int] = (),
    operations: Sequence[str] = OPERATIONS,
) -> dict[str, Any]:
    """Return the super-network's configuration for :class:`Mobile`; the defaults are those of the paper.

    ``shape``: of an input, ``[C, H, W]``; ``width``: the channels of the first stage, from which all other widths of
    ``STAGES`` are scaled, in multiples of 4. ``blocks``: their number per stage (the last stage has one); ``stride``:
    of the stem; ``heads``: indices of blocks that a classifier follows, since a stage of the search ends there. The
    last block has one anyway. A block that changes the shape of its input has no ``skip``.

    >>> config = supernet_config((3, 32, 32), 10, width=8, blocks=1)
    >>> [plan["width"] for plan in config["blocks"]], config["stem"], config["mix"]
    ([8, 12, 28, 32, 64, 108], [12, 4], 428)
    """

    def scaled(channels: int) -> int:
        return max(4, 4 * round(channels * width / STAGES[0][0] / 4))

    stem = [scaled(32), scaled(16)]
    before, plans = stem[1], list[dict[str, Any]]()
    for channels, paper_blocks, first_stride in STAGES:
        after = scaled(channels)
        for i in range(blocks if paper_blocks > 1 else 1):
            block_stride = first_stride if i == 0 else 1
            names = [name for name in operations if name != "skip" or (block_stride == 1 and before == after)]
            ops = [[name, after if name == "skip" else int(name[-1]) * before] for name in names]
            plans.append({"width": after, "stride": block_stride, "ops": ops})
            before = after
    config = {"shape": [*shape], "classes": classes, "stem": stem, "stride": stride, "blocks": plans}
    return {**config, "mix": scaled(1280), "heads": sorted({*heads, len(plans) - 1})}


def thin_config(config: Mapping[str, Any], before: int, share: float) -> dict[str, Any]:
    """Return a configuration with a fraction ``share`` of the operations in its first ``before`` blocks.

    As after a stage of a search: the operations of these blocks together keep this fraction, rounded up and spread
    evenly; each block keeps at least one. ``config`` is not changed.

    >>> config = thin_config(supernet_config((3, 8, 8), 2, blocks=1), before=2, share=0.3)
    >>> [[name for name, _ in plan["ops"]] for plan in config["blocks"][:3]]
    [['mb3e3', 'mb3e6'], ['mb3e3', 'mb5e6'], ['mb3e3', 'mb5e3', 'mb7e3', 'mb3e6', 'mb5e6', 'mb7e6']]
    """
    blocks, numbers = list(config["blocks"]), count()
    for i, plan in enumerate(blocks[:before]):
        kept = [op for op in plan["ops"] if staged.is_spread(next(numbers), share)]
        blocks[i] = {**plan, "ops": kept or plan["ops"][:1]}
    return {**config, "blocks": blocks}


def describe_result(net: Mobile, config: Mapping[str, Any], gone: Container[str]) -> dict[str, Any]:
    """Return the configuration that builds the cut network ``net`` anew, in its present widths.

    ``config``: the super-network's; ``gone``: the paths of the operations that were dropped from it. The result has the
    last classifier alone.
    """
    stem, blocks = norm_widths(net.stem), list[dict[str, Any]]()
    width = stem[-1]
    for i, plan in enumerate(config["blocks"]):
        names = [name for name, _ in plan["ops"] if f"blocks.{i}.ops.{name}" not in gone]
        norms = {name: norm_widths(net.get_submodule(f"blocks.{i}.ops.{name}")) for name in names if name != "skip"}
        width = next((widths[-1] for widths in norms.values()), width)  # of a lone skip, that of the block before
        ops = [[name, norms[name][0] if name in norms else width] for name in names]
        blocks.append({"width": width, "stride": plan["stride"], "ops": ops})
    last = len(blocks) - 1
    mix = norm_widths(net.get_submodule(f"heads.{last}"))[0]
    return {**config, "stem": [stem[0], stem[-1]], "blocks": blocks, "mix": mix, "heads": [last]}


def check_description(config: Mapping[str, Any]) -> None:
    """Raise ModelError unless ``config`` is one that :class:`Mobile` can be built from; builds nothing."""
    with staged.explain_description("blocks"):
        blocks = config["blocks"]
        sizes = [*config["shape"], config["classes"], *config["stem"], config["stride"], config["mix"]]
        valid = 0 < len(blocks) <= MOST_BLOCKS and len(config["stem"]) == 2 and staged.heads_fit(config, len(blocks))
        before = config["stem"][-1]
        for plan in blocks:
            width, stride, names = plan["width"], plan["stride"], [name for name, _ in plan["ops"]]
            sizes += [width, stride, *(mid for _, mid in plan["ops"])]
            # At least one operation, all known, none twice.
            valid &= stride in (1, 2) and 0 < len(names) == len({*names} & {*OPERATIONS})
            valid &= "skip" not in names or (stride == 1 and width == before)
            before = width
        staged.check_sizes("blocks", sizes)
        if not valid:
            raise ModelError("not the description of a network of blocks: see regrow.nets.mobile.Mobile")
