"""MGAS (reconstructed) beside its own parts and controls: same space, data, size, training anew and seeds.

    python recipes/mgas_tables.py --cifar PICTURES --work FOLDER --seeds 3
    python recipes/mgas_tables.py --cifar PICTURES --work FOLDER --seeds 3 --targets 0.15 0.25 0.4 --match MGAS
    python recipes/mgas_tables.py --fashion FILES --work FOLDER --seeds 3 --match MGAS
    python recipes/mgas_tables.py --show

FILES has Fashion-MNIST's four files (``train-images-idx3-ubyte`` …, or ``.gz``), PICTURES CIFAR-10 as ``train/CLASS/…``
and ``test/CLASS/…``; FOLDER gets a run per row, so that a row which is stopped goes on. A row is written when it is
whole. Every arm ends at the same number of nonzero parameters (a share of the super-network's; DARTS at fewer,
where its two edges per node leave fewer), is trained anew for equally many epochs on training and validation part, and
is tested once. What the search learns from is the training part alone; the validation part is only watched. *Best of 4
random networks* trains four random draws on the training part, as long as any network is trained anew, and takes the
one that is best on the validation part. *All pools and identities*: operations that hold nothing but their scale stay
all, whatever else is drawn. *Random units, MGAS's shares*: operations, filters and weights go in the shares of MGAS's
own row, at random: the difference is what its choice of units is worth. Likewise with the shares of the search without
the three additions. The thresholds of MGAS were others in the rows of 2026-11. Three additions compensated for them
(``min_cost``, ``sparsity_penalty``, ``filter_lr_ratio``), so *without the three additions* no longer runs.
``--targets`` are shares of the space, ``--first`` and ``--seeds`` bound seeds, ``--match`` is part of an arm's name.
The full setting of the paper's code is C = 16, 8 cells of 4 nodes, all images: ``--space cells:16-8-4 --train 0
--epochs 75 --retrain 600 --stride 1 --cutout 16``.
"""

import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import Row, add, arguments, difference, finished, rows, spread, table

import regrow
from regrow.allocation.commits import kind_of
from regrow.core.candidates import candidate_paths
from regrow.core.objectives import CLASSIFICATION
from regrow.evaluation import macs
from regrow.evaluation.continual import mean_score
from regrow.jobs.recording import ActiveRun, Invocation
from regrow.jobs.search import Settings, retrain, search_named
from regrow.jobs.search_inputs import read_search_data
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "mgas.jsonl"


