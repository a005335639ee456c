"""Parameters that only training reaches: auxiliary heads, masks for tokens."""

from dataclasses import replace

from torch import nn

from regrow.axes import Example
from regrow.tracing import dimensions as d
from regrow.tracing.capture import TraceError, in_training, module_of
from regrow.tracing.folds import size_divided_by
from regrow.tracing.rules import POINTWISE, RULES
from regrow.tracing.walk import Walk, walk


def reach(model: nn.Module, example: Example, w: Walk) -> None:
    """Follow what the network does in training too, where that reaches parameters which evaluation leaves out.

    Both walks are about the same parameters, so what the second one ties, freezes or marks holds in the first. Sizes
    that training alone divides by have no fold: they are frozen.

    Args:
        model: The network.
        example: What to run it on.
        w: The walk over what it does in evaluation; it learns what the second one finds.
    """
    if not w.capture.unused or w.capture.decisions is not None:
        return
    try:
        more = in_training(model, example)
    except TraceError:
        return
    left = tuple(name for name in w.capture.unused if name in more.unused)
    if len(left) == len(w.capture.unused):
        return
    second = walk(more, RULES, POINTWISE, known={name: w.dims[node] for node, name in w.capture.states.items()})
    alike = {(module_of(node), kind) for node, kind in w.norms}
    for node, kind in second.norms:
        if (module_of(node), kind) not in alike:
            for expr in size_divided_by(second, node, kind):
                d.freeze(expr, second.why(node, "its size is divided by in training"))
    for place, roles in second.roles.items():
        w.roles.setdefault(place, set()).update(roles)
    w.also += [(second.of(one.operand)[one.dim], one.weight) for one in second.readings]
    w.literals += second.literals
    w.groups += second.groups
    w.equal += second.equal
    w.weights += [name for name in second.weights if name not in w.weights]
    w.tables += [name for name in second.tables if name not in w.tables]
    w.notes += second.notes
    w.capture = replace(w.capture, unused=left)
