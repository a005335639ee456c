"""The settings of ``regrow search``."""

from dataclasses import dataclass, field
from typing import Annotated

from regrow.core.amounts import Measure, Target
from regrow.core.errors import InputError
from regrow.settings import shared
from regrow.settings.constraints import OPEN_UNIT, Range
from regrow.settings.declaration import Setting, list_declared

SEARCH, RETRAIN = "Search", "Training of the final network"

# The measures that a search can use for single weights and operations.
SIZES = (Measure.PARAMETERS, Measure.NONZERO, Measure.MACS, Measure.BYTES, Measure.TIME)


def parse_search_target(text: str) -> Target:
    """Parse the target of a search, ``MEASURE=AMOUNT`` or ``MEASURE=SHARE%``.

    Raise ValueError for a measure that is not in ``SIZES``, a number of tokens (``@512``), or a share of 100 %.

    >>> str(parse_search_target("macs=3M"))
    'macs=3000000'
    """
    target = Target.parse(text)
    if target.measure not in SIZES or target.context or target.share == 1:
        raise ValueError(f"a search takes a share below 100 % or an amount of {', '.join(SIZES)}; got {text!r:.60}")
    return target


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow search``, on which a search depends; ``run.json`` stores them with the method's defaults."""

    # fmt: off
    space: Annotated[str, Setting(
        "cells:WIDTH-CELLS-NODES (DARTS-like), mobile:WIDTH-BLOCKS (inverted bottlenecks), a network such as "
        "resnet:16-3, your function pkg.mod:fn, or a MODEL that `regrow prune` takes.",
        argument=True, code=True, example="cells:4-3-2 --data digits --target params=20% --out RUN",
    )]
    data: Annotated[str, Setting(
        "digits, or a folder: MNIST's four files, or train/CLASS/… and test/CLASS/…; for a language model text: news, "
        "code, manual, talk or NAME=PATH.",
        group=shared.DATA, common=True, example="digits",
    )]
    target: Annotated[str, Setting(
        "The largest allowed size: params=50k, nonzero=50k (parameters other than 0), macs=3M, bytes=200k, ms=20 "
        "(measured here), or a share of the whole space (macs=20%).",
        common=True, example="params=50k", exclusive_group="how large the result may be",
    )] = ""
    smaller: Annotated[float | None, Setting(
        "How much smaller than the whole space the result is, in parameters: 80% is --target params=20%.",
        metavar="SHARE", common=True, range=OPEN_UNIT, example="80%",
        exclusive_group="how large the result may be",
    )] = None
    method: Annotated[str, Setting("The method; `regrow methods` lists all.", common=True, code=True)] = "mgas"
    method_settings: shared.MethodSettings = field(default_factory=dict)
    stages: Annotated[int, Setting(
        "Number of stages, each of which searches a longer prefix of the network; 0: three, at most one per part, or "
        "what --memory needs.",
        group=SEARCH, range=Range(0, 99),
    )] = 0
    memory: Annotated[str, Setting(
        "Memory budget of a stage, such as 2GiB: stages are chosen to fit, and parts recomputed in the backward pass "
        "if needed.",
        metavar="BYTES", group=SEARCH, common=True, example="2GiB",
    )] = ""
    round_to: Annotated[int, Setting(
        shared.ROUND, option="--round", group=SEARCH, range=Range(1, 2**20), example="8",
    )] = 1
    epochs: Annotated[int, Setting(
        "Epochs of the search; 0 for methods that do not train.",
        group=SEARCH, common=True, range=Range(0, 10**6),
    )] = 30
    retrain: Annotated[int, Setting(
        "Epochs of training after the search; 0: none.",
        group=RETRAIN, common=True, range=Range(0, 10**6),
    )] = 30
    fresh: Annotated[bool, Setting(
        "Start this training from new weights instead of those of the search.",
        group=RETRAIN,
    )] = False
    both: Annotated[bool, Setting(
        "Train from both on the training part alone, and keep the network that is better on validation data.",
        group=RETRAIN,
    )] = False
    cutout: Annotated[int, Setting(
        "Side in pixels of the square that is blanked in each training image (cutout); 0: none.",
        group=RETRAIN, range=Range(0, 2**16),
    )] = 0
    batch_size: shared.BatchSize = 96
    lr: shared.LearningRate = 0.025
    weight_decay: shared.WeightDecay = 3e-4
    train: shared.Train = 0
    test: shared.Test = 0
    stride: Annotated[int, Setting("Stride of the first convolution.", group=shared.TRAINING, range=Range(1, 4))] = 2
    precision: shared.Precision = "float32"
    device: shared.TrainingDevice = "cpu"
    seed: shared.Seed = 0
    input: shared.Input = ""
    seq_len: shared.TrainingSeqLen = 256
    undo: shared.Undo = True
    # fmt: on

    def __post_init__(self) -> None:
        """Restate ``smaller`` as the target that is recorded, and check the target."""
        if self.smaller is not None:
            list_declared(Settings)["smaller"].check(self.smaller)
            object.__setattr__(self, "target", str(Target.smaller(self.smaller)))
            object.__setattr__(self, "smaller", None)
        try:
            parse_search_target(str(self.target))
        except ValueError as error:
            raise InputError(f"--target: {error}") from None
        if self.fresh and self.both:
            raise InputError("--fresh trains from new weights alone, and --both from both: give one of them")
        given = {"--fresh": self.fresh, "--both": self.both, f"--cutout {self.cutout}": self.cutout}
        if not self.retrain and (option := next((name for name, value in given.items() if value), "")):
            raise InputError(f"{option} is of the training after the search, and --retrain 0 leaves it out: drop one")
