"""Decide how many units axes gain and where copies of blocks are inserted: by kind, by name, or by need."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil
from typing import Literal

from regrow.core.amounts import Increase
from regrow.core.axes import Axis, AxisGraph, Role, axes_in, common_block, matches
from regrow.core.change import BlockCopy, Insertion, Stack

Part = Literal["mlp", "heads", "channels"]
_NAMES = {"mlp": "MLP", "heads": "attention heads", "channels": "inner channels of convolutions"}


@dataclass(frozen=True)
class Widening:
    """Which axes gain units: ``grow``, key → how many; ``refused``, key → why one that was asked for gains none."""

    grow: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def plan_widening(axes: AxisGraph, parts: Mapping[str, Increase], named: Mapping[str, Increase]) -> Widening:
    """Return how many units each axis gains; raise ``ValueError`` where no axis fits or can be widened.

    ``parts``: kind of axes (``mlp``, ``heads``, ``channels``) → by how many units, or percent, each of them grows;
    ``named``: axis key or pattern → the same, with precedence. Sizes are rounded up to multiples that axes need.
    """
    increases: dict[str, Increase] = {}
    refused: dict[str, str] = {}
    kinds = classify_axes(axes) if parts else {}
    for part, increase in parts.items():
        members = [axes[key] for key, kind in kinds.items() if kind == part]
        if not members:
            raise ValueError(f"the network has no {_NAMES[part]}; `regrow show` lists its axes")
        increases |= dict.fromkeys(_select_widenable(members, refused, f"the {_NAMES[part]}"), increase)
    for name, increase in named.items():
        increases |= dict.fromkeys(_select_widenable(_find_axes(axes, name), refused, f"axis {name!r}"), increase)
    grow = {}
    for key, increase in increases.items():
        size, multiple = axes[key].size, axes[key].multiple
        if added := ceil((size + increase.of(size)) / multiple) * multiple - size:
            grow[key] = added
    return Widening(grow, {key: why for key, why in refused.items() if key not in increases})


def classify_axes(axes: AxisGraph) -> dict[str, Part]:
    """Return axis key → kind, of hidden neurons of an MLP, attention heads and inner channels of convolutions alone.

    An axis to which a residual connection adds is none of them. Where convolutions lie in numbered blocks, channels
    outside of them (the first layer's) do not count.
    """
    steps, heads = axes.steps, _find_head_axes(axes)
    readers: dict[int | str, int] = {}  # the first operation that reads a parameter, or the result of an operation
    for number, step in enumerate(steps):
        for operand in step.operands:
            readers.setdefault(operand, number)

    def readers_of(axis: Axis, role: Role) -> list[int]:
        """Return the operations that read the parameters with a role on an axis."""
        names = dict.fromkeys(axes.ties.get(slot.name, slot.name) for slot in axis.slots if slot.role is role)
        return [readers[name] for name in names if name in readers]

    def convolves(step: int) -> bool:
        return "conv" in steps[step].op

    def adds(step: int) -> bool:
        """Whether the next operation that combines the result of one with another result is a sum."""
        while step in readers:
            step = readers[step]
            if sum(isinstance(operand, int) for operand in steps[step].operands) > 1:
                return steps[step].op in ("add", "sub")
        return False

    result: dict[str, Part] = {}
    channels = []
    for axis in axes:
        producers, consumers = readers_of(axis, Role.PRODUCES), readers_of(axis, Role.CONSUMES)
        if axis.key in heads:
            result[axis.key] = "heads"
            continue
        if _lies_in(axis, heads, axes) or not producers or not consumers or not {*producers}.isdisjoint(consumers):
            continue
        if any(adds(step) for step in producers if step > min(consumers)):
            continue
        if all(map(convolves, producers)):
            channels.append(axis)
        elif not any(map(convolves, (*producers, *consumers))):
            result[axis.key] = "mlp"
    inner = [axis for axis in channels if common_block([slot.name for slot in axis.slots])]
    return result | dict.fromkeys((axis.key for axis in inner or channels), "channels")


def _find_head_axes(axes: AxisGraph) -> set[str]:
    """Return the keys of the outermost axes that lie in the heads' dimension of an attention, the third from the end.

    Of an attention whose heads are frozen, these are the outermost frozen axes that its weights make.
    """
    heads: set[str] = set()
    attentions: set[str] = set()
    for step in axes.steps:
        if step.op in ("scaled_dot_product_attention", "softmax", "_softmax"):
            for dims in step.shapes:
                if dims and len(dims) > 3:
                    attentions.add(step.module)
                    heads.update(axes_in(dims[-3]))
    for axis in axes:
        producers = {slot.name.rpartition(".")[0] for slot in axis.slots if slot.role is Role.PRODUCES}
        if not axis.free and producers and producers <= attentions - {""}:
            heads.add(axis.key)
    return {key for key in heads if not _lies_in(axes[key], heads, axes)}


def _lies_in(axis: Axis, others: Iterable[str], axes: AxisGraph) -> bool:
    """Whether an axis lies, at any depth, inside one of the axes with keys ``others``."""
    inside = axis.inside
    while inside:
        if inside in others:
            return True
        inside = axes[inside].inside if inside in axes.axes else ""
    return False


def _find_axes(axes: AxisGraph, name: str) -> list[Axis]:
    """Return the axis with the key ``name``, or those whose key or all tensors' names match it; ``ValueError`` if none.

    If some that match can be widened and lie in no other axis, only these.
    """
    if name in axes.axes:
        return [axes[name]]
    fitting = [a for a in axes if fnmatchcase(a.key, name) or all(matches(slot.name, name) for slot in a.slots)]
    # A pattern asks for what can be widened: axes inside others and frozen ones are left out if any other fits.
    chosen = [axis for axis in fitting if axis.free and not axis.narrow and not axis.inside] or fitting
    if not chosen:
        raise ValueError(f"no axis fits {name!r}; `regrow show` lists the keys of all axes")
    return chosen


def _select_widenable(fitting: Iterable[Axis], refused: dict[str, str], what: str) -> list[str]:
    """Return the keys of axes that can be widened, and add others' reasons to ``refused``; ``ValueError`` if none can.

    ``what`` names the axes in the error.
    """
    keys = []
    for axis in fitting:
        if why := axis.narrow or ("" if axis.free else axis.reason):
            refused[axis.key] = why
        else:
            keys.append(axis.key)
    if not keys:
        key = next(iter(refused))
        raise ValueError(f"{what} cannot be widened: {key}: {refused[key]}; widen other axes, see `regrow show`")
    return keys


def plan_insertions(stacks: Mapping[str, Stack], increases: Mapping[str, Increase]) -> dict[str, Insertion]:
    """Return path of a stack of blocks → the copies inserted into it; raise ``ValueError`` if no stack fits.

    The blocks that can be copied are divided into as many groups as there are new blocks, and each group is followed by
    a copy of its last block (block expansion, Wu et al., arXiv 2401.02415). ``stacks``: path → stack; ``increases``:
    path of a stack, or a pattern of paths (``"*"`` is every stack) → how many blocks it gains; a percentage is one of
    its present blocks.

    >>> stack = Stack(4, {i: ("last.weight",) for i in range(4)})
    >>> [(copy.position, copy.of) for copy in plan_insertions({"layers": stack}, {"*": Increase(2)})["layers"].copies]
    [(2, 1), (5, 3)]
    """
    if not stacks:
        raise ValueError(
            "the network has no stack of residual blocks of which a copy could give its input unchanged; widen it "
            "instead, for example with --mlp or --channels"
        )
    result: dict[str, Insertion] = {}
    for name, increase in increases.items():
        paths = [path for path in stacks if path == name or fnmatchcase(path, name)]
        if not paths:
            raise ValueError(f"no stack of blocks is named {name!r}; there are {', '.join(stacks)}")
        for path in paths:
            stack = stacks[path]
            count, blocks = increase.of(stack.size), sorted(stack.zeros)
            ends = [blocks[-(-(i + 1) * len(blocks) // count) - 1] for i in range(count)]  # the last of each group
            copies = tuple(BlockCopy(of + 1 + i, of, stack.zeros[of]) for i, of in enumerate(ends))
            result[path] = Insertion(stack.size, copies)
    return result


def growable_axes(axes: AxisGraph) -> tuple[Axis, ...]:
    """Return the axes that a learner may widen: neurons of MLPs, and those whose units a single weight produces.

    A residual stream, which several weights produce, is left out.
    """
    kinds, free = classify_axes(axes), [axis for axis in axes.units() if not axis.narrow]
    made = {a.key: len(producing_weights(a, axes)) for a in free}  # 0: by an embedding, whose units cannot be fitted
    return tuple(a for a in free if made[a.key] == 1 or (made[a.key] and kinds.get(a.key) == "mlp"))


def producing_weights(axis: Axis, axes: AxisGraph) -> tuple[str, ...]:
    """Return the names of the weights of linear layers and convolutions that produce an axis's units."""
    made = dict.fromkeys(slot.name for slot in axis.slots if slot.role is Role.PRODUCES)
    return tuple(name for name in made if name in axes.counted)


def plan_growth(
    axes: AxisGraph, exhausted: Iterable[Axis], base: Mapping[str, int], *, share: float, multiple: int, cap: float
) -> dict[str, int]:
    """Return axis key → how many units it gains: ``share`` of its size in ``base``, rounded up to ``multiple``.

    ``exhausted``: the axes that need units, in order; ``base``: axis key → its size at the beginning. An axis is left
    out if the network would have more than ``cap`` times the parameters that it has at sizes ``base``.
    """
    sizes, names = axes.sizes(), axes.parameters - axes.ties.keys()
    most = cap * axes.count_entries(names, {**sizes, **base})
    result: dict[str, int] = {}
    for axis in exhausted:
        added = ceil(ceil(share * base[axis.key]) / multiple) * multiple
        if added and axes.count_entries(names, {**sizes, axis.key: axis.size + added}) <= most:
            sizes[axis.key] += added
            result[axis.key] = added
    return result
