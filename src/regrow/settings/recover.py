"""The settings of ``regrow recover``."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from regrow.core.errors import InputError
from regrow.settings.constraints import Range
from regrow.settings.declaration import MAX_COUNT, SEED, Setting
from regrow.settings.shared import PRECISION, Undo

# Names of recoveries that solve for weights instead of training them; forward passes run in the dtype of the weights.
CLOSED_FORM = ("refit",)


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow recover``: everything that a recovery run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    run: Annotated[str, Setting(
        "The folder of a finished run whose last change of shape was a cut by `regrow prune`; it is not changed.",
        argument=True, path=True, example="RUN --by refit --out RUN2",
    )]
    by: Annotated[str, Setting(
        "The recovery method: refit, lora or distil; `regrow methods NAME` explains one.",
        code=True, example="refit",
    )]
    tokens: Annotated[int, Setting(
        "Tokens (image models: images) to train on, over all sources together.",
        range=Range(1, MAX_COUNT), always_shown=True,
    )] = 32768
    recovery_settings: Annotated[Mapping[str, Any], Setting(
        "A setting of the recovery method; `regrow methods NAME` lists them. Repeatable.",
        option="--set", metavar="NAME=VALUE",
    )] = field(default_factory=dict)
    pruning: Annotated[Mapping[str, Any], Setting(
        "The settings of the pruning run.",
        hidden=True,
    )] = field(default_factory=dict)
    before: Annotated[tuple[str, ...], Setting("The recoveries that RUN has had already.", hidden=True)] = ()
    model: Annotated[str, Setting("The model of the pruning run.", hidden=True)] = ""
    method: Annotated[str, Setting("The method that pruned the model, and those that recovered it.", hidden=True)] = ""
    keep: Annotated[float | None, Setting("The requested fraction of weights, if any.", hidden=True)] = None
    seed: Annotated[int, Setting("Random seed of order and new weights.", range=SEED, always_shown=True)] = 0
    precision: Annotated[str, replace(
        PRECISION, help="As for `regrow prune`, of a recovery that trains (lora, distil); default: that of the run.",
        group="",
    )] = ""
    undo: Undo = True
    # fmt: on

    def __post_init__(self) -> None:
        if self.precision not in ("", "float32") and self.by in CLOSED_FORM:
            raise InputError(
                f"{self.by} solves for weights in their own format, not in {self.precision}; leave out --precision, or "
                "recover by lora or distil"
            )
