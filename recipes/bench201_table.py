"""What topologies of NAS-Bench-201 are worth, looked up in the table of IBM's AnalogNAS-Bench.

    pip download analog-nasbench==0.1.3 --no-deps
    python recipes/bench201_table.py convert analog_nasbench-0.1.3-py3-none-any.whl --table analog201.csv
    python recipes/bench201_table.py summary --table analog201.csv
    python recipes/bench201_table.py look --table analog201.csv RUN … (folders of a search, or topologies)

AnalogNAS-Bench (arXiv 2506.18495) trained all 15,625 cells on CIFAR-10 anew, so these are not NAS-Bench-201's own
numbers, and are never to be called so. Its wheel states no licence: the table is made from it and not kept here. The
wheel holds a pickle, which can run code when it is read; this one is read with nothing allowed but its two records.
"""

import argparse
import csv
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean, median, stdev
from typing import IO, Any

import regrow
from regrow.nets.bench201 import EDGES, OPERATIONS, Bench201

OUT = Path(__file__).parent / "results" / "analog201.json"
WHEEL = "f7d4e56e416d249d25555b867a6d7c72886fa9d85a49bd1870708acbf5ee6fe2"
PLACE = "analognasbench/data.anb"
CODES = ("skip_connect", "none", "nor_conv_3x3", "nor_conv_1x1", "avg_pool_3x3")
THEIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""Their order of edges, which is not NAS-Bench-201's."""


def architecture_string(edges: Sequence[str]) -> str:
    """Return a topology in the notation of NAS-Bench-201.

    Args:
        edges: The operation on each of ``EDGES``.

    >>> architecture_string(["skip_connect"] * 5 + ["none"])
    '|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|none~2|'
    """
    nodes = [[f"{name}~{a}" for (a, b), name in zip(EDGES, edges, strict=True) if b == node] for node in (1, 2, 3)]
    return "+".join(f"|{'|'.join(node)}|" for node in nodes)


def read(text: str) -> tuple[str, ...]:
    """Parse a topology in the notation of NAS-Bench-201: the operation on each of ``EDGES``.

    Args:
        text: The topology.

    Raises:
        ValueError: If the text is not a topology.

    >>> read(architecture_string(OPERATIONS + ("none",))) == OPERATIONS + ("none",)
    True
    """
    result = tuple(re.findall(r"\|(\w+)(?=~)", text[:400]))
    if len(result) != len(EDGES) or not {*result} <= {*OPERATIONS} or architecture_string(result) != text:
        raise ValueError(f"not a topology of NAS-Bench-201: {text[:80]!r}")
    return result


def topologies() -> list[tuple[str, ...]]:
    """Return all 15,625 topologies: the operation on each of ``EDGES``."""
    return [*product(OPERATIONS, repeat=len(EDGES))]


def count_cost(
    edges: Sequence[str], *, width: int = 16, cells: int = 5, size: int = 32, classes: int = 10
) -> dict[str, int]:
    """Return parameters and multiply–accumulates of a topology on square RGB images, without ``scale``.

    Args:
        edges: The operation on each of ``EDGES``.
        width: Channels of the first stage.
        cells: Cells per stage.
        size: Height and width of an image; a multiple of 4.
        classes: The number of logits.
    """
    params, macs = 27 * width + 2 * width, 27 * width * size**2
    for stage in range(3):
        c, pixels = width << stage, (size >> stage) ** 2
        if stage:
            half = c // 2
            params += 9 * half * c + 9 * c * c + 4 * c + half * c
            macs += (9 * half * c + 9 * c * c + half * c) * pixels
        for name in edges:
            if name.startswith("nor"):
                inner = int(name[-1]) ** 2 * c * c
                params += cells * (inner + 2 * c)
                macs += cells * inner * pixels
    last = width << 2
    return {"params": params + 2 * last + (last + 1) * classes, "macs": macs + last * classes}


class _Record:
    """What stands for their two classes: attributes, and no code."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("analognasbench.data", "Architecture"), ("analognasbench.data", "DriftMeasurement")):
            return _Record
        raise pickle.UnpicklingError(f"{module}.{name} has no place in this table")


def ours(codes: Sequence[int]) -> str:
    """Their six codes as a topology in the notation of NAS-Bench-201.

    >>> ours((2, 0, 4, 3, 1, 1))
    '|nor_conv_3x3~0|+|skip_connect~0|nor_conv_1x1~1|+|avg_pool_3x3~0|none~1|none~2|'
    """
    on = {edge: CODES[code] for edge, code in zip(THEIRS, codes, strict=True)}
    return architecture_string([on[edge] for edge in EDGES])


def converted(file: IO[bytes]) -> dict[str, float]:
    """Topology → accuracy without noise or quantisation, in percent.

    Raises:
        pickle.UnpicklingError: If the pickle asks for anything but the two records.
    """
    records = _Reader(file).load()
    return {ours(codes): float(record.baseline_accuracy) for codes, record in records.items()}


@dataclass(frozen=True)
class Table:
    """Accuracies by topology.

    Args:
        accuracy: Topology → accuracy in percent.
    """

    accuracy: Mapping[str, float]

    @cached_property
    def params(self) -> dict[str, int]:
        """Topology → parameters in the paper's skeleton."""
        return {text: count_cost(read(text))["params"] for text in self.accuracy}

    def upto(self, params: int) -> list[str]:
        """The topologies that have no more parameters."""
        return [text for text, many in self.params.items() if many <= params]

    def look(self, text: str, draws: int) -> dict[str, Any]:
        """What there is to say of a topology.

        Args:
            text: The topology.
            draws: Of the random search it is held against, among topologies of at most its size.
        """
        own, small = self.accuracy[text], self.upto(self.params[text])
        peers = sorted(self.accuracy[one] for one in small)
        below, same = sum(one < own for one in peers), sum(one == own for one in peers)
        most = max(map(threes, small))
        trivial = [one for one in small if threes(one) == most]
        skips = [one for one in trivial if {*read(one)} <= {"nor_conv_3x3", "skip_connect"}]
        return {
            "topology": text,
            "accuracy": round(own, 2),
            "rank": 1 + sum(one > own for one in self.accuracy.values()),
            **count_cost(read(text)),
            "peers": len(peers),
            "percentile": round(100 * (below + same / 2) / len(peers), 2),
            "random, one draw": round(fmean(peers), 2),
            f"random, best of {draws}": round(best_of(peers, draws), 2),
            "convolutions 3 x 3 that fit": most,
            "as many of them, mean": round(fmean(self.accuracy[one] for one in trivial), 2),
            "as many and skips, mean": round(fmean(self.accuracy[one] for one in skips), 2),
            "best of the size": round(peers[-1], 2),
        }


