"""The last cut of a network, found in its run folder and in those that it was made from."""

from dataclasses import dataclass
from pathlib import Path

from regrow import store
from regrow.core.plan import Plan
from regrow.jobs.parents import BEFORE, describe_plans
from regrow.jobs.prune_settings import read_pruning_settings
from regrow.nets import ModelError
from regrow.settings import recover
from regrow.settings.prune import Settings
from regrow.store.errors import StoreError
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import RUN, check_repeatable, convert_settings


@dataclass(frozen=True)
class LastCut:
    """The cut after which a network has kept its shape.

    Args:
        folder: The pruning run that made it, or a recovery of that run.
        settings: The settings of the pruning run.
        plan: The plan of the cut.
        before: The folder with a copy of the model before the cut; ``None`` if there is none.
    """

    folder: RunFolder
    settings: Settings
    plan: Plan
    before: Path | None


def find_cut(source: RunFolder, code: str = "") -> LastCut:
    """Return the cut that a recovery of a run makes up for.

    Args:
        source: A finished run.
        code: The function ``pkg.mod:fn`` that builds the network, if that is the user's own code.

    Raises:
        StoreError: If the network was not cut by ``regrow prune``, or has changed its shape since.
        ModelError: If ``code`` is missing.
    """
    folder = source
    while (verb := folder.run()["verb"]) not in ("prune", "recover"):
        if changed := describe_plans(folder.own_ledger.plans()):
            raise StoreError(
                f"{source.path}: `regrow {verb}` changed the shape last ({changed}); recovery makes up for a cut by "
                "`regrow prune`, so recover before that, or prune first"
            )
        if not (folder.path / BEFORE / RUN).is_file():
            raise StoreError(
                f"{source.path}: `regrow prune` has cut nothing of this network"
                f"{' that is recorded here' if folder.run().get('stages') else ''}; recovery makes up for a cut, so "
                "give the folder of a pruning run"
            )
        folder = RunFolder(folder.path / BEFORE)
    data = folder.run()
    check_repeatable(folder.path, data)
    values = data["settings"] if verb == "prune" else convert_settings(data["settings"], recover.Settings).pruning
    try:
        settings = read_pruning_settings(values, code)
    except ModelError as error:
        raise ModelError(f"{source.path}: {error}") from None
    plans = folder.ledger.plans()
    if not plans or plans[-1].back or any(change.new_units for change in plans[-1].changes.values()):
        raise StoreError(f"{folder.path}: recovery needs a run whose last plan only cuts; restore ledger.json")
    before, at = folder.path / BEFORE, folder
    while at.run()["verb"] != "prune" and (before / RUN).is_file():
        at, before = RunFolder(before), before / BEFORE
    return LastCut(folder, settings, plans[-1], before if (before / store.SHAPES).is_file() else None)
