"""``regrow export``: write a model in a format that other programs load."""

from pathlib import Path

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, working

EPILOG = """\b
Formats
  transformers   a folder for from_pretrained where regrow is not installed; irregular widths carry a small file of
                 code (trust_remote_code=True), networks whose layers are all alike need none
  gguf           a file for llama.cpp; f16 unless told: --dtype f32, bf16, q8_0, q6_k
  onnx           a file for onnxruntime; --dtype int8 quantises its weights, --cache makes one for generating text
  torchvision    a state_dict and a file that builds an image network with torchvision

\b
Examples
  regrow export RUN --to transformers --out my-model
  regrow export RUN --to gguf --dtype q8_0 --out my-model.gguf
"""


@click.command(cls=Verb, epilog=EPILOG)
@click.argument("run")
@click.option("--to", required=True, metavar="FORMAT", help="transformers, gguf, onnx or torchvision.")
@click.option("--out", required=True, type=options.PATH, help="The file or folder to write.")
@click.option("--dtype", default="", metavar="DTYPE", help="What weights are stored in; see below.")
@options.code
@flags.input_shape
@click.option("--cache", is_flag=True, help="For onnx: a graph that takes and gives keys and values.")
def export(run: str, to: str, out: Path, dtype: str, cache: bool, code: str, input: str) -> None:
    """Export RUN (a run folder, or any model that `regrow prune` takes), and check what was written by reading it."""
    from regrow.export.formats import export_model

    options.say_code(run, code)
    with working() as progress:
        written = export_model(run, to, out, dtype=dtype, cache=cache, code=code, input=input, progress=progress)
    say(f"{written.path}: {number(written.bytes)} bytes")
    for note in written.notes:
        say(f"note: {note}")
    for what, value in written.checked.items():
        say(f"checked: {what.replace('_', ' ')} {value if isinstance(value, str) else number(value)}")
