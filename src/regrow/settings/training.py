"""Settings that the commands which train from scratch share: ``regrow learn`` and ``regrow search``."""

from collections.abc import Mapping
from typing import Annotated, Any

from regrow.settings.declaration import MANY, SEED, Range, Setting

TRAINING = "Training"

# fmt: off
MethodSettings = Annotated[Mapping[str, Any], Setting(
    "A setting of the method (`regrow methods NAME`).",
    option="--set", metavar="NAME=VALUE",
)]
BatchSize = Annotated[int, Setting("Examples per step.", group=TRAINING, range=Range(1, 2**20))]
LearningRate = Annotated[float, Setting(
    "Learning rate.",
    group=TRAINING, range=Range(0, 1000, above=True, below=True), example="0.01",
)]
WeightDecay = Annotated[float, Setting("Weight decay of the optimizer.", group=TRAINING, range=Range(0, 1000))]
Train = Annotated[int, Setting("Most training examples that are used; 0: all.", group="Data", range=Range(0, MANY))]
Test = Annotated[int, Setting("Most test examples that are used; 0: all.", group="Data", range=Range(0, MANY))]
Seed = Annotated[int, Setting("Of weights, orders and everything drawn.", range=SEED)]
