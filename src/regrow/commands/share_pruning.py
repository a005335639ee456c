"""The part of the other ranks in a pruning run of several processes: they measure, and write nothing."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from regrow.axes import AxisGraph
from regrow.commands import pruning as prune
from regrow.commands.calibration import share_calibration
from regrow.commands.generated import count_generated, fill_generated
from regrow.commands.inputs import SourceHalves, read_sources
from regrow.commands.measuring import evaluate_text
from regrow.commands.models import load_model
from regrow.commands.prune_settings import budget_of, model_spec, seeded_settings, source_specs
from regrow.commands.recovering import broadcast_recovered
from regrow.commands.same_inputs import check_same_inputs
from regrow.commands.streamed import StreamedRun, open_streamed
from regrow.distributed import ProcessRank
from regrow.distributed.exchange import broadcast_record, everywhere
from regrow.ledger import with_branches_of
from regrow.methods.pruning.pruner import with_modules
from regrow.nets import Loaded
from regrow.nets.precision import autocasting
from regrow.plan import Plan
from regrow.settings.declaration import check_settings
from regrow.settings.prune import Settings
from regrow.streaming.cut import propose_cut
from regrow.streaming.network import StreamedNetwork
from regrow.surgery import apply
from regrow.tracing import trace


def share(settings: Settings, ranks: ProcessRank, *, code: str = "", memory: str = "") -> None:
    """Measure the share of this rank in a pruning run that rank 0 leads.

    Args:
        settings: The settings of the run, the same on all ranks.
        ranks: The processes.
        code: The function ``pkg.mod:fn`` that builds the network of a run folder, if that is the user's own code.
        memory: How much memory each process may use, such as ``4GiB``; empty: the network is loaded whole.

    Raises:
        ValueError: If a setting, the model, or a source is not usable; says which, and the remedy.
    """
    check_settings(settings)
    method = prune.build_pruner(settings.method, seeded_settings(settings))
    streamed, _ = open_streamed(memory, settings, model_spec(settings), method, lambda line: None, ranks=ranks)
    loaded = streamed.opened.loaded if streamed else load_model(model_spec(settings), code=code)
    kinds = read_sources(source_specs(settings), loaded)
    axes = streamed.opened.axes if streamed else trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    check_same_inputs(ranks, [streamed.opened.weights if streamed else loaded.model], kinds)
    kinds = fill_generated(kinds, source_specs(settings), loaded, count_generated(settings), ranks=ranks)
    with TemporaryDirectory(prefix="regrow-") as place:
        streamed = streamed.with_results(Path(place)) if streamed else None
        network = streamed.network() if streamed else None
        with autocasting(loaded.model, settings.precision):
            given = loaded.model, axes, method, kinds.calibration, ranks, network
            units = budget_of(settings).units(with_modules(method, loaded.model, axes))
            share_calibration(*given, batch_size=settings.batch_size, units=units)
        message = broadcast_record(ranks)
        plan = Plan.from_json(message["plan"])
        if streamed:
            _evaluate(loaded, kinds, settings, ranks, streamed.network())
            _share_streamed_cut(settings, ranks, streamed, kinds, plan, Path(message["folder"]))
        elif loaded.tokenizer is not None:
            _share_cut(settings, ranks, loaded, axes, kinds, plan)


def _share_cut(
    settings: Settings, ranks: ProcessRank, loaded: Loaded, axes: AxisGraph, kinds: SourceHalves, plan: Plan
) -> None:
    _evaluate(loaded, kinds, settings, ranks)
    apply(loaded.model, with_branches_of([plan], loaded.model, axes), plan)
    _evaluate(loaded, kinds, settings, ranks)
    if settings.recover:
        broadcast_recovered(ranks, loaded.model)
        _evaluate(loaded, kinds, settings, ranks)


def _share_streamed_cut(
    settings: Settings, ranks: ProcessRank, streamed: StreamedRun, kinds: SourceHalves, plan: Plan, folder: Path
) -> None:
    """Cut and check blocks, and evaluate the cut network that rank 0 wrote, if every rank sees its folder."""
    cut = propose_cut(streamed.opened, plan)
    cut.share(ranks, proof=settings.proof)
    files = {folder / name: size for name, size in broadcast_record(ranks).items()}
    if everywhere(ranks, all(file.is_file() and file.stat().st_size == size for file, size in files.items())):
        network = cut.network(folder, streamed.results)
        _evaluate(replace(streamed.opened.loaded, model=network.model), kinds, settings, ranks, network)


def _evaluate(
    loaded: Loaded, kinds: SourceHalves, settings: Settings, ranks: ProcessRank, network: StreamedNetwork | None = None
) -> None:
    model: nn.Module = loaded.model if network is None else network.model
    with autocasting(model, settings.precision):
        for _ in evaluate_text(loaded, kinds.evaluation, "", network=network, ranks=ranks):
            pass
