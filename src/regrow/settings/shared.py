"""Settings that several commands share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from regrow.core.errors import InputError
from regrow.settings.constraints import Range
from regrow.settings.declaration import MAX_COUNT, SEED, Setting

LOADING, DATA, TRAINING = "Loading the model", "Data", "Training"

# fmt: off
MethodSettings = Annotated[Mapping[str, Any], Setting(
    "A setting of the method; `regrow methods NAME` lists them. Repeatable.",
    option="--set", metavar="NAME=VALUE",
)]
BatchSize = Annotated[int, Setting("Training examples per step.", group=TRAINING, range=Range(1, 2**20))]
# The allowed learning rates.
RATES = Range(0, 1000, exclusive_minimum=True, exclusive_maximum=True)
LearningRate = Annotated[float, Setting(
    "Learning rate.",
    group=TRAINING, range=RATES, example="0.01",
)]
WeightDecay = Annotated[float, Setting("Weight decay of the optimizer.", group=TRAINING, range=Range(0, 1000))]
PRECISION = Setting(
    "Number format of matrix products and convolutions in the forward pass; weights keep theirs.",
    group=TRAINING, choices=("float32", "bfloat16"),
)
Precision = Annotated[str, PRECISION]
EXAMPLES = Range(0, MAX_COUNT)
Train = Annotated[int, Setting("Use at most this many training examples; 0: all.", group="Data", range=EXAMPLES)]
Test = Annotated[int, Setting("Use at most this many test examples; 0: all.", group="Data", range=EXAMPLES)]
Seed = Annotated[int, Setting("Random seed of initial weights, data order and everything sampled.", range=SEED)]
EvalTokens = Annotated[int, Setting(
    "Tokens (image models: images) per source to evaluate on.",
    group=DATA, range=Range(1, MAX_COUNT),
)]
SeqLen = Annotated[int, Setting("Length of a text window in tokens.", group=DATA, range=Range(2, 2**20))]
TrainingSeqLen = Annotated[int, Setting(
    "Length of a text window in tokens; --train and --test count windows then.", range=Range(2, 2**20),
)]
Dtype = Annotated[str, Setting(
    "Number format of the loaded weights; default: the format in which they are stored.",
    group=LOADING, choices=("float32", "bfloat16", "float16", "float64"),
)]
_DEVICE = Setting(
    "Device on which the network runs: cpu, cuda, cuda:1, mps, or auto: cuda if there is one, else cpu.",
    group=LOADING, metavar="DEVICE",
)
Device = Annotated[str, _DEVICE]
ForwardPrecision = Annotated[str, replace(PRECISION, group=LOADING)]
TrainingDevice = Annotated[str, replace(_DEVICE, group=TRAINING)]
Input = Annotated[str, Setting(
    "Input shape of an image model, batch first, such as 1x3x32x32. Default: the shape recorded in the run folder, "
    "given by the function that builds the model, or of the images in --source; otherwise a guess, which is printed.",
    metavar="SHAPE", group=LOADING,
)]
# Whether a copy of the model before the run is kept for `regrow undo`; the option turns it off
Undo = Annotated[bool, Setting(
    "Keep no copy of the model as it was before this run; `regrow undo` cannot return to it then.",
    option="--no-undo",
)]
# fmt: on


def check_formats(precision: str, *, dtype: str = "", measure: str = "") -> None:
    """Raise InputError for bfloat16 forward passes of weights in another stated dtype than float32, or a target in ms.

    ``precision``: the format of forward passes, ``float32`` (always allowed) or ``bfloat16``; ``dtype``: the format in
    which weights are loaded, empty: as stored; ``measure``: what the target limits, such as ``"ms"``; empty: no target.
    """
    if precision in ("", "float32"):
        return
    if dtype not in ("", "float32"):
        raise InputError(
            f"precision {precision} is for weights of float32, and dtype is {dtype}; leave out one of them"
        )
    if measure == "ms":
        raise InputError(
            f"a target in ms is measured in the format of the weights, not in precision {precision}; load them in it"
        )
