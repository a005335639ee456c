"""Candidate operations in a network: alternatives that are summed, of which an architecture search keeps some."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class Candidates(nn.Module):
    """Weighted sum of alternative operations, Σ scale_i · op_i(input), of which an architecture search keeps some.

    Put it into your own network where operations can be chosen. Each candidate is a branch that ``Plan.dropping`` can
    drop, whatever it computes, as long as one of them stays.

    Args:
        ops: Name → candidate module; each takes one tensor, and all return the same shape.
        sources: For each candidate, in order, the index of the input that it takes; the first input unless given.
        tied: Group name: candidates of one name and group are kept or dropped together; empty: on their own.
        single: Whether a search keeps exactly one candidate, rather than any number.

    >>> mixed = Candidates({"wide": nn.Upsample(scale_factor=1), "same": nn.Identity()})
    >>> mixed(torch.ones(1, 1, 2)).tolist()
    [[[2.0, 2.0]]]
    """

    def __init__(
        self, ops: Mapping[str, nn.Module], sources: Sequence[int] = (), *, tied: str = "", single: bool = False
    ) -> None:
        super().__init__()
        if (sources and len(sources) != len(ops)) or not ops:
            raise ValueError(f"{len(ops)} candidates with {len(sources)} sources: one for each, at least one candidate")
        try:
            self.ops = nn.ModuleDict(ops)
        except KeyError as error:  # "type", "double" and the like are names of a module's own
            raise ValueError(f"a candidate cannot have this name ({error.args[0]}); take another") from None
        self.sources = tuple(sources) or (0,) * len(ops)
        self.tied, self.single = tied, single
        self.scale = nn.Parameter(torch.ones(len(ops)))

    def reset_parameters(self) -> None:
        """Set every scale to 1."""
        nn.init.ones_(self.scale)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the scaled sum of the candidates that were not dropped; raise ``ValueError`` if none is left.

        Args:
            *inputs: The tensors that ``sources`` refers to.
        """
        total = None
        for i, (op, source) in enumerate(zip(self.ops.values(), self.sources, strict=True)):
            value = op(inputs[source])
            if value is not None:  # one that was dropped gives nothing
                total = value * self.scale[i] if total is None else total + value * self.scale[i]
        if total is None:
            raise ValueError(f"all of {', '.join(self.ops)} were dropped; one of them must stay")
        return total


def fold_scales(model: nn.Module) -> None:
    """Multiply each candidate's scale into its last layer, in place, and set it to 1; outputs are unchanged.

    Scales of candidates that end otherwise (in a pool, an identity, a user's own module, a layer used twice) are left.

    >>> mixed = Candidates({"one": nn.Conv1d(1, 1, 1), "same": nn.Identity()})
    >>> with torch.no_grad():
    ...     _ = mixed.scale.fill_(0.5)
    >>> fold_scales(mixed)
    >>> mixed.scale.tolist()
    [1.0, 0.5]
    """
    held = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for node in find_candidates(model).values():
            for i, end in enumerate(node.ops.values()):
                while isinstance(end, nn.Sequential) and len(end) and _is_plain(end):
                    end = end[-1]
                parameters = dict(end.named_parameters())
                if not isinstance(end, _LINEAR) or not _is_plain(end) or parameters.keys() - {"weight", "bias"}:
                    continue
                if parameters and all(held[id(parameter)] == 1 for parameter in parameters.values()):
                    for parameter in parameters.values():
                        parameter.mul_(node.scale[i])
                    node.scale[i] = 1.0


def _is_plain(module: nn.Module) -> bool:
    """Whether a module computes what its torch class does: no overridden forward, no forward hook."""
    return type(module).forward.__module__.startswith("torch.nn.modules") and not module._forward_hooks


# Layers whose output is linear in weight and bias together: scaling both scales the output
_LINEAR = (nn.Linear, _ConvNd, _BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Staged(Protocol):
    """Interface of a network searchable in stages: its first parts can run alone, with a classifier behind them.

    ``active``: the index of the last part that runs in a call, ``None``: all run; ``recomputed``: whether the backward
    pass recomputes activations, to save memory.
    """

    recomputed: bool
    active: int | None

    def logits_at(self, x: Tensor, last: int) -> Tensor:
        """Return the logits ``[N, classes]`` of the classifier behind part ``last``; later parts do not run."""

    def uses_parameter(self, name: str, last: int) -> bool:
        """Whether a parameter is used by :meth:`logits_at` with this ``last``."""

    def required_groups(self) -> list[tuple[str, ...]]:
        """Return sets of paths of candidate operations; a search must keep at least one of each set."""


@contextmanager
def all_parts_active(model: nn.Module) -> Iterator[None]:
    """Context manager in which a staged network runs all its parts, as tracing requires; others are left alone."""
    active = getattr(model, "active", None) if hasattr(model, "logits_at") else None
    if active is None:
        yield
        return
    staged = cast(Staged, model)
    try:
        staged.active = None
        yield
    finally:
        staged.active = active


class Prefix(nn.Module):
    """The :class:`Staged` network ``net`` cut short: runs the parts up to index ``last``, which is included.

    Later parts stay in ``net`` with their parameters.
    """

    def __init__(self, net: nn.Module, last: int) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, classes]`` of the classifier behind the last part."""
        return cast(Staged, self.net).logits_at(x, self.last)

    def count_parameters(self) -> int:
        """Return the number of parameters (entries) of the parts that run."""
        net = cast(Staged, self.net)
        return sum(p.numel() for name, p in self.net.named_parameters() if net.uses_parameter(name, self.last))


def find_candidates(model: nn.Module) -> dict[str, Candidates]:
    """Return module path → :class:`Candidates`, for all in a network, in its order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Candidates)}


def candidate_paths(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return path of a :class:`Candidates` → the paths of its operations in order, dropped ones included.

    >>> candidate_paths(nn.Sequential(Candidates({"a": nn.Identity(), "b": nn.ReLU()})))
    {'0': ('0.ops.a', '0.ops.b')}
    """
    nodes = find_candidates(model).items()
    return {path: tuple(f"{path}.ops.{name}".lstrip(".") for name in node.ops) for path, node in nodes}


def tied_operations(model: nn.Module) -> dict[str, str]:
    """Return path of an operation tied to an earlier one → path of the first of its group (``Candidates(tied=…)``).

    Raises ``ValueError`` if ``Candidates`` of one group have other names or another order of operations.

    >>> tied_operations(nn.Sequential(*(Candidates({"a": nn.Identity()}, tied="edge") for _ in range(2))))
    {'1.ops.a': '0.ops.a'}
    """
    nodes, paths = find_candidates(model), candidate_paths(model)
    first: dict[str, str] = {}
    result: dict[str, str] = {}
    for path, node in nodes.items():
        leader = first.setdefault(node.tied, path)
        if node.tied and leader != path:
            if list(node.ops) != list(nodes[leader].ops):
                raise ValueError(
                    f"candidates tied by {node.tied!r} must have equal operations in order; {path} has others"
                )
            result |= dict(zip(paths[path], paths[leader], strict=True))
    return result


def exclusive_sets(model: nn.Module) -> list[tuple[str, ...]]:
    """Return per ``Candidates(single=True)`` the paths of its operations, of which a search keeps exactly one."""
    nodes = find_candidates(model)
    return [paths for path, paths in candidate_paths(model).items() if nodes[path].single]
