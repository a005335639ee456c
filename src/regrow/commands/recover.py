"""``regrow recover``: recover a pruned model in a run folder of its own, measured on the pruning run's windows."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from regrow import store
from regrow.allocation.inventory import inventory
from regrow.axes import AxisGraph
from regrow.commands import prune as pruning_run
from regrow.commands.clock import Clock
from regrow.commands.inputs import describe_sources, read_sources
from regrow.commands.measuring import measure
from regrow.commands.models import DTYPES, load_model
from regrow.commands.recovering import log_differences, recover
from regrow.methods import MethodKind, find_method
from regrow.nets import Loaded, ModelError
from regrow.plan import Plan
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder, WritePage
from regrow.settings.declaration import check_settings, record_settings
from regrow.settings.prune import Settings as PruneSettings
from regrow.settings.recover import Settings
from regrow.settings.words import command_line
from regrow.store.errors import StoreError
from regrow.tracing import trace


def run(
    settings: Settings,
    out: str | Path,
    progress: Progress = silent,
    *,
    code: str = "",
    write_page: WritePage | None = None,
) -> RunFolder:
    """Recover the model of a finished pruning run (or of a run that has recovered one) into a new folder.

    The dense model is loaded as in the pruning run, with the same sources and evaluation windows, and the measurements
    of the dense and the pruned model are copied. An interrupted call is resumed.

    Args:
        settings: The settings of the recovery; those about the pruning run are read from its folder.
        out: The new run folder: new, empty, or of this very run.
        progress: Called with (steps done, steps in all, what is being done).
        code: The function ``pkg.mod:fn`` that builds the dense model, if that is the user's own code: the recorded name
            is never imported.
        write_page: Writes the report page into the complete folder, before it replaces ``out``.

    Raises:
        ValueError: If the folder holds no finished pruning run, or the recovery or a setting is unknown, or ``code`` is
            missing or not needed.
    """
    check_settings(settings)
    pruned, by, tokens, seed = settings.run, settings.by, settings.tokens, settings.seed
    find_method(MethodKind.RECOVERY, by).made(by, settings.recovery_settings)
    source = RunFolder.open(pruned)
    measured = source.metrics()
    origin, wanted = _read_origin(source, code), _complete(settings, source)
    if by == "bias" and wanted.before:
        raise ValueError(
            f"{pruned} was recovered by {', '.join(wanted.before)} already, which may have moved its biases; "
            "bias comes first, on the pruned run"
        )
    taken = find_method(MethodKind.RECOVERY, by).defaults({*wanted.recovery_settings, "seed"})
    identity: dict[str, Any] = {"verb": "recover", "settings": record_settings(wanted), "defaults": taken}
    RunFolder.check(out, **identity)
    clock = Clock(None)
    with clock.stage("load"):
        dense, loaded = _load_models(source, origin, progress)
        kinds = read_sources(pruning_run.source_specs(origin, tokens), loaded)
        axes, plan = _read_cut(source, dense)
    code_words = ("--code", code) if code else ()
    command = command_line(settings, *code_words, "--out", str(out))
    with RunFolder.create(out, **identity, command=command) as folder:
        clock.folder = folder
        folder.update(notes=list(dense.notes), sources=describe_sources(pruning_run.source_specs(origin), kinds))
        if not len(folder.ledger):
            folder.ledger.append(plan)
        _copy_measurements(measured, folder)
        number = len(wanted.before) + 1
        with clock.stage("recover"):
            recover(
                folder, loaded.model, dense, axes, plan, kinds.calibration, by,
                settings=settings.recovery_settings, seed=seed, number=number, progress=progress,
            )  # fmt: skip
        with clock.stage("save"):
            store.write_model(loaded, folder.path)
        with clock.stage("evaluate"):
            after = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
            folder.write_axes(*([row.record() for row in inventory(one)] for one in (axes, after)))
            perplexities = measure(
                folder, loaded, after, kinds.evaluation, kinds.seen, "recovered", progress, recoveries=number
            )
            log_differences(folder, perplexities, number)
        return folder.finish(write_page, seconds=clock.seconds)


def _copy_measurements(rows: Sequence[dict[str, Any]], folder: RunFolder) -> None:
    """Copy the measurements of the source run into the run that recovers it."""
    recoveries = 0
    for row in rows:
        recoveries += row["what"] == "recovery"
        if row["what"] in ("perplexity", "choice", "size", "paired", "verify", "recovery"):
            folder.log(**{**({"round": recoveries} if recoveries > 1 else {}), **row})


def _complete(settings: Settings, source: RunFolder) -> Settings:
    """Return the settings, completed from the folder of the run to recover."""
    data = source.run()
    known = data["settings"]
    inner = known if data["verb"] == "prune" else known["pruning"]
    before = [*known.get("before", ()), known["by"]] if data["verb"] == "recover" else [inner.get("recover", "")]
    done = tuple(name for name in before if name)
    method, keep = "+".join([inner["method"], *done, settings.by]), inner.get("keep")
    name = source.path.resolve().name
    return replace(settings, run=name, pruning=inner, before=done, model=inner["model"], method=method, keep=keep)


def _read_origin(source: RunFolder, code: str) -> PruneSettings:
    """Return the settings of the pruning run behind a run.

    Raises:
        StoreError: If there is no finished pruning run behind it.
        ModelError: If ``code`` is missing or not needed.
    """
    data = source.run()
    if data["verb"] not in ("prune", "recover"):
        raise StoreError(f"{source.path} holds a run of {data['verb']!r}; give the folder of a pruning run")
    settings = data["settings"] if data["verb"] == "prune" else data["settings"]["pruning"]
    try:
        return pruning_run.read_pruning_settings(settings, code)
    except ModelError as error:
        raise ModelError(f"{source.path}: {error}") from None


def _load_models(source: RunFolder, origin: PruneSettings, progress: Progress) -> tuple[Loaded, Loaded]:
    """Load the model before the cut, and after it."""
    dense = load_model(pruning_run.model_spec(origin), progress)
    built = copy.deepcopy(dense.model) if dense.origin.kind == "callable" else None
    net = store.load(source.path, model=built, device=origin.device, dtype=DTYPES.get(origin.dtype))
    return dense, replace(dense, model=net)


def _read_cut(source: RunFolder, dense: Loaded) -> tuple[AxisGraph, Plan]:
    """Return the axes of the model before the cut, and the plan that cut it.

    Raises:
        StoreError: If there is not one plan, or it does more than cut.
    """
    plans = source.ledger.plans()
    if len(plans) != 1 or plans[0].back or any(change.new_units for change in plans[0].changes.values()):
        raise StoreError(f"{source.path}: recovery needs a run of one plan that only cuts; this has {len(plans)} plans")
    axes = trace(dense.model, *dense.example.args, **dense.example.kwargs)
    plans[0].check(axes)
    return axes, plans[0]
