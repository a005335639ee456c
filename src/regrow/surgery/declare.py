"""Declare axes by hand, for networks, or parts of them, that tracing cannot analyse."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph, Dim, Mark, Product, Role, Slot, Sum, axes_in, size_of
from regrow.surgery.layout import slots_in
from regrow.tracing.attributes import get_attribute, restated_sizes
from regrow.tracing.capture import example_of
from regrow.tracing.model_state import state_of


class DeclarationError(ValueError):
    """Raised where declared axes contradict the network, or are not written as :func:`declare` expects."""


@dataclass(frozen=True)
class _Place:
    """One dimension of a tensor, or one integer attribute of a module (``dim`` is ``None``), in a declaration.

    ``form`` is its formula, ``reads`` whether it follows the arrow, ``extent`` its entries or value.
    """

    axis: str
    name: str
    dim: int | None
    form: Dim
    reads: bool
    extent: int

    @property
    def text(self) -> str:
        """The place as the user wrote it, without its form."""
        return self.name if self.dim is None else f"{self.name}:{self.dim}"


def declare(
    model: nn.Module, units: Mapping[str, str], *args: Any, axes: AxisGraph | None = None, **kwargs: Any
) -> AxisGraph:
    """Return the axes of a network that cannot be traced, as the user describes them.

    Declarations are checked: :func:`regrow.apply` runs the changed network on the example before it commits, and
    :func:`regrow.verify` compares the cut network with the whole one, in which the dropped inputs of every weight
    behind the arrow are set to 0.

    Args:
        model: The network.
        units: Axis name → ``"producers -> consumers"``, dimensions written ``tensor:dim`` with spaces between. A
            dimension of blocks states its factors, outermost first: ``qkv.weight:0=3*heads*16``; a concatenation its
            parts: ``mix.weight:1=left+right``. An integer that holds a size is written ``module:attribute``; those of
            torch's own layers are found. The axis name becomes its key.
        *args: Positional inputs, as for ``model(...)``.
        axes: The result of tracing, to be completed: only dimensions that it froze can be declared, and its example is
            kept. ``None``: everything is declared.
        **kwargs: Inputs by name.

    Returns:
        The axes, with those that tracing found.

    Raises:
        DeclarationError: If a name does not exist, sizes do not agree, an axis lacks producers or consumers, or tracing
            has already put the dimension on an axis.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> axes = declare(net, {"hidden": "0.weight:0 0.bias:0 -> 2.weight:1"}, torch.ones(1, 4))
    >>> from regrow import Plan, apply, verify
    >>> plan = Plan.keeping(axes, {"hidden": (0, 2, 5)})
    >>> verify(net, axes, plan).ok, apply(net, axes, plan)[0][0].out_features
    (True, 3)
    """
    tensors = state_of(model)
    if axes is not None and (args or kwargs):
        raise DeclarationError("axes that were traced have an example already; give one or the other")
    written = [entry for name, text in units.items() for entry in _written(model, tensors, name, text, units)]
    sizes = _sizes(written)
    base = axes or _unknown(model, tensors, args, kwargs)
    every = [replace(entry, name=name) for entry in written for name in _aliases(base, entry.name)]
    forms = _forms(base, every)
    shapes = {
        name: tuple(forms.get((name, dim), known) for dim, known in enumerate(dims))
        for name, dims in base.shapes.items()
    }
    made = {key: _axis(key, sizes, every, tensors) for key in units}
    stated = {entry.name: entry.form for entry in written if entry.dim is None}
    return replace(
        base,
        axes={**_left(base, forms, made), **made},
        shapes=shapes,
        integers={**base.integers, **_integers(model, shapes, made), **stated},
        notes=(*base.notes, f"declared, not traced: {', '.join(made)}"),
        declared=(*base.declared, *made),
    )


def _written(
    model: nn.Module, tensors: Mapping[str, Tensor], axis: str, text: str, units: Mapping[str, str]
) -> Iterator[_Place]:
    if not axis.isidentifier():
        raise DeclarationError(f"axis {axis!r}: a declared axis has a name of letters, digits and _, like heads")
    sides = text.replace(",", " ").split("->")
    if len(sides) != 2 or not all(side.strip() for side in sides):
        raise DeclarationError(
            f"axis {axis!r}: say what makes its units, and what reads them, like 'fc1.weight:0 -> fc2.weight:1'; "
            f"got {text!r}"
        )
    for side, reads in zip(sides, (False, True), strict=True):
        for word in side.split():
            spot, _, formula = word.partition("=")
            form = _dim(axis, word, formula, units) if formula else axis
            if axis not in axes_in(form):
                raise DeclarationError(f"axis {axis!r}: {word!r} does not say where {axis} is in it")
            name, _, last = spot.rpartition(":")
            if last.isdigit():
                extent = _extent(tensors, axis, name, int(last))
                yield _Place(axis, name, int(last), form, reads, extent)
            else:
                yield _Place(axis, spot, None, form, reads, _integer(model, axis, spot))


def _dim(axis: str, word: str, form: str, units: Mapping[str, str]) -> Dim:
    """Parse ``3*heads*(16+2)`` into a dimension."""

    def read(node: ast.expr) -> Dim:
        match node:
            case ast.Constant(value=int(n)) if n > 0:
                return n
            case ast.Name(id=name) if name in units:
                return name
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return Product((read(left), read(right)))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return Sum((read(left), read(right)))
        raise DeclarationError(
            f"axis {axis!r}: {word!r} is not made of whole numbers and declared axes with * and +, like 3*heads*16"
        )

    try:
        return read(ast.parse(form, mode="eval").body)
    except SyntaxError:
        raise DeclarationError(f"axis {axis!r}: {word!r} cannot be read; write it like 3*heads*16") from None


def _integer(model: nn.Module, axis: str, entry: str) -> int:
    path, colon, name = entry.rpartition(":")
    module = dict(model.named_modules()).get(path)
    if not colon or module is None or not hasattr(module, name.partition(".")[0]):
        raise DeclarationError(
            f"axis {axis!r}: {entry!r} is neither tensor:dim, like fc1.weight:0, nor module:attribute"
        )
    value = get_attribute(module, name)
    if type(value) is not int:
        raise DeclarationError(f"axis {axis!r}: {entry!r} holds a {type(value).__name__}, not a whole number")
    return value


def _extent(tensors: Mapping[str, Tensor], axis: str, name: str, dim: int) -> int:
    if name not in tensors:
        near = get_close_matches(name, tensors, 3, 0.0)
        raise DeclarationError(f"axis {axis!r}: the network has no tensor {name!r}; it has {', '.join(near)}")
    if dim >= tensors[name].dim():
        raise DeclarationError(
            f"axis {axis!r}: {name} has {tensors[name].dim()} dimensions, counted from 0; there is no {name}:{dim}"
        )
    return tensors[name].shape[dim]


def _sizes(written: list[_Place]) -> dict[str, int]:
    """Return the size of each axis, from dimensions in which it is the only axis of unknown size."""
    sizes: dict[str, int] = {}
    again = True
    while again:
        again = False
        for entry in written:
            unknown = set(axes_in(entry.form)) - sizes.keys()
            if len(unknown) == 1:
                (key,) = unknown
                least, step = (size_of(entry.form, {**sizes, key: n}) for n in (0, 1))
                size, rest = divmod(entry.extent - least, step - least)
                if rest or size < 1:
                    raise DeclarationError(
                        f"axis {key!r}: {entry.text} has {entry.extent} entries, which do not divide so"
                    )
                sizes[key], again = size, True
    for entry in written:
        if set(axes_in(entry.form)) - sizes.keys():
            raise DeclarationError(
                f"axis {entry.axis!r}: its size does not follow from {entry.text}; give a plain place"
            )
        if (stated := size_of(entry.form, sizes)) != entry.extent:
            raise DeclarationError(
                f"axis {entry.axis!r}: {entry.text} has {entry.extent} entries, but with "
                f"{', '.join(f'{key} = {size}' for key, size in sizes.items())} it would have {stated}"
            )
    return sizes


def _forms(base: AxisGraph, every: list[_Place]) -> dict[tuple[str, int], Dim]:
    forms: dict[tuple[str, int], Dim] = {}
    for entry in every:
        if entry.dim is not None and forms.setdefault((entry.name, entry.dim), entry.form) != entry.form:
            raise DeclarationError(f"axis {entry.axis!r}: {entry.text} is declared twice, in different forms")
    for (name, dim), form in forms.items():
        if not isinstance(known := base.shapes[name][dim], int):
            free = next(iter(axes_in(known)))
            raise DeclarationError(f"axis {next(axes_in(form))!r}: {name}:{dim} is the axis {free!r} already; use that")
    return forms


def _aliases(base: AxisGraph, name: str) -> list[str]:
    """Return all names of a tensor."""
    first = base.ties.get(name, name)
    return [first, *(other for other, known in base.ties.items() if known == first)]


def _axis(key: str, sizes: Mapping[str, int], every: list[_Place], tensors: Mapping[str, Tensor]) -> Axis:
    slots: dict[Slot, None] = {}
    named = [entry for entry in every if key in axes_in(entry.form)]
    makers = [entry for entry in named if entry.dim is not None and not entry.reads]
    heavy = [entry for entry in makers if tensors[entry.name].dim() > 1] or makers[:1]
    for entry in named:
        if entry.dim is not None:
            # A vector does not produce units by itself: it shifts or scales them.
            small = Role.SHIFTS if entry.name.endswith(("bias", "running_mean")) else Role.SCALES
            role = Role.CONSUMES if entry.reads else Role.PRODUCES if entry in heavy else small
            slots |= dict.fromkeys(slots_in(entry.name, entry.dim, role, entry.form, key, sizes))
    if not makers or not any(entry.reads and entry.dim is not None for entry in named):
        raise DeclarationError(f"axis {key!r}: name a tensor that {'reads' if makers else 'makes'} its units")
    return Axis(key, sizes[key], tuple(slots), Mark.NEUTRAL)


def _left(base: AxisGraph, forms: Mapping[tuple[str, int], Dim], made: Mapping[str, Axis]) -> dict[str, Axis]:
    """Return the traced axes without the slots that are declared."""
    left = {}
    for key, axis in base.axes.items():
        slots = tuple(slot for slot in axis.slots if (slot.name, slot.dim) not in forms)
        if key in made:
            raise DeclarationError(f"axis {key!r} is there already; take another name")
        if slots:
            left[key] = replace(axis, slots=slots)
    return left


def _integers(model: nn.Module, shapes: Mapping[str, tuple[Dim, ...]], made: Mapping[str, Axis]) -> dict[str, Dim]:
    """Return ``module:attribute`` → the declared dimension whose size it holds."""
    result: dict[str, Dim] = {}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        held = {leaf: t for leaf, t in (*module._parameters.items(), *module._buffers.items()) if t is not None}
        sizes = {leaf: tuple(t.shape) for leaf, t in held.items() if dot + leaf in shapes}
        weight, bias = shapes.get(f"{dot}weight", ()), shapes.get(f"{dot}bias", ())
        same = [dim for dim, form in enumerate(weight) if (form,) == bias]
        for name, (leaf, dim) in restated_sizes(module, sizes, same[0] if len(same) == 1 else None).items():
            result[f"{path}:{name}"] = shapes[dot + leaf][dim]
        if isinstance(module, nn.modules.conv._ConvNd):
            first, second = shapes[f"{dot}weight"][:2]
            depthwise = module.groups == module.weight.shape[0] and second == 1
            group: Dim = first if depthwise and module.groups > 1 else module.groups
            whole = group if second == 1 else second if group == 1 else Product((group, second))
            ends = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
            result |= {f"{path}:{ends[0]}": first, f"{path}:{ends[1]}": whole, f"{path}:groups": group}
    return {entry: dim for entry, dim in result.items() if not made.keys().isdisjoint(axes_in(dim))}


def _unknown(model: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Any) -> AxisGraph:
    """Return an axis graph without axes, of a network of which only the tensors are known."""
    first: dict[int, str] = {}
    ties = {name: known for name, t in tensors.items() if (known := first.setdefault(id(t), name)) != name}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return AxisGraph(
        axes={},
        shapes={name: tuple(tensor.shape) for name, tensor in tensors.items()},
        parameters=frozenset(parameters),
        counted=tuple(n for n, p in parameters.items() if p.dim() > 1 and id(p) not in tables and n not in ties),
        itemsize={name: tensor.element_size() for name, tensor in tensors.items()},
        ties=ties,
        example=example_of(model, args, kwargs),
    )
