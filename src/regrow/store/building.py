"""Record how a network differs from its newly built architecture, build that again, and check that the record fits."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow.core.axes.operations import Placeholder, lies_in
from regrow.core.change import Insertion
from regrow.core.errors import first_line
from regrow.core.names import names_function
from regrow.nets import ModelError, Origin, build, replace_attention
from regrow.nets.language import origin_of
from regrow.store.errors import StoreError
from regrow.store.portable import check_configuration, is_pretrained
from regrow.store.shapes import DTYPES, SHAPES, SIZE_LIMIT, Number, Shapes, StoredTensor, TensorKind
from regrow.store.state import (
    MODULE_VARS,
    HeldTensor,
    attribute_tensors,
    container_tensors,
    find_numbers,
    find_ties,
    named_tensors,
    same_number,
    same_tensor,
    settable_numbers,
)
from regrow.store.tensors import dtype_name
from regrow.tracing.branches import find_placeholders, insert_placeholders
from regrow.tracing.stacks import StackError, find_insertions, insert_copies

Builder = Callable[[], Any]  # returns the unchanged architecture: a network, or (network, example input)
_OTHER_CODE = "it was built by other code or settings, or shapes.json was changed"


def describe_network(model: nn.Module, fresh: nn.Module | None, origin: Origin, dtype: torch.dtype | None) -> Shapes:
    """Return the record of how ``model`` differs from ``fresh``, still without files and digests.

    ``fresh``: its newly built architecture, changed here in place (blocks are inserted and dropped as in ``model``);
    ``None``: there is none, and everything is listed. ``origin``: how to build the architecture, for the record.
    ``dtype``: that in which floating-point weights are stored; ``None``: their own. Raises StoreError if the record
    could not be loaded again.
    """
    placeholders, inserted = find_placeholders(model), find_insertions(model)
    if fresh is not None:
        _insert_and_drop(fresh, inserted, placeholders)
    now = named_tensors(model)
    before = {} if fresh is None else named_tensors(fresh)
    ties = find_ties(now)
    tensors = {}
    for name, held in now.items():
        old = before.get(name)
        derived = held.kind is TensorKind.DERIVED
        if name in ties or (derived and old is not None and same_tensor(held.tensor, old.tensor)):
            continue
        shape = tuple(held.tensor.shape)
        tensors[name] = StoredTensor(
            _stored_dtype(name, held, dtype),
            shape,
            held.kind,
            held.kind is not TensorKind.PARAMETER or held.tensor.requires_grad,
            tuple(old.tensor.shape) if old is not None and old.tensor.shape != shape else None,
            fresh is not None and old is None,
        )
    for name, tensor in _unregistered_tensors(model, fresh).items():
        stored_dtype = _stored_dtype(name, HeldTensor(tensor, TensorKind.ATTRIBUTE), None)
        tensors[name] = StoredTensor(stored_dtype, tuple(tensor.shape), TensorKind.ATTRIBUTE)
    numbers = find_numbers(model)
    if fresh is not None:
        old_numbers = settable_numbers(fresh)
        numbers = {k: n for k, n in numbers.items() if k in old_numbers and not same_number(n, old_numbers[k])}
    dropped = tuple(name for name in before if name not in now)
    shapes = Shapes(
        origin, tensors, numbers, ties, dropped, fresh is not None, placeholders=placeholders, inserted=inserted
    )
    if fresh is not None:
        check_fits(fresh, shapes)
    return shapes


def _unregistered_tensors(model: nn.Module, fresh: nn.Module | None) -> dict[str, Tensor]:
    """Return name → tensor, of plain attributes that a newly built network lacks or has with other numbers.

    ``fresh``: that network; ``None``: there is none, and every plain attribute is returned. Otherwise raises StoreError
    if a list or mapping of a module holds such a tensor, which would not be stored.
    """
    names = {id(held.tensor): name for name, held in named_tensors(model).items()}
    if fresh is None:
        return attribute_tensors(model)
    fresh_names = {id(held.tensor): name for name, held in named_tensors(fresh).items()}
    fresh_packed, fresh_attributes = container_tensors(fresh), attribute_tensors(fresh)
    for place, tensor in container_tensors(model).items():
        rebuilt = place in fresh_packed and same_tensor(tensor, fresh_packed[place])
        if id(tensor) not in names and not rebuilt:
            raise StoreError(
                f"{place} is a tensor in a list or mapping of a module, and differs from that of a newly built "
                "network; make it a buffer (register_buffer)"
            )
    result = {}
    for name, tensor in attribute_tensors(model).items():
        old = fresh_attributes.get(name)
        alias = id(tensor) in names and old is not None and names[id(tensor)] == fresh_names.get(id(old))
        if old is None or not (alias or same_tensor(tensor, old)):
            result[name] = tensor
    return result


def _stored_dtype(name: str, held: HeldTensor, dtype: torch.dtype | None) -> str:
    """Return the name of the dtype for storing a tensor (its own, or ``dtype`` if floating-point), or StoreError."""
    tensor = held.tensor
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise StoreError(f"{name!r} is on the meta device or sparse and has no numbers to save; load the model first")
    if dtype is not None and tensor.is_floating_point() and held.kind is not TensorKind.DERIVED:
        return dtype_name(dtype)
    own_dtype = dtype_name(tensor.dtype)
    if own_dtype not in DTYPES:
        raise StoreError(f"{name!r} has the dtype {own_dtype}, which is not stored; cast the model first")
    return own_dtype


def check_fits(fresh: nn.Module, shapes: Shapes) -> None:
    """Raise StoreError unless a newly built network has a place for every tensor and number of a record.

    ``fresh``: that network, in which recorded copies of blocks are inserted and dropped modules replaced already.
    """
    present, modules = named_tensors(fresh), dict(fresh.named_modules(remove_duplicate=False))
    recorded = dict(shapes.tensors)
    for name, first in shapes.ties.items():
        if first not in shapes.tensors or name in shapes.tensors:
            raise StoreError(f"{name!r} is tied to {first!r}, which is not stored; restore shapes.json")
        recorded[name] = shapes.tensors[first]
    for name, stored in recorded.items():
        path, _, leaf = name.rpartition(".")
        held, module = present.get(name), modules.get(path)
        if stored.kind is TensorKind.ATTRIBUTE:
            fits = module is not None and _takes_attribute(module, leaf)
        elif held is None:
            # The module has a parameter or buffer of this name that is None, such as a bias left out.
            free = module is not None and leaf in {**module._parameters, **module._buffers}
            fits = free and (stored.added or not shapes.compared)
        else:
            fits = _is_like(held, stored, shapes.compared)
        if not fits:
            has = "nothing" if held is None else f"{held.kind} {tuple(held.tensor.shape)}"
            raise StoreError(
                f"the architecture has no place for the tensor {name!r}: it has {has} there, the record says "
                f"{stored.kind} {stored.was or stored.shape}; {_OTHER_CODE}"
            )
    required = {name for name, held in present.items() if held.kind.carried}
    dropped = {*shapes.dropped}
    if disputed := (required - recorded.keys() - dropped) | (dropped - present.keys()):
        raise StoreError(f"shapes.json and the architecture disagree about the tensor {min(disputed)!r}; restore it")
    numbers = settable_numbers(fresh)
    for place, value in shapes.attributes.items():
        # Without a comparison everything is listed, numbers too that a module first sets when it runs.
        if place in numbers or shapes.compared:
            unset = place in numbers and numbers[place] is None
            _check_number(place, value, value if unset else numbers.get(place))


def _is_like(held: HeldTensor, stored: StoredTensor, compared: bool) -> bool:
    """Whether a newly built tensor has the recorded kind and rank and, if the record is ``compared``, its old shape."""
    shape = tuple(held.tensor.shape)
    if held.kind is not stored.kind or stored.added or len(shape) != len(stored.shape):
        return False
    return not compared or shape == (stored.was or stored.shape)


def _takes_attribute(module: nn.Module, leaf: str) -> bool:
    """Whether a tensor may be set as the plain attribute ``leaf``: a free name, or that of a tensor or ``None``."""
    taken = (*module._parameters, *module._buffers, *module._modules, *MODULE_VARS)
    if not leaf.isidentifier() or leaf.startswith("__") or leaf in taken:
        return False
    return all(
        isinstance(value, Tensor | None) for value in (getattr(type(module), leaf, None), vars(module).get(leaf))
    )


def _check_number(place: str, value: Number, old: Number | None) -> None:
    """Raise StoreError unless an attribute may be set to a recorded value.

    ``place``: ``module:attribute``, for the error; ``old``: its value as newly built; ``None``: it has none (an error).
    """
    news, olds = (v if isinstance(v, tuple) else (v,) for v in (value, 0 if old is None else old))
    alike = old is not None and isinstance(value, tuple) == isinstance(old, tuple) and len(news) == len(olds)
    if not alike or not all(map(_may_become, olds, news)):
        raise StoreError(f"{place!r} is {old} in the architecture, {value} in the record; {_OTHER_CODE}")


def _may_become(old: float, new: float) -> bool:
    """Whether a number may change from ``old`` to ``new``: finite stays finite, a size stays from 0 to 2^31 - 1."""
    finite = math.isfinite(new) or not math.isfinite(old)
    negative = isinstance(old, int) and old > 0 > new
    return finite and not negative and not abs(old) < SIZE_LIMIT <= abs(new)


def _insert_and_drop(
    fresh: nn.Module, inserted: Mapping[str, tuple[Insertion, ...]], placeholders: Mapping[str, Placeholder]
) -> None:
    """Insert recorded copies of blocks into a newly built network, then replace dropped modules, in place.

    ``inserted``: path of a stack of blocks → insertions into it, in order; ``placeholders``: path of a module → what
    replaces it. Raises StoreError if the network has no such blocks or modules.
    """
    try:
        for path, insertions in inserted.items():
            for insertion in insertions:
                insert_copies(fresh, path, insertion)
    except StackError as error:
        raise StoreError(f"{error}; {_OTHER_CODE}") from None
    known = dict(fresh.named_modules())
    for path in placeholders:
        nested = any(lies_in(path, other) for other in placeholders if other != path)
        if not path or path not in known or nested:
            raise StoreError(f"the architecture has no module {path!r} to drop; {_OTHER_CODE}")
    insert_placeholders(fresh, placeholders)


def build_checked(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the recorded architecture with blocks inserted and dropped, or raise StoreError unless it fits the record.

    Its tensors still have the shapes of a new network. Arguments are those of :func:`build_network`.
    """
    try:
        net = build_network(folder, shapes, model, dtype)
        _insert_and_drop(net, shapes.inserted, shapes.placeholders)
        check_fits(net, shapes)
    except (ModelError, StoreError) as error:
        text = " ".join(str(error).split())
        text = text if len(text) < 400 else text[:399] + "…"
        raise StoreError(text if text.startswith(str(folder)) else f"{folder}: {text}") from None
    return net


