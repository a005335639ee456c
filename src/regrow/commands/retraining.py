"""The training of a found network on all training examples, after a search."""

from dataclasses import replace

import torch
from torch import nn

from regrow.candidates import fold_scales
from regrow.commands.recording import Record
from regrow.commands.search_inputs import Parts, make_schedule, trace_examples
from regrow.distributed import SINGLE, ProcessRank
from regrow.distributed.parallel import Parallel
from regrow.methods.search.retrain import RetrainState, build
from regrow.methods.search.retrain import Settings as RetrainSettings
from regrow.progress import Progress, silent
from regrow.settings.search import Settings
from regrow.store.statistics import FOLDER as STATISTICS
from regrow.tracing.meta_copy import clone_model
from regrow.training.checkpoint import History, write_checkpoint
from regrow.training.continual import learn
from regrow.training.learner import Context, write_replacements
from regrow.training.resuming import read_start
from regrow.training.state import TrainState

RETRAINING = "retraining.safetensors"


def retrain(
    record: Record,
    settings: Settings,
    parts: Parts,
    searched: nn.Module,
    progress: Progress = silent,
    ranks: ProcessRank = SINGLE,
) -> nn.Module:
    """Train the found network on all training examples, re-initialised unless ``inherit``; weights at 0 stay 0.

    Args:
        record: The run, for the checkpoint.
        settings: The settings of the search.
        parts: The data.
        searched: The found network; it is not changed.
        progress: Called with (steps done, steps in all, what is being done).
        ranks: The processes that train together; all of them call this.
    """
    model, schedule = clone_model(searched), make_schedule(settings, parts.objective, settings.retrain, "cosine")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if not settings.inherit and callable(reset):
                reset()
    axes = trace_examples(model, parts.whole, parts.kwargs)
    context = Context(model, axes, parts.whole, objective=parts.objective)
    learner = build(RetrainSettings(cutout=settings.cutout), context, dict(searched.named_parameters()))
    place = record.path / STATISTICS / RETRAINING
    place.parent.mkdir(exist_ok=True)

    def write(now: TrainState[RetrainState], there: Context) -> None:
        if record.kept:
            write_checkpoint(place, there.model, now)

    history = History() if place.is_file() else None
    model, axes, state = read_start(ranks, history, place, model, axes, learner.state)
    fitted = learn(
        model,
        axes,
        [parts.whole],
        learner,
        schedule,
        state=state,
        checkpoint=write,
        progress=progress,
        parallel=Parallel(ranks, by_rows=True),
    )
    write_replacements(learner, fitted.state.learner, replace(context, model=fitted.model, axes=fitted.axes))
    fold_scales(fitted.model)
    return fitted.model.eval()
