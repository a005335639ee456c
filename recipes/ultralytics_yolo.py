"""A YOLO network of Ultralytics is pruned, fine-tuned on its own loss, saved, loaded and written as ONNX.

    python recipes/ultralytics_yolo.py --env ENV                     # yolov8n and yolo11n
    python recipes/ultralytics_yolo.py --show                        # the table of the committed rows

Licence: Ultralytics is AGPL-3.0 (or commercial). regrow does not depend on it and contains none of its code; this
recipe makes a virtual environment in ENV, if there is none, with regrow from this checkout and ultralytics 8.4.190, and
runs there. A network derived from Ultralytics' code, cut or not, is bound by the licence of that code.

The networks are built from Ultralytics' yaml files with random weights: trained ones need a download. The pictures are
drawn: one coloured rectangle on noise, three classes. Losses show that training works before and after the cut, not how
well a YOLO detects.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rows as table
import torch
from torch import Tensor, nn

import regrow
from regrow.evaluation import macs

VERSION = "8.4.190"
ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "ultralytics_yolo.jsonl"
NETWORKS = ("yolov8n", "yolo11n")
CLASSES, SIZE, BATCH, STEPS = 3, 160, 8, 24


def prepare(folder: Path) -> str:
    """The interpreter of an environment with regrow and Ultralytics; made where there is none."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        words = [f"ultralytics=={VERSION}", f"{ROOT}[vision,export]"]
        subprocess.run([python, "-m", "pip", "install", "-q", *words], check=True)
        (folder / "ready").touch()
    return str(python)


def build(name: str) -> nn.Module:
    """A detection network with random weights."""
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel(f"{name}.yaml", ch=3, nc=CLASSES, verbose=False).eval()
    model.args = get_cfg()  # the weights of the parts of its loss
    return model


def loss_of(model: nn.Module) -> Callable[[object, object], Tensor]:
    """The loss that Ultralytics trains such a network for, per picture."""
    from ultralytics.utils.loss import v8DetectionLoss

    compute = v8DetectionLoss(model)

    def loss(output: object, labels: Any) -> Tensor:
        targets = {"batch_idx": labels[:, 0], "cls": labels[:, 1], "bboxes": labels[:, 2:]}
        return compute(output, targets)[0].sum() / BATCH

    return loss


def pictures(seed: int, batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of (pictures, rows of picture, class and box): one rectangle each, whose colour is its class."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    result = []
    for _ in range(batches):
        images, boxes = 0.3 * torch.rand(BATCH, 3, SIZE, SIZE, generator=generator), []
        for i, image in enumerate(images):
            kind, width, height = number(0, CLASSES), number(40, 100), number(40, 100)
            left, top = number(0, SIZE - width), number(0, SIZE - height)
            image[kind, top : top + height, left : left + width] += 0.6
            centre = ((left + width / 2) / SIZE, (top + height / 2) / SIZE)
            boxes.append([i, kind, *centre, width / SIZE, height / SIZE])
        result.append((images, torch.tensor(boxes)))
    return result


def run(name: str) -> dict[str, Any]:
    """The whole life of a network."""
    model, train, test = build(name), pictures(0, STEPS), pictures(1, 4)
    example, losses = train[0][0][:1], {}

    def measure(when: str) -> None:
        losses[when] = round(regrow.evaluate(model, {"test": test}, loss=loss_of(model))["test"].loss, 3)

    measure("random")
    regrow.finetune(model, train, lr=0.03, recalibrate=True, loss=loss_of(model))
    measure("trained")
    start = time.perf_counter()
    axes = regrow.trace(model, example)
    seconds = time.perf_counter() - start
    whole, before = copy.deepcopy(model), (sum(p.numel() for p in model.parameters()), macs(axes))
    model, plan = regrow.prune(model, train[:4], method="llm_pruner", target="macs=60%", axes=axes, loss=loss_of(model))
    after = (sum(p.numel() for p in model.parameters()), macs(regrow.trace(model, example)))
    check = regrow.verify(whole, axes, plan)
    measure("cut")
    regrow.finetune(model, train, lr=0.03, recalibrate=True, loss=loss_of(model))
    measure("fine-tuned")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        regrow.save(model, Path(folder) / "small", example=example)
        loaded = regrow.load(Path(folder) / "small", model=lambda: build(name))
        equal = torch.equal(loaded(test[0][0])[0], model.eval()(test[0][0])[0])
        written = regrow.export(model, Path(folder) / "small.onnx", format="onnx", example=example)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": f"ultralytics {VERSION}, torch {torch.__version__}",
        "network": name,
        "weights": "random",
        "axes": len(axes.axes),
        "free_axes": len(axes.units()),
        "trace_seconds": round(seconds, 1),
        "parameters": [before[0], after[0]],
        "macs": [before[1], after[1]],
        "masked_equals_cut": check.ok,
        "max_abs_diff_float64": check.max_abs_diff,
        "bound": check.bound,
        "loss": losses,
        "loaded_bit_equal": equal,
        "onnx_max_abs_diff": written.checked["max_abs_diff"],
        "onnx_largest_output": written.checked["largest_output"],
    }


def show(out: Path) -> None:
    """Print the table."""
    heads = [
        "network",
        "free axes",
        "parameters",
        "MACs",
        "masked = cut",
        "loss: trained → cut → tuned",
        "loaded",
        "ONNX",
    ]
    print(table.head(heads))
    for row in table.rows(out):
        (many, left), (work, rest), loss = row["parameters"], row["macs"], row["loss"]
        cells = [
            row["network"],
            f"{row['free_axes']} of {row['axes']}",
            f"{many:,} → {left:,}",
            f"{work / 1e6:,.0f} M → {rest / 1e6:,.0f} M",
            f"{row['max_abs_diff_float64']:.1e} of at most {row['bound']:.1e}" if row["masked_equals_cut"] else "no",
            f"{loss['trained']} → {loss['cut']} → {loss['fine-tuned']}",
            "bit for bit" if row["loaded_bit_equal"] else "differs",
            f"within {row['onnx_max_abs_diff']:.1e} of {row['onnx_largest_output']:.0f}",
        ]
        print(table.line(cells))


def main() -> None:
    """Run in the environment that has both, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, help="the folder of the virtual environment")
    parser.add_argument("--only", choices=NETWORKS, help="one network")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table of what is there")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.show:
        show(args.out)
    elif args.inside:
        torch.set_num_threads(1)
        for name in [args.only] if args.only else NETWORKS:
            row = run(name)
            table.add(args.out, row)
            print(row, flush=True)
    elif args.env is None:
        parser.error("give --env; or --show")
    else:
        own = {"YOLO_CONFIG_DIR": str(args.env), "YOLO_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | own
        subprocess.run([prepare(args.env), __file__, *sys.argv[1:], "--inside"], check=True, env=env)


if __name__ == "__main__":
    main()
