"""Sums of products of a layer's inputs, Σ x xᵀ, over calibration data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.scoring.gradients import evaluation_mode
from regrow.scoring.watch import Feed
from regrow.sources import Batch, device_of

ROWS = 4096
"""The number of rows summed at a time in float32."""
LIMIT = 2 * 2**30
"""The most bytes of sums that are kept at a time; layers beyond it are measured in another pass over the data."""


@dataclass
class Gram:
    """Sums over the inputs x of a layer.

    Args:
        products: Σ x xᵀ, ``[k, k]`` float64.
        total: Σ x, ``[k]`` float64.
        rows: The number of inputs.
    """

    products: Tensor
    total: Tensor
    rows: int = 0

    def add(self, rows: Tensor) -> None:
        """Add inputs.

        Args:
            rows: The inputs, ``[rows, k]``.
        """
        for part in rows.split(ROWS):
            part = part.double() if part.dtype == torch.float64 else part.float()
            self.products += (part.T @ part).to(self.products)
            self.total += part.sum(0).to(self.total)
            self.rows += len(part)

    def centred(self) -> Tensor:
        """Return Σ (x − mean) (x − mean)ᵀ, ``[k, k]``."""
        return self.products - torch.outer(self.total, self.total) / max(1, self.rows)


def grams(model: nn.Module, widths: Mapping[str, int], batches: Sequence[Batch]) -> Iterator[tuple[str, Gram]]:
    """Return the sums of the inputs of linear layers, in as few passes over the data as the memory for them allows.

    Args:
        model: The network.
        widths: Name of the weight of each layer → its number of inputs.
        batches: The data.

    Raises:
        ValueError: If no batch reaches a layer.
    """
    parts: list[dict[str, int]] = [{}]
    for name, width in widths.items():
        if parts[-1] and sum(8 * k * k for k in (*parts[-1].values(), width)) > LIMIT:
            parts.append({})
        parts[-1][name] = width
    own, device = dict(model.named_parameters(remove_duplicate=False)), device_of(model)
    for part in parts:
        sums = {name: _empty(width, device) for name, width in part.items()}
        watch = _GramFeed({id(own[name]): name for name in part}, sums)
        with evaluation_mode(model), torch.no_grad(), watch:
            for batch in batches:
                here = batch.to(device)
                model(*here.args, **here.kwargs)
        for name in part:
            if not sums[name].rows:
                raise ValueError(f"no batch reached the weight {name!r}; give more data, or --exclude {name}")
            yield name, sums.pop(name)


def _empty(width: int, device: torch.device) -> Gram:
    home = torch.device("cpu") if device.type == "mps" else device
    products = torch.zeros(width, width, dtype=torch.float64, device=home)
    return Gram(products, products.new_zeros(width))


class _GramFeed(Feed):
    """Adds the inputs of watched weights to sums, and leaves them as they are."""

    def __init__(self, watched: Mapping[int, str], sums: Mapping[str, Gram]) -> None:
        super().__init__(watched)
        self.sums = sums

    def fed(self, name: str, value: Tensor, dim: int) -> Tensor:
        self.sums[name].add(value.detach().movedim(dim, -1).flatten(0, -2))
        return value
