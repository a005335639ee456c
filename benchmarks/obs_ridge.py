"""The ridge of `obs` on real MLPs: the error that a cut leaves on a text domain that was left out of the sums.

    python benchmarks/obs_ridge.py           # the rows that are missing; about 5 minutes on one thread
    python benchmarks/obs_ridge.py --show

Five MLPs of SmolLM2-135M. Of the four calibration domains three give Σ x xᵀ (4,096 tokens each), from which `obs`
orders the neurons at several ridges; the calibration half of the fourth judges. The error is that of the layer's
output, relative to its variance, after 25 % or 40 % of the neurons were cut: with the means of dropped inputs in the
bias, and after least squares on the three domains, with a ridge that is a multiple of the mean Σ x² (``mean``) or of
each input's own (``own``). One row per layer, domain, ridge and fraction goes to benchmarks/results/obs_ridge.jsonl.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from math import log
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from regrow.data import text, windows
from regrow.data.batch_streams import join_batches
from regrow.methods.pruning.layer_orders import eliminate
from regrow.nets import load
from regrow.scoring.grams import Gram, sum_products
from regrow.store.versions import versions

OUT = Path(__file__).parent / "results" / "obs_ridge.jsonl"
DOMAINS, LAYERS, WINDOWS, SEQ = ("news", "code", "manual", "talk"), (2, 8, 14, 20, 27), 16, 256
RIDGES, CUTS, FITS = (1.0, 0.1, 0.01, 0.001, 0.0001), (0.25, 0.4), (0.001, 0.01, 0.03, 0.1, 0.3, 1.0)
BASE = 0.1


def with_constant(products: Sequence[Tensor], means: Sequence[Tensor]) -> Tensor:
    """Return the mean of x̃ x̃ᵀ over inputs x with a constant 1 appended, ``[k + 1, k + 1]``.

    Args:
        products: The mean of x xᵀ of each domain, all with as many inputs.
        means: The mean of x.
    """
    product, mean = (torch.stack([*each]).mean(0) for each in (products, means))
    last = torch.cat([mean, mean.new_ones(1)])
    return torch.cat([torch.cat([product, mean[None]]), last[:, None]], 1)


def errors(gram: Tensor, held: Tensor, weight: Tensor, drop: Tensor) -> dict[str, Any]:
    """Return the error on held-out inputs after the inputs ``drop`` were cut.

    Args:
        gram: The mean of x̃ x̃ᵀ over the inputs that are fitted.
        held: That over the inputs that judge.
        weight: The layer's weight, ``[out, k]``.
        drop: The dropped inputs.
    """
    k = weight.shape[1]
    mean = held[:k, -1]
    whole = float(((weight @ (held[:k, :k] - torch.outer(mean, mean))) * weight).sum())
    missing = torch.zeros(k + 1, len(weight), dtype=torch.float64)
    missing[drop] = weight.T[drop]
    missing[-1] = -(weight[:, drop] @ gram[drop, -1])
    stay = torch.ones(k + 1, dtype=torch.bool).index_fill(0, drop, False).nonzero()[:, 0]
    inner, cross = gram[stay][:, stay], (gram @ missing)[stay]

    def left(ridge: Tensor | None = None) -> float:
        rest = missing.clone()
        if ridge is not None:
            fitted = inner.clone()
            fitted.diagonal()[:-1].add_(ridge)
            rest[stay] -= torch.cholesky_solve(cross, torch.linalg.cholesky(fitted))
        return float((rest * (held @ rest)).sum()) / whole

    own = inner.diagonal()[:-1]
    return {
        "means": left(),
        "mean": {f"{fit:g}": left(fit * own.mean().expand(len(own))) for fit in FITS},
        "own": {f"{fit:g}": left(fit * own) for fit in FITS},
    }


def measure(out: Path) -> None:
    """Measure the rows that are missing."""
    torch.set_num_threads(1)
    known = {(row["layer"], row["left_out"]) for row in read(out)}
    todo = [(layer, name) for layer in LAYERS for name in DOMAINS if (layer, name) not in known]
    if not todo:
        return
    loaded = load("smollm2-135m", dtype=torch.float32)
    names = {layer: f"model.layers.{layer}.mlp.down_proj.weight" for layer in LAYERS}
    parameters = dict(loaded.model.named_parameters())
    widths = {name: parameters[name].shape[1] for name in names.values()}
    products: dict[str, dict[str, Tensor]] = {domain: {} for domain in DOMAINS}
    means: dict[str, dict[str, Tensor]] = {domain: {} for domain in DOMAINS}
    for domain in DOMAINS:
        source = windows(text(domain), loaded.tokenizer, n=WINDOWS, seq_len=SEQ, seed=0, batch_size=4)

        def keep(name: str, gram: Gram, domain: str = domain) -> None:
            assert gram.rows == WINDOWS * SEQ  # means over domains are of equal weight
            means[domain][name] = gram.mean
            products[domain][name] = gram.mean_products(centre=False)

        sum_products(loaded.model, widths, join_batches(source, 8), keep)
    place = {"date": f"{date.today()}", "machine": platform.machine(), **versions()}
    for layer, domain in todo:
        name, weight = names[layer], parameters[names[layer]].detach().double()
        others = [other for other in DOMAINS if other != domain]
        gram = with_constant(*([one[other][name] for other in others] for one in (products, means)))
        held, mean = with_constant([products[domain][name]], [means[domain][name]]), gram[:-1, -1]
        units = torch.arange(weight.shape[1])[:, None]
        rows = []
        for ridge in RIDGES:
            order = eliminate(gram[:-1, :-1] - torch.outer(mean, mean), weight, units, ridge).order
            for cut in CUTS:
                result = errors(gram, held, weight, order[: int(len(order) * cut)])
                rows.append({"layer": layer, "left_out": domain, "ridge": ridge, "cut": cut, **result, **place})
        with out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read(out: Path) -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the mean error per ridge, and log ratios to that of ridge 0.1, paired over layers and domains."""
    ways = {"means": lambda row: row["means"], "least squares, mean, 0.3": lambda row: row["mean"]["0.3"],
            "least squares, own, 1": lambda row: row["own"]["1"]}  # fmt: skip
    print(f"| cut | ridge | {' | '.join(f'{way} | log ratio to ridge {BASE}' for way in ways)} |")
    print("|" + "---|" * (2 + 2 * len(ways)))
    for cut in CUTS:
        for ridge in RIDGES:
            words = [f"{cut}", f"{ridge:g}"]
            for value in ways.values():
                at = {(row["ridge"], row["layer"], row["left_out"]): value(row) for row in rows if row["cut"] == cut}
                mine = {key[1:]: error for key, error in at.items() if key[0] == ridge}
                gaps = [log(error / at[BASE, *key]) for key, error in mine.items()]
                words += [f"{fmean(mine.values()):.4f}", f"{fmean(gaps):+.4f} ± {stdev(gaps) / len(gaps) ** 0.5:.4f}"]
            print(f"| {' | '.join(words)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table and run nothing")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    show(read(given.out)) if given.show else measure(given.out)
