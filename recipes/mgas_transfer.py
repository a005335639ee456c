"""What searches found on CIFAR-10, on other data and in other hands: trained anew on Fashion-MNIST, and as ONNX files.

    python recipes/mgas_transfer.py --work FOLDER --fashion FASHION --cifar PICTURES
    python recipes/mgas_transfer.py --show

FOLDER has the runs of one setting of ``mgas_tables.py`` (it names a folder by each). Of each, the found network
(operations, widths and zeros) is drawn anew for grey pictures, trained as there (same images, epochs and rates) on
Fashion-MNIST, and tested once on 10,000 images that no search has seen. It is also written as an ONNX file, whose
logits on 500 test images of CIFAR-10 are held against torch's. A row is written when it is whole; rows that are there
are not made again.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import onnxruntime
import torch
from rows import add, head, line, rows, spread
from torch import nn

import regrow
from regrow.data import streams
from regrow.evaluation.continual import share_right
from regrow.exporters.onnx import write
from regrow.jobs.recording import ActiveRun
from regrow.jobs.search import Settings, retrain
from regrow.jobs.search_inputs import Parts, read_parts
from regrow.nets.cells import Cells
from regrow.store.models import read_shapes
from regrow.store.run_folder import RunFolder
from regrow.store.run_record import convert_settings

OUT = Path(__file__).parent / "results" / "mgas_transfer.jsonl"
ARMS = {
    "MGAS (reconstructed)": "MGAS-(reconstructed)",
    "without the three additions": "without-the-three-additions",
    "random operations": "random-operations",
    "uniform width": "uniform-width",
    "DARTS, first order": "DARTS,-first-order",
}


def for_grey(folder: Path, shape: list[int]) -> Cells:
    """A found network for pictures of one channel; zeros stay, in the stem where all colours are 0."""
    origin = read_shapes(folder).origin
    assert origin is not None and origin.kind == "cells", f"{folder} holds no network of cells"
    net = Cells({**origin.config, "shape": shape})
    for name, value in regrow.load(folder).state_dict().items():
        own = net.state_dict()[name]
        own.copy_(value if own.shape == value.shape else value.sum(1, keepdim=True))
    return net


def again(folder: RunFolder, fashion: Path, work: Path) -> dict[str, Any]:
    """Accuracy on Fashion-MNIST after training anew."""
    settings = replace(convert_settings(folder.run()["settings"], Settings), data=str(fashion))
    parts: Parts = read_parts(settings)
    net = for_grey(folder.path / "found", [*parts.test.inputs.shape[1:]])
    scratch = RunFolder.create(work, verb="transfer", settings={"of": folder.path.name}, command="")
    trained = retrain(ActiveRun(record=scratch), settings, parts, net)
    many = sum(int(p.count_nonzero()) for p in trained.parameters())
    return {"accuracy": share_right(trained, parts.test), "images": len(parts.test), "nonzero": many}


def as_file(folder: RunFolder, pictures: torch.Tensor) -> float:
    """The largest difference between what the file and torch say of pictures."""
    net: nn.Module = regrow.load(folder.path)
    with tempfile.TemporaryDirectory() as place:
        session = onnxruntime.InferenceSession(str(write(net, Path(place) / "net.onnx").path))
        (answer,) = session.run(None, {session.get_inputs()[0].name: pictures.numpy()})
    with torch.no_grad():
        return float((torch.from_numpy(answer) - net.eval()(pictures)).abs().max())


def shown(path: Path) -> Iterator[str]:
    """The table in Markdown."""
    seeds = ", ".join(map(str, sorted({row["seed"] for row in rows(path)})))
    yield f"Fashion-MNIST, searched on CIFAR-10, seeds {seeds}\n"
    yield head(["", "accuracy, %", "nonzero parameters", "ONNX: largest difference of a logit"])
    for arm in ARMS:
        if own := [row for row in rows(path) if row["arm"] == arm]:
            many, most = fmean(row["nonzero"] for row in own), max(row["onnx"] for row in own)
            yield line([arm, spread([row["accuracy"] for row in own]), f"{many:,.0f}", f"{most:.1e}"])


def main() -> None:
    """Make what is not there yet, or show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("mgas-runs"), help="the runs of mgas_tables.py")
    parser.add_argument("--fashion", type=Path, help="a folder with MNIST's four files")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as folders of pictures")
    parser.add_argument("--target", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--show", action="store_true", help="print the table")
    args = parser.parse_args()
    if args.show:
        print("\n".join(shown(args.out)))
        return
    pictures = streams.pictures(args.cifar, train=1, test=500).test.inputs
    for folder in sorted(args.work.iterdir()):
        arm = next((arm for arm, name in ARMS.items() if folder.name.startswith(f"{name}-{args.target:g}-")), None)
        seed = folder.name.rpartition("-")[2]
        told = {"arm": arm, "target": args.target, "measure": "nonzero", "seed": int(seed) if seed.isdigit() else -1}
        if arm is None or any(told.items() <= row.items() for row in rows(args.out)):
            continue
        done = RunFolder.open(folder)
        if not done.run().get("finished"):
            continue
        row = told | again(done, args.fashion, args.work.parent / f"transfer-{folder.name}")
        row |= {"onnx": as_file(done, pictures), "date": str(date.today())}
        add(args.out, row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
