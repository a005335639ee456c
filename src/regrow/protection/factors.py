"""Kronecker factors (K-FAC) of earlier tasks: the Fisher information of a layer as A ⊗ B, of other parameters by entry.

The factors of a network are one mapping of tensors that follow its axes. Of a layer with weight W and a bias: ``W
inputs`` and ``W bias``, the second moments A of its inputs, and their means, which are those with the constant input of
the bias; ``W outputs``, the second moments B of the gradients of its outputs. Of a layer with very many inputs or
outputs they are diagonals. Of any other parameter P: ``P diagonal``. They are sums over the tasks.
"""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regrow.core.axes.axis import AxisTensor
from regrow.core.objectives import select_logits
from regrow.core.tasks import Examples, mask_classes, run_network
from regrow.scoring.gradients import evaluation_mode
from regrow.scoring.watch import RECURRENT, find_inputs
from regrow.training.learner import Context, Stream

Factors = Mapping[str, AxisTensor]
BATCH, POSITIONS = 50, 2048  # the most examples, and labels, whose gradients are summed before they are squared
LARGEST = 2048  # a factor of a layer with more inputs, or outputs, is its diagonal alone


def measure_factors(
    model: nn.Module,
    batches: Iterable[Examples],
    generator: torch.Generator,
    classes: Tensor | None = None,
    largest: int = LARGEST,
) -> dict[str, Tensor]:
    """Return the Kronecker factors of every layer that the batches reach, and the Fisher diagonals of what has none.

    ``W inputs``: A = E[a aᵀ] over the inputs a of the layer with weight W (of a convolution: patches), with a 1
    appended for the bias, ``[n + 1, n + 1]``. ``W outputs``: B = E[g gᵀ] over the gradients g of log p(y) in its
    outputs, ``[m, m]``; inside recurrent layers its diagonal alone, from the gradients of W. Layers are linear ones,
    ungrouped convolutions in one or two dimensions, and recurrent ones. ``P diagonal``: E[(∂ log p(y) / ∂P)²]. B and
    diagonals are divided by their mean. Labels y are drawn with ``generator`` from the network's own predictions, among
    ``classes`` (``[classes]`` bool, ``None``: all). Therefore the squared sum of gradients over a batch has the same
    mean as the sum of squares. Gradients are cleared, and modes of modules restored. Source: Martens and Grosse, K-FAC
    (arXiv 1503.05671); convolutions after Grosse and Martens (arXiv 1602.01407), with means in the place of sums.

    >>> net = nn.Sequential(nn.Linear(2, 3))
    >>> factors = measure_factors(net, [Examples(torch.eye(2), torch.zeros(2))], torch.Generator().manual_seed(0))
    >>> factors["0.weight inputs"].tolist(), round(factors["0.weight outputs"].diag().mean().item(), 3)
    ([[0.5, 0.0, 0.5], [0.0, 0.5, 0.5], [0.5, 0.5, 1.0]], 1.0)
    """
    parameters, squares, examples = dict(model.named_parameters()), dict[str, Tensor](), 0
    sums = _FactorSums({id(p): name for name, p in parameters.items() if p.requires_grad}, largest)
    try:
        with evaluation_mode(model):
            for batch in batches:
                model.zero_grad(set_to_none=True)
                sums.examples = len(batch)
                with sums:
                    logits = select_logits(run_network(model, batch.inputs), batch.labels)
                sample_log_likelihood(mask_classes(logits, classes), generator).backward()
                examples += len(batch)
                for name, parameter in parameters.items():
                    if parameter.grad is not None and name not in sums.outputs:
                        squares[name] = squares.get(name, 0) + parameter.grad.square()
    finally:
        model.zero_grad(set_to_none=True)
    measured, with_layer = {}, set[str]()
    for name, total in sums.inputs.items():
        outputs = sums.outputs.get(name)
        if outputs is None or not outputs.dim():
            if name not in squares:  # no gradient reaches it
                continue
            outputs = squares[name].flatten(1).sum(1)
        measured[f"{name} inputs"] = total / total.flatten()[-1]
        measured[f"{name} outputs"] = outputs / diagonal_of(outputs).mean().clamp_min(1e-30)
        with_layer.update(layer_parameters(parameters, name))
    for name, square in squares.items():
        if name not in with_layer:
            measured[f"{name} diagonal"] = square / square.mean().clamp_min(1e-30)
    return measured


