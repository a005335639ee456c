"""The settings of ``regrow learn``."""

import re
from dataclasses import dataclass, field
from typing import Annotated

from regrow.settings import shared
from regrow.settings.constraints import Range
from regrow.settings.declaration import Setting
from regrow.settings.shared import TRAINING


def parse_sequence(spec: str) -> tuple[str, str, int]:
    """Return (transformation, data's name, number of tasks) of a sequence of tasks such as ``permuted:DATA:5``.

    A text of another form is the name of data for one task, without transformation (empty).

    >>> parse_sequence("permuted:digits:5"), parse_sequence("digits")
    (('permuted', 'digits', 5), ('', 'digits', 1))
    """
    match = re.fullmatch(r"(permuted|rotated|split):(.+?):(\d{1,3})", spec)
    return (match[1], match[2], int(match[3])) if match else ("", spec, 1)


@dataclass(frozen=True)
class Settings:
    """Settings of ``regrow learn``: everything that a learning run depends on; ``run.json`` stores exactly this."""

    # fmt: off
    tasks: Annotated[tuple[str, ...], Setting(
        "Tasks in sequence: permuted:DATA:10, rotated:DATA:10, split:DATA:5, or DATA: digits or a folder of images; "
        "for language models news, code, manual, talk or NAME=PATH.",
        argument=True, example="permuted:digits:5 --out RUN",
    )]
    model: Annotated[str, Setting(
        "The network: a new one, mlp:100-100 (widths), resnet:16-3 or resnet-gn:16-3 (width, stages); or, with its "
        "weights, a MODEL that `regrow prune` takes.",
        common=True, code=True, always_shown=True,
    )] = "mlp:100-100"
    method: Annotated[str, Setting(
        "The continual-learning method; `regrow methods` lists all.",
        common=True, code=True, always_shown=True,
    )] = "laplace"
    method_settings: shared.MethodSettings = field(default_factory=dict)
    scenario: Annotated[str, Setting(
        "Classes that a prediction chooses among: all (domain), those seen so far (class), or those of the example's "
        "task, which is given (task).",
        common=True, choices=("domain", "class", "task"),
    )] = "domain"
    epochs: Annotated[int, Setting("Passes over each task.", group=TRAINING, common=True, range=Range(1, 10**6))] = 5
    batch_size: shared.BatchSize = 64
    optimizer: Annotated[str, Setting("The optimizer.", group=TRAINING, common=True, choices=("sgd", "adamw"))] = "sgd"
    lr: Annotated[float, Setting(
        "Learning rate; 0: 0.01, or what suits the method with SGD and a new network.",
        group=TRAINING, common=True, range=Range(0, 1000, exclusive_maximum=True), example="0.05",
    )] = 0.0
    weight_decay: shared.WeightDecay = 0.0
    train: shared.Train = 0
    test: shared.Test = 0
    classes: Annotated[int, Setting(
        "Least number of outputs; reserve some for the classes of tasks that are added with --resume.",
        range=Range(0, 2**16),
    )] = 0
    precision: shared.Precision = "float32"
    device: shared.TrainingDevice = "cpu"
    seed: shared.Seed = 0
    input: shared.Input = ""
    seq_len: shared.TrainingSeqLen = 256
    undo: shared.Undo = True
