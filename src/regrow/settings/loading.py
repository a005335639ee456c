"""Settings that several commands share: how a model is loaded, and which data it is given."""

from typing import Annotated

from regrow.settings.declaration import MANY, Range, Setting

LOADING, DATA = "Loading the model", "Data"

# fmt: off
Sources = Annotated[tuple[str, ...], Setting(
    "A kind of text: news, code, manual, talk, or NAME=PATH of a file or folder. For image models: digits, or "
    "NAME=FOLDER with a folder per class. Repeat it: several kinds carry over better than one.",
    option="--source", metavar="NAME[=PATH]", group=DATA, source=True,
)]
EvalTokens = Annotated[int, Setting("Evaluation tokens per source; or images.", group=DATA, range=Range(1, MANY))]
SeqLen = Annotated[int, Setting("Tokens per window of text.", group=DATA, range=Range(2, 2**20))]
Dtype = Annotated[str, Setting(
    "What the model is loaded in; as it is stored, unless given.",
    group=LOADING, choices=("float32", "bfloat16", "float16", "float64"),
)]
Device = Annotated[str, Setting("Where the model runs: cpu, cuda, cuda:1, mps.", group=LOADING)]
Input = Annotated[str, Setting(
    "What an image model takes, batch first: 1x3x32x32. Else as the run noted it, as its function says, of its "
    "source's images, or a guess, which is printed.",
    metavar="SHAPE", group=LOADING, absent="",
)]
