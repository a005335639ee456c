"""What a network's answers would lose along a fixed order of cutting: curvature of the divergence, without labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.axes import Axis, AxisGraph
from regrow.scoring.watch import Feed
from regrow.scoring.weights import Reader, readers
from regrow.sources import Batch, asked, logits_in


def curvature(
    model: nn.Module,
    axes: AxisGraph,
    batch: Batch,
    units: Sequence[Axis],
    fills: Mapping[str, Tensor],
    orders: Sequence[tuple[Sequence[str], Tensor]],
    *,
    seed: int = 0,
) -> list[Tensor]:
    """The divergence to be expected after cutting the first k units of each order, for every k, in nats per position.

    ½ E[(Σ over the units cut of ∂ log p(y) / ∂ gate)²] with y drawn from the network's own answers: the second-order
    term of KL(dense ‖ cut), whose first-order term is zero. The sum is squared, not summed squares, so units of one
    order that lose the same thing count for what they lose together; what two orders lose together is left out.
    A gate's derivative is taken per position.

    Args:
        model: The network, in eval mode; its parameters need no gradients.
        axes: Its axes.
        batch: What to answer.
        units: The axes whose units the orders name.
        fills: Name of a reading weight → what stands in for each dropped input, ``[C]``; 0 where not named.
        orders: Per order, axis keys, and places in the row of all their units, first to be cut first.
        seed: Of the answers drawn.

    Returns:
        Per order one number per unit, ``[n]`` float64.

    Raises:
        ValueError: If an axis is read at two resolutions.

    Source: the Fisher information of masks, Kwon et al. (arXiv 2204.09656); the sums along an order are ours.
    """
    parameters, reads = dict(model.named_parameters()), readers(axes, units)
    watched = {id(parameters[reader.weight]): reader.weight for reader in reads}
    probe = _Probe(watched, reads, fills, parameters)
    with torch.enable_grad(), probe:
        batch = batch.to(next(model.parameters()).device)
        logits = logits_in(model(*batch.args, **batch.kwargs))
        said = F.log_softmax(asked(logits, batch.labels).float(), -1)
        generator = torch.Generator(said.device).manual_seed(seed)
        drawn = torch.multinomial(said.detach().exp(), 1, generator=generator)
        said.gather(1, drawn).sum().backward(inputs=[probe.zero])
    curves = []
    for keys, order in orders:
        felt = torch.cat([probe.felt[key] for key in keys], 1)[:, order.to(said.device)]
        curves.append(0.5 * felt.cpu().double().cumsum(1).square().mean(0))
    return curves


class _Probe(Feed):
    """Takes the derivative by each unit's gate, per position, where the weights that read it are contracted."""

    def __init__(
        self,
        watched: Mapping[int, str],
        reads: Sequence[Reader],
        fills: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
    ) -> None:
        super().__init__(watched)
        self.reads, self.fills, self.parameters = reads, fills, parameters
        self.felt: dict[str, Tensor] = {}
        # Something that needs a gradient, so that one is kept for every input behind it.
        self.zero = torch.zeros((), requires_grad=True)

    def fed(self, name: str, value: Tensor, dim: int) -> Tensor:
        felt = value + self.zero.to(value)
        felt.register_hook(self._hook(name, value.detach(), dim))
        return felt

    def _hook(self, name: str, value: Tensor, dim: int) -> Callable[[Tensor], None]:
        fill: Any = self.fills[name].to(value.device, torch.float32) if name in self.fills else torch.zeros(1)
        fill = fill.to(value.device).view(-1, *(1,) * (-dim - 1))

        def hook(gradient: Tensor) -> None:
            rows = (gradient.float() * (value.float() - fill)).movedim(dim, -1).flatten(0, -2)
            for reader in self.reads:
                if reader.weight == name:
                    where = reader.positions(rows.shape[1], self.parameters[name].shape[reader.slot.dim])
                    felt = rows[:, where.flatten().to(rows.device)].unflatten(1, where.shape).sum(2)
                    before = self.felt.setdefault(reader.axis, torch.zeros_like(felt))
                    if before.shape != felt.shape:
                        raise ValueError(
                            f"{reader.axis!r} is read at {len(before)} positions and at {len(felt)}: its curvature "
                            "cannot be summed; start as the base method or uniformly"
                        )
                    self.felt[reader.axis] = before + felt

        return hook
