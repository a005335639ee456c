"""Find which integer attribute of which module holds the size of which dimension (``out_features``, ``head_dim``).

A network reads some sizes from its tensors and others from attributes. The tables here are the only place that knows
their names. What the tables suggest is proved by the trial cut: a wrong guess freezes an axis, it never makes a wrong
one.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from regrow.tracing import dimensions as d
from regrow.tracing.dimensions import Expr
from regrow.tracing.walk import Dims, Literal, Walk

# Attributes that hold a size of a tensor of their module: name → (tensor, dimension), the first of that size.
OF_WEIGHT: Mapping[str, tuple[tuple[str, int], ...]] = {
    "in_features": (("weight", 1),),
    "out_features": (("weight", 0),),
    "num_features": (("weight", 0), ("running_mean", 0)),
    "num_channels": (("weight", 0),),
    "num_embeddings": (("weight", 0),),
    "embedding_dim": (("weight", 1),),
    "nf": (("weight", 1),),
    "nx": (("weight", 0),),
    "normalized_shape": (("weight", 0),),
    "input_size": (("weight_ih_l0", 1), ("weight_ih", 1)),
    "hidden_size": (("weight_hr_l0", 1), ("weight_hh_l0", 1), ("weight_hh", 1)),
    "proj_size": (("weight_hr_l0", 0),),
}

_WIDTHS = (
    "head_dim head_size attention_head_size d_head d_kv dim_head hidden_size hidden_dim embed_dim split_size "
    "all_head_size inner_dim inner_size d_model dim width channels intermediate_size kv_dim q_dim num_hidden "
    "v_head_dim rotary_ndims key_value_proj_dim out_channels in_channels proj_size hidden nhid n_hidden "
    "hidden_units n_embd c conv_dim d_inner normalized_shape ssm_state_size state_size time_step_rank"
)
_COUNTS = (
    "num_heads n_head n_heads heads num_attention_heads num_key_value_heads num_kv_heads n_kv_head n_kv_heads "
    "kv_heads num_q_heads nhead n_group num_groups n_groups num_experts num_local_experts n_routed_experts"
)
_REPEATS = "num_key_value_groups n_rep num_kv_groups kv_groups n_repeat num_queries_per_kv num_key_value_group"
# Names of attributes that hold a width, a number of heads or groups, or how often keys and values are repeated.
WIDTHS, COUNTS, REPEATS = (frozenset(names.split()) for names in (_WIDTHS, _COUNTS, _REPEATS))

# Names of attributes that hold the constant under the root of a norm.
EPSILONS = ("eps", "variance_epsilon", "epsilon", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps")


# Pairs of dimensions whose size one attribute sets, and why they must stay equal.
EqualPairs = list[tuple[Expr, Expr, str]]


def find_integers(model: nn.Module, w: Walk, dims: Mapping[str, Dims]) -> tuple[dict[str, Expr], EqualPairs]:
    """Return ``module:attribute`` → the dimension whose size it holds, and the pairs whose size one attribute sets.

    ``dims``: name of a parameter or buffer → its dimensions.
    """
    groups: dict[str, list[Expr]] = {}
    for path, expr in w.groups:
        groups.setdefault(path, []).append(expr)
    literals: dict[str, list[Literal]] = {}
    for literal in w.literals:
        literals.setdefault(literal.module, []).append(literal)
    result: dict[str, Expr] = {}
    pairs: EqualPairs = []
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        tensors = {leaf: dims[dot + leaf] for leaf in (*module._parameters, *module._buffers) if dot + leaf in dims}
        shapes = {leaf: tuple(map(d.size, exprs)) for leaf, exprs in tensors.items()}
        spots = find_size_attributes(module, shapes, _find_output_dim(tensors))
        by_name = {name: tensors[tensor][dim] for name, (tensor, dim) in spots.items()}
        for expr in groups.get(path, ()):
            by_name |= {name: expr for name in ("groups", "num_groups") if vars(module).get(name) == d.size(expr)}
        written = literals.get(path, ())
        for name, value in _named_sizes(module):
            exprs = _find_literal_dims(written, name, value) if name not in by_name else []
            if exprs:
                by_name[name] = exprs[0]
                pairs += [(exprs[0], other, f"`{name}` of {path or 'the model'} sets both") for other in exprs[1:]]
        by_name |= _find_products(module, written, by_name)
        _add_channels(module, by_name, tensors.get("weight"))
        result |= {f"{path}:{name}": expr for name, expr in by_name.items()}
    return result, pairs


def find_size_attributes(
    module: nn.Module, shapes: Mapping[str, tuple[int, ...]], output: int | None = None
) -> dict[str, tuple[str, int]]:
    """Return the attributes of a module that hold sizes of its own tensors: name → (tensor, dimension).

    An attribute with another value than the size is left out, whatever its name. ``output`` is the dimension of
    ``weight`` that equals the bias's, if known; it decides the order for a square weight.
    """
    candidates = {name: spots for name, spots in OF_WEIGHT.items() if name in vars(module)}
    weight = shapes.get("weight", ())
    features = (vars(module).get("in_features"), vars(module).get("out_features"))
    output_first = features == weight[::-1] and output != 1  # as in nn.Linear; a square weight fits both orders
    if features == weight and {*map(type, features)} == {int} and not output_first:
        candidates |= {"in_features": (("weight", 0),), "out_features": (("weight", 1),)}
    result = {}
    for name, spots in candidates.items():
        value = vars(module)[name]
        value = value[0] if isinstance(value, tuple) and value else value
        # a slice, since a tensor may have fewer dimensions
        fitting = (spot for spot in spots if shapes.get(spot[0], ())[spot[1] : spot[1] + 1] == (value,))
        spot = next(fitting, None)
        if type(value) is int and spot is not None:
            result[name] = spot
    return result


def get_attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute of a module; ``config.num_attention_heads`` names one of its configuration."""
    owner, _, leaf = name.rpartition(".")
    return getattr(getattr(module, owner) if owner else module, leaf)


