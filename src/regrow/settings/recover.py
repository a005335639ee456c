"""The settings of ``regrow recover``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from regrow.settings.declaration import MANY, SEED, Range, Setting


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow recover``: everything that a recovery run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    run: Annotated[str, Setting(
        "The folder of a finished pruning run, or of a run that recovered one; it is only read.",
        argument=True, path=True, example="RUN --by refit --out RUN2",
    )]
    by: Annotated[str, Setting("bias, refit, lora or distil: see `regrow methods NAME`.", code=True, example="refit")]
    tokens: Annotated[int, Setting(
        "Tokens to learn from, of all sources; or images.",
        range=Range(1, MANY), shown=True,
    )] = 32768
    recovery_settings: Annotated[Mapping[str, Any], Setting(
        "A setting of the recovery (`regrow methods NAME`).",
        option="--set", metavar="NAME=VALUE",
    )] = field(default_factory=dict)
    pruning: Annotated[Mapping[str, Any], Setting(
        "The settings of the pruning run.",
        hidden=True,
    )] = field(default_factory=dict)
    before: Annotated[tuple[str, ...], Setting("The recoveries that RUN has had already.", hidden=True)] = ()
    model: Annotated[str, Setting("The model of the pruning run.", hidden=True)] = ""
    method: Annotated[str, Setting("What pruned it, and what recovered it since.", hidden=True)] = ""
    keep: Annotated[float | None, Setting("The fraction kept, if that was asked for.", hidden=True)] = None
    seed: Annotated[int, Setting("Which windows are drawn, and in which order.", range=SEED, shown=True)] = 0
