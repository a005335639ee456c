"""Checks of all plans of one calibration before the first is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from regrow.core.axes import AxisGraph
from regrow.core.budget import Timing
from regrow.core.errors import InputError
from regrow.core.sources import Source
from regrow.jobs import pruning as prune
from regrow.jobs.prune_settings import budget_of, seeded_settings
from regrow.methods.pruning.pruner import Pruner, with_modules
from regrow.settings.declaration import record_settings
from regrow.settings.prune import Settings, folder_name
from regrow.store.replacing import settle
from regrow.store.run_record import RUN, is_resumable, read_run, run_identity


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether a folder holds the finished pruning run of these settings; ``False`` if it is to be run or resumed.

    Args:
        settings: The settings of the run.
        folder: Its folder; it need not exist.

    Raises:
        StoreError: If the folder holds something else, such as a run with other settings.
    """
    settle(folder)
    wanted = run_identity("prune", record_settings(settings), None)
    if (folder / RUN).is_file():
        data = read_run(folder)
        if data.get("finished") and data["verb"] == "prune" and data["settings"] == wanted["settings"]:
            return True
    is_resumable(folder, wanted)
    return False


@dataclass(frozen=True)
class LaterPlan:
    """A plan that will be made after the present one, from the same calibration.

    Args:
        settings: The settings of its run.
        pruner: Its method.
    """

    settings: Settings
    pruner: Pruner

    @classmethod
    def of(cls, settings: Settings) -> "LaterPlan":
        """Return the plan with its method, whose settings are checked.

        Args:
            settings: The settings of its run.

        Raises:
            InputError: If a setting of the method is unknown or of another type; names the plan.
        """
        try:
            return cls(settings, prune.build_pruner(settings.method, seeded_settings(settings)))
        except ValueError as error:
            raise InputError(f"{folder_name(settings)}: {error}") from error


def check_later_plans(
    plans: Sequence[LaterPlan], model: nn.Module, axes: AxisGraph, timing: Timing | None, sources: Sequence[Source]
) -> None:
    """Raise InputError unless every plan can be made.

    Args:
        plans: The plans.
        model: The network.
        axes: Its axes.
        timing: The measured times of the network, if a budget counts time.
        sources: The calibration data.

    Raises:
        InputError: If one cannot; names the plan, the value and the remedy.
    """
    for plan in plans:
        budget = replace(budget_of(plan.settings), timing=timing)
        try:
            axes = with_modules(plan.pruner, model, axes)
            prune.check_pruning(plan.pruner, axes, budget, sources)
        except ValueError as error:
            raise InputError(f"{folder_name(plan.settings)}: {error}") from error