def set_attribute(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute of a module; a configuration is copied first, since other layers share it."""
    owner, _, leaf = name.rpartition(".")
    if owner:
        setattr(module, owner, copy.copy(getattr(module, owner)))
    setattr(getattr(module, owner) if owner else module, leaf, value)


def config_counts(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (``config.name``, value) of each number of heads, groups or experts in a module's configuration."""
    config = vars(module).get("config")
    for name in sorted(COUNTS) if hasattr(config, "__dict__") and not isinstance(config, nn.Module) else ():
        if type(value := getattr(config, name, None)) is int:
            yield f"config.{name}", value


def holds_repeats(model: nn.Module, path: str, size: int) -> bool:
    """Whether an attribute of the module at ``path``, or of its parent, holds ``size`` as a number of repetitions."""
    parent, _, _ = path.rpartition(".")
    return any(vars(model.get_submodule(owner)).get(name) == size for owner in (path, parent) for name in REPEATS)


def find_epsilon(model: nn.Module, path: str, value: float | None) -> str:
    """Return ``module:attribute`` that holds ``value``, the constant under a norm's root; empty if none does."""
    values = vars(model.get_submodule(path))
    return next((f"{path}:{name}" for name in EPSILONS if name in values and values[name] == value), "")


def _named_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, value) of each attribute that by its name holds a width, count or repetition, and is above 1."""
    for name, stored in vars(module).items():
        value = stored[0] if isinstance(stored, tuple) and len(stored) == 1 else stored
        if name in WIDTHS | COUNTS | REPEATS and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield name, value


def _find_output_dim(tensors: Mapping[str, Dims]) -> int | None:
    """Return the dimension of ``weight`` that is the bias's; ``None`` unless exactly one is (names in a module)."""
    weight, bias = tensors.get("weight", ()), tensors.get("bias", ())
    matches = [dim for dim, expr in enumerate(weight) if len(bias) == 1 and d.identical(expr, bias[0])]
    return matches[0] if len(matches) == 1 else None


def _find_literal_dims(literals: Sequence[Literal], name: str, value: int) -> list[Expr]:
    """Return the distinct dimensions whose size a module wrote as ``value`` (attribute ``name``) in reshapes, slices.

    If the number of heads equals their width, one number stands for both: a width is the last number of a reshape.
    """
    fitting = [literal for literal in literals if literal.number == value and d.is_free(literal.expr)]
    if name in REPEATS:
        fitting = [literal for literal in fitting if _is_repeat(literal.expr)]
    else:
        fitting = [literal for literal in fitting if not _is_repeat(literal.expr)] or fitting
        fitting = [literal for literal in fitting if literal.last == (name in WIDTHS)] or fitting
    distinct: list[Expr] = []
    for literal in fitting:
        if not _is_among(literal.expr, distinct):
            distinct.append(literal.expr)
    return distinct


def _is_among(expr: Expr, others: Iterable[Expr]) -> bool:
    """Whether a dimension is the same expression as one of others."""
    return any(d.identical(expr, other) for other in others)


def _find_products(module: nn.Module, literals: Sequence[Literal], by_name: Mapping[str, Expr]) -> dict[str, Expr]:
    """Return count attribute, of a module or its configuration → the only factor of that size in its literals.

    ``by_name``: attribute → dimension, as far as known; such attributes and dimensions are left out.
    """
    written = [part for literal in literals if d.is_free(literal.expr) for part in _outermost_products(literal.expr)]
    result: dict[str, Expr] = {}
    listed = [(name, value) for name, value in _named_sizes(module) if name in COUNTS and name not in by_name]
    for name, value in (*listed, *config_counts(module)) if written else ():
        fitting: list[Expr] = []
        for expr in written:
            if d.size(expr) == value > 1 and not _is_among(expr, (*by_name.values(), *fitting)):
                fitting.append(expr)
        if len(fitting) == 1:
            result[name] = fitting[0]
    return result


def _outermost_products(expr: Expr) -> Iterator[Expr]:
    """Yield a dimension, then the product of its first factor, of its first two, and so on."""
    product = d.resolve(expr)
    yield product
    if isinstance(product, d.Times):
        yield from (d.times(*product.parts[:i]) for i in range(1, len(product.parts)))


def _is_repeat(expr: Expr) -> bool:
    """Whether a dimension was made by repeating, so that an attribute must hold its size."""
    leaf = d.resolve(expr)
    return isinstance(leaf, d.Leaf) and bool(leaf.integer)


def _add_channels(module: nn.Module, by_name: dict[str, Expr], kernel: Dims | None) -> None:
    """Add the channel and group counts of a convolution to ``by_name``; ``kernel``: the dimensions of its weight."""
    if kernel is None or not isinstance(module, nn.modules.conv._ConvNd):
        return
    if module.groups == d.size(kernel[0]) and d.size(kernel[1]) == 1:  # depthwise, also where the weight is shared
        by_name.setdefault("groups", kernel[0])
    group = by_name.get("groups", d.frozen(module.groups, "a fixed number of groups"))
    first, second = ("in_channels", "out_channels") if module.transposed else ("out_channels", "in_channels")
    for name, expr in ((first, kernel[0]), (second, d.times(group, kernel[1]))):
        if getattr(module, name) == d.size(expr):
            by_name[name] = expr
