"""The part of the other ranks in a search of several processes: they train, and write nothing."""

from dataclasses import replace
from typing import Any, cast

from regrow.candidates import Staged
from regrow.commands import spaces, stage_memory
from regrow.commands.retraining import retrain
from regrow.commands.same_inputs import check_same_settings, check_same_tasks
from regrow.commands.search import build_search, build_space, end_context
from regrow.commands.search_inputs import read_inputs, read_parts, trace_examples
from regrow.commands.searching import measure_statistics, train_space
from regrow.commands.starting import find_start
from regrow.distributed import ProcessRank
from regrow.distributed.exchange import broadcast_record
from regrow.distributed.parallel import Parallel
from regrow.evaluation import Latency
from regrow.settings.declaration import check_settings
from regrow.settings.search import Settings
from regrow.surgery import UndoStore
from regrow.training.fit import finish
from regrow.training.resuming import receive_start


def share(settings: Settings, ranks: ProcessRank, *, code: str = "") -> None:
    """Search and retrain with rank 0, which leads the run.

    Args:
        settings: The settings of the run, the same on all ranks.
        ranks: The processes; this one is not rank 0.
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code.

    Raises:
        ValueError: If a setting, the data or the target is not usable; says which, and the remedy.
    """
    check_settings(settings)
    check_same_settings(ranks, settings)
    start = find_start(settings.space, settings.data, settings.input, code)
    inputs = read_inputs(settings, start, ranks)
    parts = read_parts(inputs.data)
    times = broadcast_record(ranks)
    model, origin, plan = build_space(inputs, parts.search)
    model.to(inputs.device)
    axes = trace_examples(model, parts.search, parts.kwargs)
    check_same_tasks(ranks, model, parts.tasks)
    table = Latency(**times) if times else None
    search, undo = build_search(inputs, model, axes, plan, table), UndoStore()
    model, axes, state = receive_start(ranks, model, axes, search.learner.state, undo)
    if state.learner.recomputed:
        cast(Staged, model).recomputed = True
    context, more = end_context(inputs, parts, model, axes, undo), dict[str, Any](state=state)
    if inputs.memory:
        more["around"] = stage_memory.MemoryWatch(search, inputs.memory, inputs.batch_size, dict(state.learner.memory))
    fitted = train_space(search, context, inputs.schedule, **more, parallel=Parallel(ranks, by_rows=True))
    fitted, _ = finish(search.learner, fitted, replace(context, model=fitted.model, axes=fitted.axes))
    found, _ = spaces.extract_network(fitted.model, origin)
    measure_statistics(found, context, inputs.batch_size)
    if inputs.retraining:
        retrain(None, inputs.retraining, parts, found, ranks=ranks)
