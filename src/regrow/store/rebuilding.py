"""While saving, find changes of a network that no file stores, so that loading could not restore them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from regrow.store import probe
from regrow.store.attributes import unregistered_tensors
from regrow.store.errors import StoreError
from regrow.store.shapes import DTYPES, Kind, Shapes
from regrow.store.state import named_tensors, restore

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def unsaved_change(model: nn.Module, fresh: nn.Module, shapes: Shapes, folder: Path) -> str:
    """Return the first attribute that no file stores, if loading would fail because of it; else ``""``.

    Args:
        model: The network; it is not changed.
        fresh: The same architecture newly built, with the same modules dropped; it may be overwritten with the weights.
        shapes: The record of the network.
        folder: The model folder, with its probe.

    Returns:
        ``module.attribute``; empty if loading will restore the network.
    """
    kept = {place.replace(":", ".").removeprefix(".") for place in shapes.attributes}
    changed = next((place for place in differences(model, fresh) if place not in kept), "")
    if not changed:
        return ""
    places = {name: here.tensor for name, here in named_tensors(model).items()} | unregistered_tensors(model)
    own: dict[str, Tensor] = {}
    for name, stored in shapes.tensors.items():
        tensor = places[name].detach().to("cpu", DTYPES[stored.dtype])
        own[name] = tensor if stored.kind is Kind.PARAMETER else tensor.clone()
    restore(fresh, shapes, own)
    try:
        probe.check_probe(fresh.eval(), folder / probe.FILE, stored={DTYPES[s.dtype] for s in shapes.tensors.values()})
    except StoreError:
        return changed
    return ""


def differences(model: nn.Module, fresh: nn.Module) -> Iterator[str]:
    """Yield the attributes of modules that differ from a newly built network, except tensors and numbers.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> net[1] = nn.Tanh()
    >>> list(differences(net, nn.Sequential(nn.Linear(2, 3), nn.ReLU())))
    ['1 (a Tanh, not a ReLU)']

    Args:
        model: The network.
        fresh: The newly built one.
    """
    others = dict(fresh.named_modules())
    usual = vars(nn.Module()).keys() | {"origin", "tokenizer"}
    for path, module in model.named_modules():
        other = others.get(path)
        if other is None:
            continue
        if type(module) is not type(other):
            yield f"{path or 'the model'} (a {type(module).__name__}, not a {type(other).__name__})"
            continue
        dot = f"{path}." if path else ""
        now, before = ({k: v for k, v in vars(one).items() if k not in usual} for one in (module, other))
        yield from (f"{dot}{name}" for name in {**before, **now} if not _alike(now, before, name))
        yield from (f"{dot}{name}" for name in _HOOKS if len(vars(module)[name]) != len(vars(other)[name]))


def _alike(now: Mapping[str, Any], before: Mapping[str, Any], name: str) -> bool:
    """Whether an attribute is the same in two networks, as far as that can be decided."""
    if (name in now) != (name in before):
        return False
    a, b = now[name], before[name]
    if isinstance(a, Tensor | nn.Module) or (type(a) in (int, float) and type(b) is type(a)):
        return True  # what files keep
    if type(a) is not type(b):
        return False
    if callable(a) and hasattr(a, "__qualname__"):
        return (a.__module__, a.__qualname__) == (b.__module__, b.__qualname__)
    if "__eq__" not in {name for kind in type(a).__mro__[:-1] for name in vars(kind)}:
        return True  # equal to nothing but itself
    try:
        return bool(a == b)
    except (RuntimeError, ValueError, TypeError):  # tensors in lists
        return True
