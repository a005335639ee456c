"""How much ranks of units vary between text domains, beside their variation within one domain: SmolLM2-135M.

    python recipes/rank_variation.py --texts FOLDER       measure: 16 windows of 256 tokens of each of eight domains
    python recipes/rank_variation.py --show               print the table of the committed result

The windows of a domain are divided into four shards; one-way random effects over them tell variation between domains
from sampling noise. ``--texts`` is the folder of ``corpora.py``. Nothing is pruned.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from equal_terms import FOLDS, Bench
from harness import Row, arguments, table, write

from regrow.core.scores import Need
from regrow.data import Half
from regrow.nets.devices import autocasting
from regrow.scoring.collect import collect
from regrow.scoring.metrics import wanda_sp, wifv
from regrow.scoring.spaces import make_ranking_spaces, rank_units, spectrum
from regrow.scoring.weights import weights_of

OUT = Path(__file__).parent / "results" / "rank_variation.json"
METRICS, SHARDS = {"wifv": wifv, "wanda_sp": wanda_sp}, 4
COLUMNS = (
    *("scores", "units", "F > 1", "beyond noise", "share", "Spearman, domains"),
    *("shards: different / same domain", "sd: all / between / within"),
)


def measure(args: Namespace) -> dict[str, Any]:
    """The variation of ranks of each ranking space, by metric."""
    bench = Bench(args)
    sources = [bench.read(name, args.windows, Half.CALIBRATION) for fold in FOLDS for name in fold]
    with autocasting(bench.model, bench.precision):
        found = collect(bench.model, bench.axes, sources, {Need.ACTIVATIONS}, shards=SHARDS)
    weights, units = weights_of(bench.model), bench.axes.units()
    among, rows = make_ranking_spaces(units), {}
    for name, score in METRICS.items():
        by = {
            domain: (
                score(weights, bench.axes, sum(shards[1:], shards[0]), units=units, pool="standardised"),
                [score(weights, bench.axes, one, units=units, pool="standardised") for one in shards],
            )
            for domain, shards in found.items()
        }
        rows[name] = spectrum(rank_units(by, among), among)
    return {"windows": args.windows, "shards": SHARDS, "domains": list(found), "rows": rows}


def shown(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Means over the neurons of all layers, and the pooled key-value groups."""
    for scores, rows in result["rows"].items():
        layers = [row for row in rows if "down_proj" in row["label"]]
        yield [scores, f"MLP neurons, {len(layers)} layers", *_cells(layers)]
        if groups := [row for row in rows if row not in layers]:
            yield [scores, "key-value groups, pooled", *_cells(groups)]


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    total = sum(row["units"] for row in rows)

    def mean(name: str) -> str:
        return f"{sum(row['units'] * row[name] for row in rows) / total:.2f}"

    def span(name: str) -> str:
        return "–".join(dict.fromkeys(f"{end(row[name] for row in rows):.2f}" for end in (min, max)))

    yield f"{mean('exceeds')} ({mean('exceeds_null')})"
    yield f"{mean('significant')} ({span('significant')})"
    yield mean("share")
    yield span("spearman")
    yield f"{mean('spearman_shards')} / {mean('spearman_within')}"
    yield " / ".join(mean(name) for name in ("sigma", "sigma_between", "sigma_within"))


def draw(out: Path, result: Mapping[str, Any]) -> None:
    """Draw how far ranks of MLP neurons vary in each layer (``wifv``), beside the result."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = [row for row in result["rows"]["wifv"] if "down_proj" in row["label"]]
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rank_variation"}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        units, orders = figure.subplots(2, sharex=True)
        for name, label in (("exceeds", "F above 1"), ("significant", "beyond noise"), ("exceeds_null", "by chance")):
            units.plot([row[name] for row in layers], "o-", label=label)
        for name, label in (("spearman", "domains"), ("spearman_shards", "parts of different domains"),
                            ("spearman_within", "parts of one domain")):  # fmt: skip
            orders.plot([row[name] for row in layers], "o-", label=label)
        units.set_ylabel("share of the neurons")
        orders.set_ylabel("rank correlation between")
        orders.set_xlabel("layer")
        for axes in (units, orders):
            axes.set_ylim(0, 1)
            axes.legend(loc="lower left", ncols=3)
        figure.savefig(out.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Measure, or print and draw."""
    args = arguments(__doc__, OUT, texts=Path("texts"), model="smollm2-135m", windows=16)
    if not args.show:
        write(args.out, measure(args))
        draw(args.out, json.loads(args.out.read_text()))
    print("\n".join(table(COLUMNS, shown(json.loads(args.out.read_text())))))


if __name__ == "__main__":
    main()
