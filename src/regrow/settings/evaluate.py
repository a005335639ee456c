"""The settings of ``regrow evaluate``."""

from dataclasses import dataclass
from typing import Annotated

from regrow.settings.declaration import MANY, Range, Setting
from regrow.settings.loading import Device, Dtype, EvalTokens, Input, SeqLen, Sources

TASKS = "Tasks"


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow evaluate``: the model, and what is measured of it; each field has its help text."""

    # fmt: off
    model: Annotated[str, Setting(
        "A run folder, or anything that `regrow prune` takes.",
        argument=True, code=True, example="RUN",
    )]
    sources: Sources = ()
    choices: Annotated[tuple[str, ...], Setting(
        "Multiple-choice items, JSON lines (.gz).",
        metavar="PATH", group=TASKS, path=True,
    )] = ()
    harness: Annotated[tuple[str, ...], Setting(
        "Let EleutherAI's lm-eval run one of its tasks (arc_easy; it fetches the data), or a file of items as for "
        "--choices, on which it fetches nothing.",
        metavar="TASK|FILE", group=TASKS,
    )] = ()
    items: Annotated[int, Setting("How many items of each file or task.", group=TASKS, range=Range(1, MANY))] = 200
    speed: Annotated[bool, Setting("Also time a forward pass.")] = False
    eval_tokens: EvalTokens = 2048
    seq_len: SeqLen = 256
    dtype: Dtype = ""
    device: Device = "cpu"
    input: Input = ""
