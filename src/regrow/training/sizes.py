"""The size of a network, and of its learner's state, after a task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from regrow.core.axes.axis import AxisTensor
from regrow.core.tasks import first_examples, run_network
from regrow.training.learner import Context


def measure_sizes(context: Context, tensors: Mapping[str, AxisTensor]) -> dict[str, Any]:
    """Return the size of a network at the end of a task: parameters, multiply–accumulates, widths, bytes of state.

    Args:
        context: The network, and the task.
        tensors: The tensors of the learner's state.
    """
    parameters, was = context.parameters(), context.model.training
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_network(context.model.eval(), first_examples(context.task.train, 1).inputs)
    context.model.train(was)
    held = [one.values for one in tensors.values()]
    return {
        "task": context.number,
        "parameters": sum(p.numel() for p in parameters.values()),
        "nonzero": sum(int(p.count_nonzero()) for p in parameters.values()),
        "macs": counter.get_total_flops() // 2,  # of one example
        # Bytes of masks, memories and factors; a mask takes a bit per entry.
        "remembered": sum(-(-x.numel() // 8) if x.dtype == torch.bool else x.numel() * x.itemsize for x in held),
        "widths": {axis.key: axis.size for axis in context.axes.units()},
    }