def sample_log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return Σ log p(y) over all positions of logits, ``[..., classes]``, with labels y drawn from p, as a scalar."""
    logs = logits.flatten(0, -2).log_softmax(-1)
    labels = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
    return logs.gather(1, labels).sum()


def diagonal_of(factor: Tensor) -> Tensor:
    """Return the diagonal of a factor, ``[n, n]``, or the factor if it is a diagonal itself, ``[n]``; a view."""
    return factor if factor.dim() == 1 else factor.diagonal()


def layer_parameters(parameters: Mapping[str, nn.Parameter], weight: str) -> list[str]:
    """Return the names of a layer's weight and, if one is trained, its bias: ``a.bias`` beside ``a.weight``.

    A bias that several layers share is in ``parameters``, the network's by name, once, and belongs to the first.
    """
    path, dot, leaf = weight.rpartition(".")
    bias = f"{path}{dot}{leaf.removesuffix('weight')}bias"
    own = parameters.get(bias)
    return [weight, bias] if leaf.endswith("weight") and own is not None and own.requires_grad else [weight]


class _FactorSums(TorchFunctionMode):
    """Torch function mode that sums products of inputs, and of gradients of outputs, of layers with known weights.

    ``watched``: id of a weight → its name; ``inputs``, ``outputs``: name → sum, over examples and mean positions.
    """

    def __init__(self, watched: Mapping[int, str], largest: int = LARGEST) -> None:
        super().__init__()
        self.watched, self.largest = watched, largest
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.examples = 0  # in the batch
        self.rows: dict[str, Tensor] | None = None  # instead of sums: the inputs of the last call, with the constant 1

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        with torch.no_grad():
            for name, rows in self._read(func, args, kwargs):
                rows = widen(torch.cat([rows, rows.new_ones(len(rows), 1)], 1))
                if self.rows is not None:
                    self.rows[name] = rows
                    continue
                _add(self.inputs, name, _sum_products(rows, self.largest) / (len(rows) / self.examples))
                if func not in RECURRENT and result.requires_grad:
                    _add(self.outputs, name, rows.new_zeros(()))
                    channels = 1 if func in _CONVOLUTIONS else -1
                    result.register_hook(partial(self._add_gradient, name, channels))
        return result

    def _add_gradient(self, name: str, channels: int, gradient: Tensor) -> None:
        rows = widen(gradient.movedim(channels, -1).flatten(0, -2))
        _add(self.outputs, name, _sum_products(rows))

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each known weight that a call reads, and what it reads per position, ``[positions, n]``."""
        if func in RECURRENT:
            for name, value, _ in find_inputs(self.watched, func, args, kwargs, RECURRENT):
                yield name, value.flatten(0, -2)
        elif func is F.linear or func in _CONVOLUTIONS:
            given: dict[str, Any] = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            value, weight = given.pop("input"), given.pop("weight")
            if (layer := self.watched.get(id(weight))) is None:
                return
            if func is F.linear:
                yield layer, value.flatten(0, -2)
            elif (patches := _find_patches(value, weight, **given)) is not None:
                yield layer, patches


@torch.no_grad()
def read_inputs(model: nn.Module, examples: Examples, names: Iterable[str]) -> dict[str, Tensor]:
    """Return what layers, by name of their weights, read of examples, with the bias's 1, ``[positions, n + 1]``."""
    sums = _FactorSums({id(model.get_parameter(name)): name for name in names})
    sums.rows = {}
    with evaluation_mode(model), sums:
        run_network(model, examples.inputs)
    return sums.rows


