"""Whether an ONNX file foresees the next token that torch foresees, on 200 real prompts.

    python recipes/onnx_check.py RUN [RUN ...] --out recipes/results/onnx_check.json

RUN is a run folder, or the name of a model (``smollm2-135m``, the control). Prompts are 50 windows of 32 tokens each of
news, code, manual and talk, from the evaluation half of each text. Torch in float32 is the reference;
``--dtypes float32,int8`` compares the file with weights in 8 bits as well.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from regrow.data import Half, text, windows
from regrow.exporters.onnx import OPSET, write
from regrow.exporters.onnx.calls import describe_call
from regrow.exporters.onnx.files import OnnxSession, start_inputs
from regrow.jobs.models import ModelSpec, load_model
from regrow.nets.loaded import text_example

KINDS, PROMPTS, TOKENS = ("news", "code", "manual", "talk"), 50, 32


def main() -> None:
    """Write, compare, and put the figures into the result file; models that it holds already are measured again."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("runs", nargs="+", metavar="RUN")
    options.add_argument("--dtypes", default="float32", help="what to write, separated by commas")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    for run in given.runs:
        rows = [compared(run, dtype) for dtype in given.dtypes.split(",")]
        old = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
        measured = {(row["model"], row["dtype"]) for row in rows}
        rows = [row for row in old if (row["model"], row["dtype"]) not in measured] + rows
        names = ("torch", "onnx", "onnxruntime", "onnxscript", "transformers")
        told = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": {name: version(name) for name in names}}
        what = {"kinds": KINDS, "prompts": PROMPTS * len(KINDS), "tokens": TOKENS, "opset": OPSET}
        given.out.write_text(json.dumps({**told, **what, "rows": rows}, indent=1) + "\n")


def compared(run: str, dtype: str) -> dict[str, Any]:
    """One row: a model as one kind of file."""
    loaded = load_model(ModelSpec(run, dtype="float32"))
    model, tokenizer = loaded.model, loaded.tokenizer
    assert tokenizer is not None, "only language models foresee tokens"
    model.tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        written = write(model, Path(folder) / "net.onnx", dtype=dtype, progress=lambda *at: print(run, dtype, *at))
        session = OnnxSession(written.path, describe_call(model, text_example(model, len(tokenizer))))
        found = {kind: foreseen(session, kind, tokenizer) for kind in KINDS}

    def over(key: str, together: Callable[..., float]) -> float:
        return together([one[key] for one in found.values()])

    row = {
        "model": Path(run).name,
        "run": settings_of(Path(run)),
        "parameters": sum(one.numel() for one in model.parameters()),
        "dtype": dtype,
        "bytes": written.bytes,
        "prompts": over("prompts", sum),
        "next_tokens_differ": over("differ", sum),
        "largest_margin": over("margin", max),
        "max_logit_difference": over("difference", max),
        "largest_logit": over("largest", max),
        "by_kind": found,
        "checked": dict(written.checked),
    }
    print(json.dumps({key: value for key, value in row.items() if key not in ("by_kind", "checked")}))
    return row


def settings_of(run: Path) -> dict[str, Any]:
    """How a run folder came about; nothing for a model by name."""
    record = run / "run.json"
    settings = json.loads(record.read_text())["settings"] if record.exists() else {}
    return {
        name: settings[name] for name in ("model", "method", "method_settings", "keep", "sources") if name in settings
    }


def foreseen(session: OnnxSession, kind: str, tokenizer: Any) -> dict[str, float]:
    """The next token after each prompt of a kind, in torch and in the file, and all logits of the prompts."""
    source = windows(text(kind), tokenizer, n=PROMPTS, seq_len=TOKENS, half=Half.EVALUATION)
    differ, margins, differences, largest = 0, [0.0], [0.0], [0.0]
    for batch in source:
        inputs = start_inputs(session.call, batch.args[0])
        said, meant = session.run(inputs)[0][0], session.run_torch(inputs)[0][0]
        first, second = int(meant[-1].argmax()), int(said[-1].argmax())
        differ += first != second
        margins.append(float(meant[-1, first] - meant[-1, second]))
        differences.append(float((said - meant).abs().max()))
        largest.append(float(meant.abs().max()))
    return {
        "prompts": len(source),
        "differ": differ,
        "margin": max(margins),
        "difference": max(differences),
        "largest": max(largest),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
