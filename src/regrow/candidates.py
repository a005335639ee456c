"""Candidates: operations of which a search keeps some, summed into one value."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class Candidates(nn.Module):
    """Σ over candidates i of  scale_i · op_i(input of i); a user's own network marks what may be chosen with it.

    Each candidate is a branch that ``Plan.dropping`` can drop, whatever it does, as long as one of them stays.

    Args:
        ops: Name → module; each takes one tensor, and all give the same shape.
        sources: Which of the inputs each one takes, in their order; the first, unless given.
        tied: Candidates of one name, in different places of a network, are decided together; empty: by themselves.
        single: Whether a search leaves one of them, rather than any number.

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
        """Every scale is 1 again."""
        nn.init.ones_(self.scale)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The sum over the candidates that are still there."""
        total = None
        for i, (op, source) in enumerate(zip(self.ops.values(), self.sources, strict=True)):
            value = op(inputs[source])
            if value is not None:  # one that was dropped gives nothing
                total = value * self.scale[i] if total is None else total + value * self.scale[i]
        if total is None:
            raise ValueError(f"all of {', '.join(self.ops)} were dropped; one of them must stay")
        return total


def fold_scales(model: nn.Module) -> None:
    """Candidates that end in a layer take their scale into its weight and bias: it is 1 then, and answers stay.

    Scales of what ends otherwise (a pool, what is left as it is, a module of one's own, a layer held twice) stay.

    >>> mixed = Candidates({"one": nn.Conv1d(1, 1, 1), "same": nn.Identity()})
    >>> with torch.no_grad():
    ...     _ = mixed.scale.fill_(0.5)
    >>> fold_scales(mixed)
    >>> mixed.scale.tolist()
    [1.0, 0.5]
    """
    held = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for node in [one for one in model.modules() if isinstance(one, Candidates)]:
            for i, end in enumerate(node.ops.values()):
                while isinstance(end, nn.Sequential) and len(end) and _plain(end):
                    end = end[-1]
                own = dict(end.named_parameters())
                if not isinstance(end, _LINEAR) or not _plain(end) or not own or own.keys() - {"weight", "bias"}:
                    continue
                if all(held[id(p)] == 1 for p in own.values()):
                    for parameter in own.values():
                        parameter.mul_(node.scale[i])
                    node.scale[i] = 1.0


def _plain(module: nn.Module) -> bool:
    """Whether what a module answers is what torch's own of its kind does."""
    return type(module).forward.__module__.startswith("torch.nn.modules") and not module._forward_hooks


_LINEAR = (nn.Linear, _ConvNd, _BatchNorm, nn.GroupNorm, nn.LayerNorm)
"""Layers whose answer is as many times larger as weight and bias are."""


class Staged(Protocol):
    """What a network offers that can be searched in stages: a part of it runs, with a classifier of its own."""

    recomputed: bool
    """Whether parts are computed anew in the backward pass while it learns, to save memory."""
    active: int | None
    """The last part that runs when the network is called; ``None``: all of it."""

    def upto(self, x: Tensor, last: int) -> Tensor:
        """The logits behind part ``last``; what comes later does not run."""
        ...

    def within(self, name: str, last: int) -> bool:
        """Whether a parameter takes part in :meth:`upto`."""
        ...

    def needed(self) -> list[tuple[str, ...]]:
        """Sets of operations of each of which one must stay."""
        ...


@contextmanager
def run_whole(model: nn.Module) -> Iterator[None]:
    """Inside, a network that runs up to its active part runs as a whole, as it must where it is traced."""
    active = getattr(model, "active", None) if hasattr(model, "upto") else None
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
    """A network that can be searched in stages up to one of its parts, as a network of its own.

    Later parts are there and do not run.

    Args:
        net: The network; a classifier follows part ``last``.
        last: The last part that runs.
    """

    def __init__(self, net: nn.Module, last: int) -> None:
        super().__init__()
        self.net, self.last = net, last

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, classes]``."""
        return cast(Staged, self.net).upto(x, self.last)

    def many(self) -> int:
        """How many parameters take part."""
        net = cast(Staged, self.net)
        return sum(p.numel() for name, p in self.net.named_parameters() if net.within(name, self.last))


def candidates_in(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of each :class:`Candidates` of a network → the paths of its operations, dropped ones too, in order.

    >>> candidates_in(nn.Sequential(Candidates({"a": nn.Identity(), "b": nn.ReLU()})))
    {'0': ('0.ops.a', '0.ops.b')}
    """
    return {
        path: tuple(f"{path}.ops.{name}".lstrip(".") for name in module.ops)
        for path, module in model.named_modules()
        if isinstance(module, Candidates)
    }


def tied_in(model: nn.Module) -> dict[str, str]:
    """Path of each operation that is decided together with an earlier one → the path of the first of those.

    Raises:
        ValueError: If candidates that are tied have not the same names.

    >>> tied_in(nn.Sequential(*(Candidates({"a": nn.Identity()}, tied="edge") for _ in range(2))))
    {'1.ops.a': '0.ops.a'}
    """
    first: dict[str, tuple[str, ...]] = {}
    result: dict[str, str] = {}
    for path, paths in candidates_in(model).items():
        name = _candidates(model, path).tied
        if name and name in first:
            if [one.rpartition(".")[2] for one in paths] != [one.rpartition(".")[2] for one in first[name]]:
                raise ValueError(f"candidates tied by {name!r} have the same operations in the same order; {path} not")
            result |= dict(zip(paths, first[name], strict=True))
        first.setdefault(name, paths)
    return result


def single_in(model: nn.Module) -> list[tuple[str, ...]]:
    """Sets of operations of which a search leaves one."""
    return [paths for path, paths in candidates_in(model).items() if _candidates(model, path).single]


def _candidates(model: nn.Module, path: str) -> Candidates:
    result = model.get_submodule(path)
    assert isinstance(result, Candidates)
    return result