def read_surrogates(factors: Factors, context: Context, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return :func:`read_inputs` of layers with factors on ``count`` inputs in the place of those of earlier tasks.

    They are normal, with the means and second moments of the inputs of the first layer, which must be linear and read
    the network's inputs as they are; ``{}`` for other networks. Source: ours.
    """
    layers, example = layers_of(factors), context.task.train.take(torch.arange(1)).inputs
    bias = factors.get(f"{layers[0]} bias") if layers else None
    if not context.number or bias is None or not isinstance(example, Tensor) or not example.is_floating_point():
        return {}
    if bias.values.numel() != example[0].numel():
        return {}
    mean = bias.values.double() / context.number
    moments = factors[f"{layers[0]} inputs"].values.double() / context.number - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(moments)
    noise = torch.randn(count, len(mean), generator=generator, dtype=torch.float64).to(mean)
    inputs = (mean + (noise * values.clamp_min(0).sqrt()) @ vectors.T).to(example).view(count, *example.shape[1:])
    rows = read_inputs(context.model, Examples(inputs, torch.zeros(count)), layers)
    return rows if torch.allclose(rows[layers[0]][:, :-1], widen(inputs.flatten(1))) else {}


def _sum_products(rows: Tensor, largest: int = LARGEST) -> Tensor:
    """Return Σ x xᵀ over the rows, ``[n, n]``, or its diagonal if there are more than ``largest`` columns, ``[n]``."""
    return rows.square().sum(0) if rows.shape[1] > largest else rows.T @ rows


def widen(values: Tensor) -> Tensor:
    """Return values in float32, unless they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a tensor to ``sums[name]``, or store it there if it is missing."""
    sums[name] = sums[name] + value if name in sums else value


_CONVOLUTIONS = (torch.conv1d, torch.conv2d)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")  # of these, and of `F.linear`


def _find_patches(
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """Return what each output position of a convolution reads, ``[positions, n]``; ``None`` if it has groups.

    The arguments are those of ``torch.conv1d`` or ``torch.conv2d``.
    """
    if groups > 1 or value.dim() != weight.dim():
        return None
    kernel = tuple(weight.shape[2:])
    strides, dilations = ((n,) * len(kernel) if isinstance(n, int) else tuple(n) for n in (stride, dilation))
    if isinstance(padding, str):
        wider = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel, strict=True)]
        pads = [(n // 2, n - n // 2) for n in wider]
    else:
        pads = [(n, n) for n in ((padding,) * len(kernel) if isinstance(padding, int) else padding)]
    value = F.pad(value, [n for pair in reversed(pads) for n in pair])
    if len(kernel) == 1:
        value, kernel, strides, dilations = value.unsqueeze(2), (1, *kernel), (1, *strides), (1, *dilations)
    return F.unfold(value, kernel, dilations, 0, strides).transpose(1, 2).flatten(0, 1)


def add_factors(factors: Factors, context: Context, samples: int) -> dict[str, AxisTensor]:
    """Return the factors with those of the present task added, measured on at most ``samples`` of its examples."""
    train, result = context.task.train, dict(factors)
    examples = train.take(torch.randperm(len(train), generator=context.generator(Stream.FISHER_EXAMPLES))[:samples])
    labels = context.generator(Stream.FISHER_LABELS)
    batches = examples.batches(max(1, min(BATCH, POSITIONS * len(examples) // examples.labels.numel())))
    for key, value in measure_factors(context.model, batches, labels, context.classes).items():
        name, _, part = key.rpartition(" ")
        dims = context.axes.shapes[name]
        outputs, inputs = dims[:1], dims[1:]
        shape = context.parameters()[name].shape[1:]
        if part == "inputs" and value.dim() > 1:
            _add_task(result, key, value[:-1, :-1].reshape(shape * 2), inputs * 2)
            _add_task(result, f"{name} bias", value[:-1, -1].reshape(shape), inputs)
        elif part == "inputs":
            _add_task(result, key, value[:-1].reshape(shape), inputs)
        else:
            _add_task(result, key, value, dims if part == "diagonal" else outputs * value.dim())
    return result


def _add_task(factors: dict[str, AxisTensor], key: str, values: Tensor, dims: tuple[Any, ...]) -> None:
    """Add values to ``factors[key]``, or store them there if it is missing; ``dims``: :attr:`AxisTensor.dims`."""
    before = factors.get(key)
    factors[key] = AxisTensor(values if before is None else before.values + values, dims)


def layers_of(factors: Factors) -> list[str]:
    """Return the names of the weights whose layers have Kronecker factors."""
    return [key.removesuffix(" outputs") for key in factors if key.endswith(" outputs")]
