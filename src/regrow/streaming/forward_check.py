"""Compare the own forward pass of a network that is larger than memory with its recording, block by block."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from regrow.axes import Example
from regrow.plan import PlanError
from regrow.streaming.network import StreamedNetwork
from regrow.surgery.output_comparison import max_difference, max_magnitude
from regrow.surgery.runner import Answers, Runner, floats, preserve_generators, reseed
from regrow.tracing.blocks import GraphBlock
from regrow.tracing.capture import Capture, evaluating
from regrow.tracing.steps import operations


def check_streamed_run(
    network: StreamedNetwork, recorded: Capture, blocks: Sequence[GraphBlock], example: Example
) -> None:
    """Raise ``PlanError`` unless a network's own forward pass gives what its recording gives.

    Outputs that are not equal bit for bit may differ by three times the rounding of the recording.

    Args:
        network: The network; its blocks are loaded as they are needed, twice.
        recorded: Its recording.
        blocks: The blocks of the recording.
        example: The input of both.
    """
    with network.on_demand() as model, preserve_generators(), evaluating(model), torch.no_grad():
        reseed(0)
        outputs = floats(model(*example.args, **example.kwargs))
    replayed = _replay(network, recorded, blocks, example)
    distance = max_difference(outputs, replayed)
    if distance == 0:
        return
    rounding = max_difference(replayed, _replay(network, recorded, blocks, example, double=True))
    if not distance <= 3 * rounding:
        raise PlanError(
            f"the plan cannot be carried out: outputs of the cut network differ by {distance:.1e} of "
            f"{max_magnitude(outputs):.1e} from what was recorded; load the model whole, without --memory"
        )


def _replay(
    network: StreamedNetwork, recorded: Capture, blocks: Sequence[GraphBlock], example: Example, double: bool = False
) -> Answers:
    """Return the outputs of a recording, with one block in memory at a time."""

    def load(name: str, double: bool) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor = getattr(network.model.get_submodule(path), leaf).detach()
        return tensor.double() if double and tensor.is_floating_point() else tensor

    nodes = operations(recorded)
    names = {block.path: block.names for block in network.blocks}
    leaves = tree_leaves((example.args, dict(example.kwargs)))
    with network.resident(network.outer), preserve_generators():
        reseed(0)
        runner = Runner(recorded, leaves, load, double)
        for block in blocks:
            with network.resident(names.get(block.path, ())):
                runner.run_until(nodes[block.stop] if block.stop < len(nodes) else None)
        runner.run_until()
    return runner.answers
