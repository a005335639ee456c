"""``regrow export``: write a model in a format that other programs load."""

from pathlib import Path

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.flags import Given
from regrow.cli.screen import number, say, say_peak, working
from regrow.settings.export import Settings

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


@click.command(cls=Verb, settings=Settings, epilog=EPILOG)
@click.option("--out", required=True, type=options.PATH, help="The file or folder to write.")
@options.code
@options.memory(
    "For gguf: read, write and compare one tensor at a time; refused if that needs more than this amount, like 1GiB. "
    "For text models in a transformers folder or a run folder, and packaged ones."
)
def export(given: Given[Settings], out: Path, code: str, memory: str) -> None:
    """Export RUN (a run folder, or any model that `regrow prune` takes), and check the written file by loading it."""
    settings = given.build()
    options.say_code(settings.run, code)
    from regrow.jobs.export import run
    from regrow.jobs.recording import Invocation

    with working() as progress:
        written = run(settings, Invocation(out, code, memory, announce=say, progress=progress))
    say(f"{written.path}: {number(written.bytes)} bytes")
    for note in written.notes:
        say(f"note: {note}")
    for what, value in written.checked.items():
        say(f"checked: {what.replace('_', ' ')} {value if isinstance(value, str) else number(value)}")
    if written.memory:
        say_peak(written.memory)
