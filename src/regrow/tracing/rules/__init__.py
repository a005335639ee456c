"""How a dimension passes an operation: one small function per operation, in one explicit table."""

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
"""Operation name → rule. Operations tagged as pointwise need no entry."""