def build_network(
    folder: Path, shapes: Shapes, model: nn.Module | Builder | None, dtype: torch.dtype | None
) -> nn.Module:
    """Return the architecture of a record before any change: newly built, or the network that the caller passes.

    ``folder``: the model folder, whose ``config.json`` must agree with the record; ``model``: the network or the
    function that builds it, as for :func:`regrow.store.load`; ``dtype``: that in which a transformers model is built;
    ``None``: as recorded. Raises StoreError or ModelError if it cannot be built or building it would run or fetch what
    a file names.
    """
    origin = shapes.origin
    if origin.kind == "transformers":
        check_configuration(origin, folder, len(shapes.tensors))
        if dtype is not None:
            origin = replace(origin, config={**origin.config, "dtype": dtype_name(dtype)})
    if origin.kind == "torchvision" and (odd := [k for k, v in origin.config.items() if isinstance(v, str | dict)]):
        raise StoreError(f"the setting {odd[0]!r} would fetch files; take it out of {SHAPES}")
    if isinstance(model, nn.Module):
        return replace_attention(model, {*shapes.tensors, *shapes.ties})
    if model is None and origin.kind == "callable":
        raise StoreError(
            f"this model is built by your own code ({origin.reference or 'a module'}), which is not run unasked; "
            "pass the function that builds it: load(folder, model=function)"
        )
    if model is not None and not callable(model):
        raise StoreError(f"model must be a network or the function that builds it, got a {type(model).__name__}")
    try:
        with torch.random.fork_rng(devices=[]):
            net = build(origin) if model is None else model()
    except ModelError:
        raise
    except Exception as error:
        raise StoreError(f"building the architecture failed: {first_line(error)}") from None
    net = net[0] if isinstance(net, tuple) and net else net  # a function may return (network, example input)
    if not isinstance(net, nn.Module):
        raise StoreError(f"model= gave a {type(net).__name__}, not a torch.nn.Module")
    return replace_attention(net, {*shapes.tensors, *shapes.ties})


def build_fresh(origin: Origin) -> nn.Module | None:
    """Build the unchanged architecture, to compare a network with, or raise StoreError.

    ``None`` if it is the user's own code, and no function that builds it is known in this process, or it fails.
    """
    # A user's own code is called only if the function was passed in this process; a recorded name is never imported.
    if origin.kind == "callable" and origin.builder is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            return build(origin)
    except ModelError as error:
        if origin.kind == "callable":
            return None
        raise StoreError(f"the model could not be built again: {error}") from None


def describe_origin(model: nn.Module) -> Origin:
    """Return how a network's architecture is built, from its ``origin``, its transformers configuration or its class.

    The reference is empty if its class cannot be imported or is a generic one of torch or torchvision.

    >>> describe_origin(nn.Linear(1, 2)).reference
    ''
    """
    if isinstance(known := getattr(model, "origin", None), Origin):
        return known
    if is_pretrained(model):
        return origin_of(model, type(model).__name__)
    kind = type(model)
    reference = f"{kind.__module__}:{kind.__qualname__}"
    importable = kind.__module__.partition(".")[0] not in ("__main__", "torch", "torchvision")
    return Origin("callable", reference if importable and names_function(reference) else "", {}, kind.__name__)
