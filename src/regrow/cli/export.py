"""``regrow export``: write a model in a format that other programs load."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import flags, options
from regrow.cli.boundary import Verb
from regrow.cli.screen import number, say, say_peak, working

EPILOG = """\b
Formats
  transformers   a folder that from_pretrained loads without regrow; if layers differ in width, it contains a small
                 modelling file and loads with trust_remote_code=True
  gguf           a file for llama.cpp; --dtype f16 (default), f32, bf16, q8_0 or q6_k
  onnx           a file for onnxruntime; --dtype int8 quantises the weights, --cache adds a key-value cache
  torchvision    a state_dict, and a Python file that builds the network with torchvision

\b
Examples
  regrow export RUN --to transformers --out my-model
  regrow export RUN --to gguf --dtype q8_0 --out my-model.gguf
"""


@click.command(cls=Verb, epilog=EPILOG)
@click.argument("run")
@click.option("--to", required=True, metavar="FORMAT", help="The format: transformers, gguf, onnx or torchvision.")
@click.option("--out", required=True, type=options.PATH, help="The file or folder to write.")
@click.option("--dtype", default="", metavar="DTYPE", help="Number format of the weights; see below.")
@options.code
@flags.input_shape
@options.memory(
    "For gguf: read, write and compare one tensor at a time; refused if that needs more than this amount, like 1GiB. "
    "For text models in a transformers folder or a run folder, and packaged ones."
)
@click.option("--cache", is_flag=True, help="For onnx: a graph with a key-value cache, for generating text.")
def export(run: str, to: str, out: Path, dtype: str, cache: bool, code: str, input: str, memory: str) -> None:
    """Export RUN (a run folder, or any model that `regrow prune` takes), and check the written file by loading it."""
    from regrow.exporters.formats import export_model

    options.say_code(run, code)
    with working() as progress:
        more: dict[str, Any] = {"input": input, "memory": memory, "announce": say, "progress": progress}
        written = export_model(run, to, out, dtype=dtype, cache=cache, code=code, **more)
    say(f"{written.path}: {number(written.bytes)} bytes")
    for note in written.notes:
        say(f"note: {note}")
    for what, value in written.checked.items():
        say(f"checked: {what.replace('_', ' ')} {value if isinstance(value, str) else number(value)}")
    if written.memory:
        say_peak(written.memory)
