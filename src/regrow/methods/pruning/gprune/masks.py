"""Masks over modules of units, and the loss of the masked network against the dense one.

GPrune learns and judges allocations by them. The order in which the units of a module are cut is fixed; what is cut
follows from one pruning ratio per module.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regrow.allocation.solved import soft_step
from regrow.core.axes import AxisGraph
from regrow.core.sources import Batch, device_of, labelled_logits, logits_in
from regrow.surgery.gate import gate_inputs


@dataclass(frozen=True)
class Masks:
    """Fixed orders of the units in their modules, in one view per ranking (by all sources; by all but one).

    Args:
        modules: Axis key → the module number of each unit, ``[views, size]`` int64.
        places: Axis key → the relative rank of each unit in its module, in (0, 1), lowest cut first, ``[views, size]``.
        fills: Name of a weight that reads units → the value that replaces each dropped input, ``[views, C]``; 0 for
            weights without an entry.
        width: The range of relative ranks around the ratio that has a gradient, ``[modules]``.
    """

    modules: Mapping[str, Tensor]
    places: Mapping[str, Tensor]
    fills: Mapping[str, Tensor]
    width: Tensor

    def margins(self, share: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return each unit's relative rank minus its module's pruning ratio, by axis key; units below 0 are cut.

        Args:
            share: The pruning ratio of each module, ``[modules]``.
            view: Which ranking is used.
        """
        return {key: place[view] - share[self.modules[key][view]] for key, place in self.places.items()}

    def gates(self, share: Tensor, view: int = 0) -> dict[str, Tensor]:
        """Return 1 for units that stay and 0 for units that are cut, by axis key, with a gradient to the ratios.

        Args:
            share: The pruning ratio of each module, ``[modules]``.
            view: Which ranking is used.
        """
        return {
            key: soft_step(place[view], share.index_select(0, label), self.width[label]).float()
            for key, place in self.places.items()
            for label in (self.modules[key][view],)
        }

    def filled(self, view: int = 0) -> dict[str, Tensor]:
        """Return the values that replace dropped inputs, by name of the weight that reads them.

        Args:
            view: Which ranking is used.
        """
        return {name: fill[view] for name, fill in self.fills.items()}

    def given(self, kept: Mapping[str, tuple[int, ...]]) -> Tensor:
        """Return the fraction of each module's units (first view) that a choice of units cuts, ``[modules]`` float64.

        Args:
            kept: Axis key → the units that stay.
        """
        labels = torch.cat([label[0] for label in self.modules.values()])
        gone = torch.ones(len(labels), dtype=torch.float64)
        start = 0
        for key, label in self.modules.items():
            gone[torch.tensor(kept[key], dtype=torch.int64) + start] = 0
            start += label.shape[1]
        count = torch.bincount(labels)
        return torch.zeros(len(count), dtype=torch.float64).index_add(0, labels, gone) / count


@dataclass
class Comparison:
    """KL(dense ‖ masked) in nats per position, with the dense network's probabilities cached up to a memory limit.

    Args:
        memory: GiB of the dense network's probabilities that may be cached.
        kept: The cache: ``id`` of a batch → the batch, the probabilities, and their mean entropy in nats.
    """

    memory: float = 3.0
    kept: dict[int, tuple[Batch, Tensor, float]] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        model: nn.Module,
        axes: AxisGraph,
        batch: Batch,
        gates: Mapping[str, Tensor],
        fills: Mapping[str, Tensor],
    ) -> Tensor:
        """Return the loss of the masked network on a batch, as a scalar with a gradient to the gates.

        Args:
            model: The dense network.
            axes: Its axes.
            batch: The batch, on any device.
            gates: Axis key → the mask of its units, ``[size]``.
            fills: Name of a weight → the values that replace its dropped inputs, ``[C]``.
        """
        chances, entropy = self._dense(model, batch)
        here = batch.to(device_of(model))
        with gate_inputs(model, axes, gates, fills):
            logits = logits_in(here.run(model))
        # KL(p ‖ q) = H(p, q) − H(p), and the first is one fused operation: half the time of ``kl_div`` on text.
        return F.cross_entropy(labelled_logits(logits, here.labels).float(), chances) - entropy

    def _dense(self, model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
        """Return the dense network's probabilities, ``[positions, classes]``, and their mean entropy in nats."""
        if id(batch) in self.kept:
            return self.kept[id(batch)][1:]
        here = batch.to(device_of(model))
        with torch.no_grad():
            logits = logits_in(here.run(model))
            chances = labelled_logits(logits, here.labels).float().softmax(-1)
            entropy = float(torch.special.entr(chances).sum(-1).mean())
        if sum(one[1].nbytes for one in self.kept.values()) + chances.nbytes <= self.memory * 2**30:
            self.kept[id(batch)] = (batch, chances, entropy)
        return chances, entropy
