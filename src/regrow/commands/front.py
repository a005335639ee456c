"""The front of a search: the networks that its last stage passes on its way down to the target, each as files."""

import copy
from dataclasses import replace
from math import inf

from torch import nn

from regrow import store
from regrow.axis_tensor import AxisTensor
from regrow.commands import spaces
from regrow.commands.folder import RunFolder
from regrow.evaluation.continual import share_right
from regrow.learner import Stand
from regrow.methods.search.searcher import Searcher
from regrow.nets.loaded import Origin
from regrow.surgery import UndoStore
from regrow.tracing.meta_copy import clone_model
from regrow.training.learning import changed

FOLDER = "front"


def passed(folder: RunFolder, learner: Searcher, at: Stand, origin: Origin) -> None:
    """Leave what stands now as a network of its own in ``front/EPOCH``, where the search is in its last stage.

    Args:
        folder: The run folder; gets a line with the network's size, and its accuracy on the validation part.
        learner: What searches; it goes on as if nothing had been asked.
        at: Where the search stands, at the end of an epoch.
        origin: How the whole space was built.
    """
    if not learner.shrinks or learner.last != (learner.ends or (-1,))[-1] or not learner.joint(at):
        return
    twin, there = copy.copy(learner), replace(at, model=clone_model(at.model))
    twin.tensors = {n: AxisTensor(one.values.detach().clone(), one.dims, one.lr) for n, one in learner.tensors.items()}
    twin.values, twin.undo, twin.most, twin.gates = copy.deepcopy(learner.values), UndoStore(), inf, None
    while plan := twin.final(there):
        changed(there, twin, plan)
    twin.baked(there)
    net, described = spaces.left(there.model, origin)
    epoch = at.epoch + 1
    store.write_model(net, folder.path / FOLDER / f"{epoch:04d}", origin=described)
    folder.log("front", epoch=epoch, size=twin.size(), accuracy=share_right(net, at.task.test), **sizes(net))


def sizes(model: nn.Module) -> dict[str, int]:
    """How many parameters a network has, and how many of them are not 0."""
    parameters = [*model.parameters()]
    found = {"parameters": sum(p.numel() for p in parameters)}
    return found | {"nonzero": sum(int(p.count_nonzero()) for p in parameters)}
