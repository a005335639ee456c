"""Settings that several commands share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from regrow.core.errors import InputError
from regrow.settings.constraints import Range
from regrow.settings.declaration import MAX_COUNT, SEED, Setting

LOADING, DATA, TRAINING = "Loading the model", "Data", "Training"

MODEL = (
    "A packaged model (smollm2-135m, gemma3-270m), a run or transformers folder, a hub id, a .gguf file, a torchvision "
    "name (resnet18), or your function pkg.mod:fn."
)
EVALUATED = (
    "Text to measure on: news, code, manual, talk, or NAME=PATH; for image models digits, or NAME=FOLDER with a folder "
    "per class. Repeatable."
)

# fmt: off
MethodSettings = Annotated[Mapping[str, Any], Setting(
    "A setting of the method; `regrow methods NAME` lists them. Repeatable.",
    option="--set", metavar="NAME=VALUE", common=True,
)]
BatchSize = Annotated[int, Setting("Training examples per step.", group=TRAINING, common=True, range=Range(1, 2**20))]
ROUND = (
    "Make widths multiples of this number (8, 64) where an axis has that many units; the budget still holds."
)
# The allowed learning rates.
RATES = Range(0, 1000, exclusive_minimum=True, exclusive_maximum=True)
LearningRate = Annotated[float, Setting(
    "Learning rate.",
    group=TRAINING, common=True, range=RATES, example="0.01",
)]
WeightDecay = Annotated[float, Setting("Weight decay of the optimizer.", group=TRAINING, range=Range(0, 1000))]
PRECISION = Setting(
    "Number format of matrix products and convolutions in the forward pass; weights keep theirs.",
    group=TRAINING, choices=("float32", "bfloat16"),
)
Precision = Annotated[str, PRECISION]
EXAMPLES = Range(0, MAX_COUNT)
Train = Annotated[int, Setting("At most this many training examples; 0: all.", group=DATA, common=True, range=EXAMPLES)]
Test = Annotated[int, Setting("At most this many test examples; 0: all.", group=DATA, common=True, range=EXAMPLES)]
Seed = Annotated[int, Setting("Random seed of weights, data order and all that is sampled.", common=True, range=SEED)]
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
    "Device on which the network runs: cpu, cuda, cuda:1, mps, or auto (cuda if there is one, else cpu).",
    group=LOADING, metavar="DEVICE", common=True,
)
Device = Annotated[str, _DEVICE]
ForwardPrecision = Annotated[str, replace(PRECISION, group=LOADING)]
TrainingDevice = Annotated[str, replace(_DEVICE, group=TRAINING)]
Input = Annotated[str, Setting(
    "Input shape of an image model, such as 1x3x32x32. Default: that of the run folder, of the model's function or of "
    "the images, else a guess.",
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