def table_of(path: Path) -> Table:
    """A converted table."""
    with path.open(newline="") as rows:
        return Table({row["topology"]: float(row["accuracy"]) for row in csv.DictReader(rows)})


def threes(text: str) -> int:
    """How many of its operations are 3 × 3 convolutions.

    >>> threes("|nor_conv_3x3~0|+|none~0|nor_conv_3x3~1|+|none~0|none~1|none~2|")
    2
    """
    return text.count("nor_conv_3x3")


def best_of(values: Sequence[float], draws: int) -> float:
    """The mean of the greatest of so many values drawn from a sorted list, with replacement.

    >>> best_of([0.0, 1.0], 1), best_of([0.0, 1.0], 2)
    (0.5, 0.75)
    """
    n = len(values)
    return sum(one * (((i + 1) / n) ** draws - (i / n) ** draws) for i, one in enumerate(values))


def summary(table: Table) -> dict[str, Any]:
    """The table in a few figures; ``dead`` shows that the order of edges is right.

    With nothing from 1 and 2 to 3, edges 0-1, 0-2 and 1-2 reach no output: accuracy may not depend on them, and does
    on 0-3.
    """
    values, by = [*table.accuracy.values()], {text: read(text) for text in table.accuracy}
    cut = {text: ops for text, ops in by.items() if (ops[4], ops[5]) == ("none", "none")}
    dead = {}
    for i in range(4):
        groups: dict[tuple[str, ...], list[float]] = {}
        for text, ops in cut.items():
            groups.setdefault(ops[:i] + ops[i + 1 :], []).append(table.accuracy[text])
        dead["-".join(map(str, EDGES[i]))] = round(median(max(own) - min(own) for own in groups.values()), 2)
    threefold = {k: [table.accuracy[text] for text in by if threes(text) == k] for k in range(7)}
    return {
        "source": "analog-nasbench 0.1.3, baseline accuracy on CIFAR-10; its own training, not NAS-Bench-201's",
        "topologies": len(values),
        "best": round(max(values), 2),
        "median": round(median(values), 2),
        "at chance": sum(one == 10 for one in values),
        "by 3 x 3 convolutions": {k: round(fmean(own), 2) for k, own in threefold.items()},
        "random, best of n": {n: round(best_of(sorted(values), n), 2) for n in (1, 5, 10, 50, 100)},
        "spread along an edge with 1-3 and 2-3 none": dead,
    }


def topology(name: str) -> str:
    """A topology, as it is or of the network in a run folder.

    Raises:
        ValueError: If the folder has another network, or an edge of it more than one operation.
    """
    if name.startswith("|"):
        return architecture_string(read(name))
    net = regrow.load(name)
    if not isinstance(net, Bench201) or any(len(ops) > 1 for ops in net.config["edges"]):
        raise ValueError(f"{name} holds no single topology of NAS-Bench-201")
    return architecture_string([ops[0] for ops in net.config["edges"]])


def told(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Looked-up topologies in Markdown, and their mean."""
    names = [name for name in found[0] if name != "topology"]
    yield f"| topology | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    for row in found:
        yield f"| `{row['topology'].replace('|', '/')}` | {' | '.join(f'{row[name]:,}' for name in names)} |"
    if len(found) > 1:
        both = [[row[name] for row in found] for name in names]
        yield f"| mean ± deviation | {' | '.join(f'{fmean(own):,.2f} ± {stdev(own):,.2f}' for own in both)} |"


def main() -> None:
    """Convert, sum up, or look up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("convert", "summary", "look"))
    parser.add_argument("names", nargs="*", help="the wheel; or run folders and topologies")
    parser.add_argument("--table", type=Path, default=Path("analog201.csv"))
    parser.add_argument("--draws", type=int, default=10, help="of the random search beside what is looked up")
    parser.add_argument("--out", type=Path, default=OUT, help="where the summary goes")
    args = parser.parse_intermixed_args()
    if args.verb == "convert":
        wheel = Path(args.names[0])
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL:
            raise SystemExit(f"{wheel} is not the wheel of analog-nasbench 0.1.3")
        with zipfile.ZipFile(wheel) as archive, archive.open(PLACE) as file:
            found = converted(file)
        with args.table.open("w", newline="") as out:
            csv.writer(out).writerows([("topology", "accuracy"), *sorted(found.items())])
        return
    table = table_of(args.table)
    if args.verb == "summary":
        args.out.write_text(json.dumps(summary(table), indent=2) + "\n")
        print(args.out.read_text(), end="")
    else:
        print("\n".join(told([table.look(topology(name), args.draws) for name in args.names])))


if __name__ == "__main__":
    main()
