"""Trace what a network does in training mode only: auxiliary heads, token masks, code behind ``if self.training``."""

from collections.abc import Iterator
from dataclasses import replace
from types import CodeType

from torch import nn

from regrow.core.axes import Example
from regrow.tracing.capture import Capture, TraceError, in_training
from regrow.tracing.folds import size_divided_by
from regrow.tracing.model_state import names_in
from regrow.tracing.nodes import module_of, op_name
from regrow.tracing.rules import walk
from regrow.tracing.steps import operations
from regrow.tracing.walk import Walk


def trace_training(model: nn.Module, example: Example, w: Walk) -> Capture | None:
    """Record and walk a network in training mode too, and merge what that ties or freezes into the evaluation walk.

    It does so where training uses parameters that evaluation leaves out, or where the network's own code reads its mode
    and other operations run then. Both walks are about the same parameters, so what the second one ties, freezes or
    marks holds in the first. Sizes that training alone divides by have no fold: they are frozen.
    """
    if w.capture.decisions is not None or not (w.capture.unused or looks_at_mode(model)):
        return None
    try:
        more = in_training(model, example)
    except TraceError:
        return None
    left = tuple(name for name in w.capture.unused if name in more.unused)
    if len(left) == len(w.capture.unused) and _names(w.capture) == _names(more):
        return None
    second = walk(more, known={name: w.of(node) for node, name in w.capture.states.items()})
    alike = {(module_of(node), kind) for node, kind in w.norms}
    for node, kind in second.norms:
        if (module_of(node), kind) not in alike:
            second.freeze(node, "its size is divided by in training", *size_divided_by(second, node, kind))
    for place, roles in second.roles.items():
        w.roles.setdefault(place, set()).update(roles)
    w.also += [(second.of(one.operand)[one.dim], one.weight) for one in second.readings]
    w.literals += second.literals
    w.groups += second.groups
    w.equal += second.equal
    w.weights |= second.weights
    w.tables += [name for name in second.tables if name not in w.tables]
    w.notes += second.notes
    w.capture = replace(w.capture, unused=left)
    return more


def looks_at_mode(model: nn.Module) -> bool:
    """Whether a network's own code (not torch's) reads ``training``.

    >>> class Noisy(nn.Module):
    ...     def forward(self, x):
    ...         return x + x.std() if self.training else x
    >>> looks_at_mode(nn.Sequential(Noisy())), looks_at_mode(nn.Dropout(0.5))
    (True, False)
    """
    return any("training" in names_in(code) for code in _code(model))


def _code(model: nn.Module) -> Iterator[CodeType]:
    """Yield the code of a network's own classes, and of the functions that its modules hold."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    defined = [base for base in classes if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    for value in (value for holder in (*defined, *model.modules()) for value in vars(holder).values()):
        code = getattr(getattr(value, "__func__", value), "__code__", None)
        if isinstance(code, CodeType):
            yield code


def _names(recorded: Capture) -> list[str]:
    return [name for node in operations(recorded) if (name := op_name(node)) not in _DROPOUT]


_DROPOUT = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
"""Operations that are not compared: evaluation may leave them out or not, with the same result."""
