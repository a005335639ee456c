"""Rules of operations: how the dimensions of an operation's result follow from those of its operands.

There is one small function per operation, in one table. Each takes the walk and the operation's node, ties or freezes
the dimensions of the operands, notes which it sums over, and returns the dimensions of the result (a list of them for
several results).
"""

from regrow.tracing.rules import contract, entries, make, norms, picks, recurrent, reduce, regions, repeats, shapes
from regrow.tracing.walk import Rule

POINTWISE: Rule = entries.pointwise

RULES: dict[str, Rule] = {
    **entries.RULES,
    **contract.RULES,
    **norms.RULES,
    **reduce.RULES,
    **shapes.RULES,
    **repeats.RULES,
    **picks.RULES,
    **make.RULES,
    **recurrent.RULES,
    **regions.RULES,
}
"""Operation name → rule. Operations that torch tags as pointwise need no entry."""
