"""How much ranks of units vary between text domains, beside their variation within one domain: SmolLM2-135M.

    python recipes/rank_variation.py --texts FOLDER       measure: 16 windows of 256 tokens of each of eight domains
    python recipes/rank_variation.py --show               print the table of the committed result

The windows of a domain are divided into four shards; one-way random effects over them tell variation between domains
from sampling noise. ``--texts`` is as for ``width_pruning.py``. Nothing is pruned.
"""

import json
import re
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
from harness import Row, arguments, table, write
from width_pruning_bench import WidthPruningBench
from width_pruning_points import FOLDS

from regrow.core.scores import Need
from regrow.reports import figures
from regrow.reports.drawing import Drawing
from regrow.reports.rows import RunFindings
from regrow.scoring.collect import collect
from regrow.scoring.metrics import wanda_sp, wifv
from regrow.scoring.spaces import ranks, spaces, spectrum
from regrow.scoring.weights import weights_of

OUT = Path(__file__).parent / "results" / "rank_variation.json"
METRICS, SHARDS = {"wifv": wifv, "wanda_sp": wanda_sp}, 4
COLUMNS = (
    *("scores", "units", "F > 1", "beyond noise", "share", "Spearman, domains"),
    *("shards: different / same domain", "sd: all / between / within"),
)


def svg_file(drawing: Drawing, margin: int = 16) -> str:
    """The wide drawing as the text of an SVG file, with the page's colours for light and dark mode."""
    css = (resources.files("regrow.reports") / "templates" / "style.css").read_text(encoding="utf-8")
    rows = re.findall(r"(--paper: [^;]*;) --ink: ([^;]*);([^}]*?)--wash", css)
    light, dark = (f"{paper}color:{ink};{' '.join(rest.split())}" for paper, ink, rest in rows[:2])
    head, _, rest = drawing.wide.replace("xlink:", "").partition(">")
    width, height = (float(side) + 2 * margin for side in re.findall(r"[\d.]+", head)[2:4])
    box = f'viewBox="{-margin} {-margin} {width:g} {height:g}"'
    head = re.sub(r'viewBox="[^"]*"', f'xmlns="http://www.w3.org/2000/svg" {box}', head)
    style = f"svg{{font-family:system-ui,sans-serif;{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}"
    paper = f'<rect x="{-margin}" y="{-margin}" width="{width:g}" height="{height:g}" style="fill:var(--paper)"/>'
    return f"{head}><style>{style}</style>{paper}{rest}\n"


def measure(args: Namespace) -> dict[str, Any]:
    """The variation of ranks of each ranking space, by metric."""
    bench = WidthPruningBench(args)
    sources = [bench.calibration(name, 0) for fold in FOLDS for name in fold]
    found = collect(bench.model, bench.axes, sources, {Need.ACTIVATIONS}, shards=SHARDS)
    weights, units = weights_of(bench.model), bench.axes.units()
    among, rows = spaces(units), {}
    for name, score in METRICS.items():
        by = {
            domain: (
                score(weights, bench.axes, sum(shards[1:], shards[0]), units=units, pool="standardised"),
                [score(weights, bench.axes, one, units=units, pool="standardised") for one in shards],
            )
            for domain, shards in found.items()
        }
        rows[name] = spectrum(ranks(by, among), among)
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
    """Draw how far ranks vary in each layer (``wifv``), beside the result."""
    found = msgspec.convert({"method": "", "spectrum": result["rows"]["wifv"]}, RunFindings)
    if drawing := figures.spectrum(found):
        out.with_suffix(".svg").write_text(svg_file(drawing))


def main() -> None:
    """Measure, or print and draw."""
    args = arguments(__doc__, OUT, texts=Path("texts"), model="smollm2-135m", dtype="bfloat16", windows=16)
    if not args.show:
        write(args.out, measure(args))
        draw(args.out, json.loads(args.out.read_text()))
    print("\n".join(table(COLUMNS, shown(json.loads(args.out.read_text())))))


if __name__ == "__main__":
    main()
