"""The settings of ``regrow evaluate``."""

from dataclasses import dataclass
from typing import Annotated

from regrow.settings import shared
from regrow.settings.constraints import Range
from regrow.settings.declaration import MAX_COUNT, Setting

TASKS = "Tasks"


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow evaluate``: the model, and what is measured of it; each field has its help text."""

    # fmt: off
    model: Annotated[str, Setting(
        "A run folder, or any model that `regrow prune` takes.",
        argument=True, code=True, example="RUN",
    )]
    sources: Annotated[tuple[str, ...], Setting(
        shared.EVALUATED, option="--source", metavar="NAME[=PATH]", group=shared.DATA, source=True,
    )] = ()
    choices: Annotated[tuple[str, ...], Setting(
        "A file of multiple-choice items, one JSON object per line (.jsonl[.gz]). Repeatable.",
        metavar="PATH", group=TASKS, path=True,
    )] = ()
    items: Annotated[int, Setting("Number of items per file.", group=TASKS, range=Range(1, MAX_COUNT))] = 200
    speed: Annotated[bool, Setting("Also measure the time of a forward pass.")] = False
    eval_tokens: shared.EvalTokens = 2048
    seq_len: shared.SeqLen = 256
    batch_size: Annotated[int, Setting(
        "Windows of text that run at a time; 8 is faster than 1 and takes more memory.",
        range=Range(1, 2**16), example="8",
    )] = 1
    dtype: shared.Dtype = ""
    device: shared.Device = "cpu"
    precision: shared.ForwardPrecision = "float32"
    input: shared.Input = ""
    # fmt: on

    def __post_init__(self) -> None:
        shared.check_formats(self.precision, dtype=self.dtype)
