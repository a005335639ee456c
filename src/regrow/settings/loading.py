"""Settings that several commands share: how a model is loaded, and which data it is given."""

from dataclasses import replace
from typing import Annotated

from regrow.settings.constraints import Range
from regrow.settings.declaration import MANY, Setting
from regrow.settings.training import PRECISION, TRAINING

LOADING, DATA = "Loading the model", "Data"

# fmt: off
EvalTokens = Annotated[int, Setting(
    "Tokens (image models: images) per source to evaluate on.",
    group=DATA, range=Range(1, MANY),
)]
SeqLen = Annotated[int, Setting("Length of a text window in tokens.", group=DATA, range=Range(2, 2**20))]
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
Undo = Annotated[bool, Setting(
    "Keep no copy of the model as it was before this run; `regrow undo` cannot return to it then.",
    option="--no-undo",
)]
