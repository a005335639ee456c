"""The training of a found network on all training examples, after a search."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from regrow.candidates import fold_scales
from regrow.commands.search_inputs import Parts, Retraining, trace_examples
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import Parallel
from regrow.methods.search.retrain import RetrainState, build
from regrow.methods.search.retrain import Settings as RetrainSettings
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import History, read_checkpoint, write_checkpoint
from regrow.training.continual import learn
from regrow.training.learner import Context, write_replacements
from regrow.training.resuming import broadcast_start, receive_start
from regrow.training.state import TrainState

RETRAINING = "retraining.safetensors"


def retrain(
    folder: RunFolder | None,
    retraining: Retraining,
    parts: Parts,
    searched: nn.Module,
    progress: Progress = silent,
    ranks: ProcessRank = SINGLE,
) -> nn.Module:
    """Train the found network on all training examples, re-initialised unless ``inherit``; weights at 0 stay 0.

    Args:
        folder: The run folder, for the checkpoint; ``None`` on other ranks than 0.
        retraining: How it is trained.
        parts: The data.
        searched: The found network; it is not changed.
        progress: Called with (steps done, steps in all, what is being done).
        ranks: The processes that train together; all of them call this.
    """
    model = clone_model(searched)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(retraining.schedule.seed)
        for module in model.modules():
            if not retraining.inherit and callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    axes = trace_examples(model, parts.whole, parts.kwargs)
    context = Context(model, axes, parts.whole, objective=retraining.schedule.objective)
    learner = build(RetrainSettings(cutout=retraining.cutout), context, dict(searched.named_parameters()))

    def write(now: TrainState[RetrainState], _: Context) -> None:
        if folder:
            write_checkpoint(folder.path / RETRAINING, model, now)

    if folder:
        place, state = folder.path / RETRAINING, TrainState(learner.state)
        resumed = folder.resumed and place.is_file()
        broadcast_start(ranks, History() if resumed else None, place)
        if resumed:
            model, axes, state = read_checkpoint(place, model, axes, learner.state)
    else:
        model, axes, state = receive_start(ranks, model, axes, learner.state)
    more: dict[str, Any] = {"state": state, "checkpoint": write, "parallel": Parallel(ranks, by_rows=True)}
    fitted = learn(model, axes, [parts.whole], learner, retraining.schedule, progress=progress, **more)
    write_replacements(learner, fitted.state.learner, replace(context, model=fitted.model, axes=fitted.axes))
    fold_scales(fitted.model)
    return fitted.model.eval()
