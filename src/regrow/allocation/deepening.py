"""Decide where copies of blocks are inserted: evenly among the blocks of each stack."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from regrow.core.amounts import Increase
from regrow.core.insertion import BlockCopy, Insertion, Stack


def deepening(stacks: Mapping[str, Stack], increases: Mapping[str, Increase]) -> dict[str, Insertion]:
    """Return path of a stack → the copies inserted into it.

    The blocks that can be copied are divided into as many groups as there are new blocks, and each group is followed by
    a copy of its last block (block expansion, Wu et al., arXiv 2401.02415).

    Args:
        stacks: The network's stacks.
        increases: Path of a stack, or a pattern of paths → how many blocks it gains; a percentage is one of its present
            blocks. ``"*"`` is every stack.

    Raises:
        ValueError: If the network has no stack, or none of a name.

    >>> stack = Stack(4, {i: ("last.weight",) for i in range(4)})
    >>> [(copy.position, copy.of) for copy in deepening({"layers": stack}, {"*": Increase(2)})["layers"].copies]
    [(2, 1), (5, 3)]
    """
    if not stacks:
        raise ValueError(
            "the network has no stack of residual blocks of which a copy could give its input unchanged; widen it "
            "instead, for example with --mlp or --channels"
        )
    result: dict[str, Insertion] = {}
    for name, increase in increases.items():
        found = [path for path in stacks if path == name or fnmatchcase(path, name)]
        if not found:
            raise ValueError(f"no stack of blocks is named {name!r}; there are {', '.join(stacks)}")
        result |= {path: _spread(stacks[path], increase.of(stacks[path].size)) for path in found}
    return result


def _spread(stack: Stack, many: int) -> Insertion:
    blocks = sorted(stack.zeros)
    ends = [blocks[-(-(i + 1) * len(blocks) // many) - 1] for i in range(many)]
    copies = tuple(BlockCopy(of + 1 + i, of, stack.zeros[of]) for i, of in enumerate(ends))
    return Insertion(stack.size, copies)
