"""The order in which the units of each linear layer are removed, by second-order costs on calibration data."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from regrow.axes import Axis, AxisGraph
from regrow.progress import Progress, silent
from regrow.scores import Statistics
from regrow.scoring.activations import moments_of
from regrow.scoring.collect import BlockVisits
from regrow.scoring.grams import Gram, linear_readers, sum_products
from regrow.scoring.second_order import Elimination, eliminate
from regrow.sources import Batch

BATCH = 8
"""The most windows that should be in a batch of the data."""


def order_layers(
    model: nn.Module,
    axes: AxisGraph,
    weights: Mapping[str, Tensor],
    units: Sequence[Axis],
    statistics: Statistics,
    batches: Sequence[Batch],
    *,
    ridge: float,
    centre: bool,
    rates: Mapping[str, Tensor] | None = None,
    visits: BlockVisits | None = None,
    progress: Progress = silent,
) -> dict[str, Elimination]:
    """Remove the units of every axis that one linear layer reads, one after the other, as :func:`eliminate` does.

    Args:
        model: The network.
        axes: Its axes.
        weights: Parameter name → tensor.
        units: The axes to look at.
        statistics: What was collected on the data, the moments of inputs among it.
        batches: The data.
        ridge: The ridge of the least squares, as a fraction of each input's Σ x².
        centre: Whether a bias makes up for the means of dropped inputs.
        rates: Axis key → what the cost of each unit is multiplied by, ``[size]``; ``None``: nothing.
        visits: Runs the network block by block, where it does not fit into memory; ``None``: it runs as a whole.
        progress: Called with (layers ordered, layers in all, what is being done).

    Returns:
        Axis key → the order and the costs of its units; without axes that several weights read, or other than linear
        layers, or whose inputs do not vary.

    Raises:
        ValueError: If there is no data, the data never reach a layer, or a layer's inputs cannot be solved for; names
            the layer.
    """
    shapes = {name: one.shape for name, one in model.named_parameters()}
    inside, own = _recurrent_weights(model), dict(model.named_parameters(remove_duplicate=False))
    layers = {
        name: reader
        for name, reader in linear_readers(axes, units, shapes).items()
        if id(own[name]) not in inside
        and len(moments_of(statistics, name).total) == shapes[name][reader.slot.dim]
        and float(statistics.moments[name].variance.sum()) > 0
    }
    widths = {name: shapes[name][reader.slot.dim] for name, reader in layers.items()}
    result: dict[str, Elimination] = {}

    def order(name: str, gram: Gram) -> None:
        progress(len(result), len(widths), "ordering the units of layers")
        reader, weight = layers[name], weights[name].detach()
        rows = weight if reader.slot.dim else weight.T
        channels = reader.positions(widths[name], widths[name])
        own = None if rates is None else rates[reader.axis]
        try:
            result[reader.axis] = eliminate(gram.mean_products(centre=centre), rows, channels, ridge, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    if widths and not len(batches):
        raise ValueError("this method reads the data itself, got none; give Evidence with data=")
    sum_products(model, widths, batches, order, visits)
    return result


def _recurrent_weights(model: nn.Module) -> set[int]:
    """Return the ``id`` of each weight whose inputs are made inside recurrent layers, where they cannot be watched."""
    return {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
        for weight in module.parameters(recurse=False)
    }