@dataclass(frozen=True)
class Arm:
    """One line of the table.

    Args:
        name: How the table calls it.
        settings: Settings of the method.
        more: Settings of the run, where they differ.
        draws: How many networks are drawn, of which the best in validation is taken.
        runs: Whether it can still be run; the rows of others are printed.
        split: Another arm: each level bears the share of what goes that it bore in that one's row of the same seed.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    draws: int = 1
    runs: bool = True
    split: str = ""


MGAS = Arm("MGAS (reconstructed)")
PLAIN = Arm("without the three additions", runs=False)
BLIND = {"method": "blind", "epochs": 0}
ALL = {"what": "operations,filters,weights"}
ARMS = (
    MGAS,
    PLAIN,
    Arm("random operations", {"what": "operations"}, BLIND),
    Arm("random operations, all pools and identities", {"what": "operations", "keep_bare": True}, BLIND),
    Arm("best of 4 random networks", {"what": "operations"}, BLIND, draws=4),
    Arm("uniform width", {"what": "filters"}, BLIND),
    Arm("random units, MGAS's shares", ALL, BLIND, split=MGAS.name),
    Arm("random units, shares without the three additions", ALL, BLIND, split=PLAIN.name),
    Arm("DARTS, first order", {}, {"method": "darts"}),
    Arm("GOLD-NAS-like", {}, {"method": "gold_nas"}),
    Arm("operations alone", {"levels": ("operations",)}),
    Arm("filters alone", {"levels": ("filters",)}),
    Arm("weights alone", {"levels": ("weights",)}),
    Arm("one stage", {}, {"stages": 1}),
    Arm("nothing regrown", {"regrow": 0.0}),
    Arm("nothing regrown, nor pruned again", {"regrow": 0.0, "reprune": False}),
)


def once(settings: Settings, place: Path) -> RunFolder:
    """The run of a folder: gone on with, or as it is if it is over."""
    return (
        replace(RunFolder.open(place), resumed=True) if finished(place) else search_named(settings, Invocation(place))
    )


def best(settings: Settings, place: Path, draws: int) -> Settings:
    """Of some networks drawn at random the one that, trained on the training part, is best on the validation part."""
    parts, found = read_search_data(settings), {}
    for i in range(draws):
        # Others than the one draw of *random operations*, whose seed is the run's.
        drawn = replace(settings, method_settings={**settings.method_settings, "seed": 1000 + 100 * settings.seed + i})
        folder = once(replace(drawn, retrain=0, cutout=0, test=1), place.with_name(f"{place.name}-{i}"))
        whole = replace(parts, whole=parts.search)
        trained = retrain(ActiveRun(record=folder), drawn, whole, regrow.load(folder.path / "found"))
        found[mean_score(trained, parts.search.test, CLASSIFICATION)] = drawn
    return found[max(found)]


def split(arm: str, target: float, seed: int, args: Namespace) -> list[float]:
    """The share of what goes that each level bore in the row of an arm."""
    told = {"setting": setting(args), "target": target, "arm": arm, "seed": seed}
    row = next((row for row in rows(args.out) if told.items() <= row.items()), None)
    if row is None:
        raise SystemExit(f"there is no row of {arm} for seed {seed} yet: run it first")
    return [saved / sum(row["saved"].values()) for saved in row["saved"].values()]


def measured(arm: Arm, target: float, seed: int, args: Namespace) -> Row:
    """A row."""
    start = time.perf_counter()
    own = arm.settings | ({"split": split(arm.split, target, seed, args)} if arm.split else {})
    asked = {
        name: getattr(args, name) for name in ("space", "train", "epochs", "retrain", "stride", "stages", "cutout")
    }
    asked |= {"data": str(args.fashion or args.cifar), "target": f"nonzero={100 * target:g}%", "fresh": True}
    settings = Settings(**{**asked, **arm.more, "method_settings": own, "seed": seed})
    place = args.work / setting(args) / f"{arm.name.replace(' ', '-')}-{target:g}-{seed}"
    if arm.draws > 1:
        settings = best(settings, place, arm.draws)
    folder = once(settings, place)
    seconds = time.perf_counter() - start if arm.draws > 1 else sum(folder.read_record()["seconds"].values())
    by = {row["what"]: row for row in folder.metrics()}
    one, net = read_search_data(settings).test.inputs[:1], regrow.load(folder.path)
    return {
        "accuracy": by["test"]["accuracy"],
        "found": by["found"]["accuracy"],
        "parameters": by["test"]["parameters"],
        "nonzero": by["test"]["nonzero"],
        "macs": macs(regrow.trace(net, one)),
        "kinds": Counter(kind_of(path) for paths in candidate_paths(net).values() for path in paths),
        "saved": {level: round(saved) for level, saved in by["levels"]["saved"].items()},
        "seconds": round(seconds),
    }


def shown(every: list[Row]) -> Iterator[str]:
    """The table in Markdown, a block per space, size of the data and target."""
    for setting, target in dict.fromkeys((row["setting"], row["target"]) for row in every):
        own = [row for row in every if (row["setting"], row["target"]) == (setting, target)]
        names = ("", "test accuracy, %", "difference, paired", "as the search left it", "nonzero", "stored")
        names += ("left out: operations, filters, weights", "s")
        counted = all("macs" in row for row in own)
        seeds = ", ".join(map(str, sorted({row["seed"] for row in own})))
        yield f"\n{setting}, target nonzero={100 * target:g}% of the space's parameters, seeds {seeds}\n"
        yield from table((*names, *["dense MACs of an image, M"] * counted), lines(own, counted))


def lines(own: list[Row], counted: bool) -> Iterator[list[str]]:
    """A line per arm that has rows."""
    whole = {row["seed"]: row["accuracy"] for row in own if row["arm"] == MGAS.name}
    for arm in ARMS:
        done = [row for row in own if row["arm"] == arm.name]
        if not done:
            continue
        both = [(row["accuracy"], whole[row["seed"]]) for row in done if row["seed"] in whole]
        yield [
            arm.name,
            spread([row["accuracy"] for row in done]),
            difference(both) if arm is not MGAS else "",
            spread([row["found"] for row in done]),
            *(f"{fmean(row[name] for row in done):,.0f}" for name in ("nonzero", "parameters")),
            ", ".join(f"{fmean(row['saved'][level] for row in done):,.0f}" for level in done[0]["saved"]),
            f"{fmean(row['seconds'] for row in done):.0f}",
            *[f"{fmean(row['macs'] for row in done) / 1e6:.2f}" for _ in range(counted)],
        ]


def setting(args: Namespace) -> str:
    """What all arms have in common."""
    told = f"{args.space}, {args.train} images, {args.epochs} + {args.retrain} epochs"
    told += f", cutout {args.cutout}" if args.cutout else ""
    return f"Fashion-MNIST, {told}" if args.fashion else told


def main() -> None:
    """Run what is not there yet, or show the table."""
    sizes = {"train": 4000, "epochs": 24, "retrain": 30, "cutout": 0, "stages": 3, "stride": 2, "first": 0, "seeds": 3}
    more = {"work": Path("mgas-runs"), "space": "cells:8-6-2", "targets": [0.25], "match": ""}
    args = arguments(__doc__, OUT, cifar=Path, fashion=Path, **more, **sizes)
    if args.show:
        print("\n".join(shown(rows(args.out))))
        return
    for seed, target, arm in product(range(args.first, args.seeds), args.targets, ARMS):
        told = {"setting": setting(args), "target": target, "measure": "nonzero", "arm": arm.name, "seed": seed}
        if arm.runs and args.match in arm.name and not any(told.items() <= row.items() for row in rows(args.out)):
            row = add(args.out, told | measured(arm, target, seed, args))
            print(f"{setting(args)}, {target:g}, seed {seed}, {arm.name}: {row['accuracy']:.4f}", flush=True)


if __name__ == "__main__":
    main()
