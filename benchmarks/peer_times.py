"""Trace + cut beside Torch-Pruning 1.6.1, 1.5.2 and optipfair: CPU seconds of one thread, in turns.

    python benchmarks/peer_times.py                  a sample: about 8 minutes on an idle core; resumes where it stopped
    python benchmarks/peer_times.py --sample 0       every network that the tool cuts (an hour)
    python benchmarks/peer_times.py --double         the same in float64, in which peers.py cuts them
    python benchmarks/peer_times.py --show           the table in Markdown

Both tools cut half of everything they can, as peers.py does it, in turns, each in a process of its own that is forked
when everything is imported and the network built. There it runs a copy once and cuts it, and then another copy: the
first cut of a process pays for what a library sets up when it is first used, the second does not (but regrow forgets
the forms of results that it remembers). The table compares medians, of first cuts and of second ones. The sample is
every k-th network, by name, of those that the tool cuts such that they run (results/peers.jsonl). A network that takes
long has fewer rounds. optipfair removes neurons of gated MLPs and nothing else; it traces nothing. How many of the cuts
are wrong is in results/peers.jsonl, too: those that compute something else than the masked network.

Two floors are measured in the same turns: ``torch.export`` alone, which records the network once, and one recording by
regrow alone, of which a trace takes at least two (the network and its trial cut) and a cut one (the cut network).
"""

import argparse
import copy
import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import apart
import peer
import peers
import torch
from torch import nn
from torch.utils._pytree import tree_map

from nets import KINDS
from regrow.nets import replace_attention
from regrow.store.versions import versions
from regrow.surgery import apply
from regrow.tracing import trace
from regrow.tracing.capture import capture, example_of

OUT = Path("benchmarks/results/peer_times.jsonl")
TOOLS = {"1.6.1": "torch-pruning==1.6.1", "1.5.2": "torch-pruning==1.5.2", "optipfair": "optipfair==0.4.2"}
GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "olmo2", "granite", "smollm3", "stablelm"]
DOUBLE = " in float64"
ROUND = 8
"""CPU seconds of a round behind which no other follows."""
FORK = multiprocessing.get_context("fork")

Network = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def ours(net: Network) -> float:
    """CPU seconds in which regrow traces a network and cuts half of what it cuts exactly."""
    model, args, kwargs = net
    peer.answers(model, args, kwargs)
    start = time.process_time()
    axes = trace(model, *args, **kwargs)
    apply(model, axes, peers.halved(model, axes))
    return time.process_time() - start


def torch_pruning(net: Network) -> float:
    """CPU seconds in which Torch-Pruning builds its graph and cuts half."""
    model, args, kwargs = net
    if hasattr(getattr(model, "config", None), "use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    with redirect_stdout(io.StringIO()):
        row = peer.pruned(model, args, kwargs, judge=False)
    if not row.get("runs"):
        raise RuntimeError(row.get("why", "does not run"))
    return float(row["cpu_s"])


def optipfair(net: Network) -> float:
    """CPU seconds in which optipfair removes half of the MLP neurons."""
    import optipfair as tool

    model = net[0]
    start = time.process_time()
    with redirect_stdout(io.StringIO()):
        tool.prune_model(model, neuron_selection_method="MAW", pruning_percentage=50, show_progress=False)
    seconds = time.process_time() - start
    peer.answers(model, net[1], net[2])
    return seconds


def exporting(net: Network) -> float:
    """CPU seconds in which torch.export records a network once; not a number where it refuses."""
    model, args, kwargs = net
    peer.answers(model, args, kwargs)
    example = example_of(model, args, kwargs)
    start = time.process_time()
    try:
        torch.export.export(model, example.args, dict(example.kwargs), strict=False)
    except Exception:
        return math.nan
    return time.process_time() - start


def recording(net: Network) -> float:
    """CPU seconds in which regrow records a network once."""
    model, args, kwargs = net
    peer.answers(model, args, kwargs)
    start = time.process_time()
    capture(model, example_of(model, args, kwargs))
    return time.process_time() - start


def turns(tool: str, key: str, rounds: int, seconds: int) -> apart.Row:
    """Let both cut copies of a network in turns."""
    theirs: Callable[[Network], float] = optipfair if tool == "optipfair" else torch_pruning
    model, args, kwargs = peer.network("net", key.removesuffix(DOUBLE))
    if key.endswith(DOUBLE):
        double = lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x  # noqa: E731
        model, args, kwargs = model.double(), tree_map(double, args), tree_map(double, kwargs)
    plain = model if key.startswith("transformers/") else replace_attention(copy.deepcopy(model))
    row: apart.Row = {"key": f"{tool} {key}", "regrow": [], "peer": [], "export": [], "recording": []}
    cuts = {"regrow": (ours, (plain, args, kwargs)), "peer": (theirs, (model, args, kwargs))}
    floors = {"recording": (recording, (plain, args, kwargs)), "export": (exporting, (plain, args, kwargs))}
    for i in range(rounds):
        for side, (cut, net) in (*sorted(cuts.items(), reverse=bool(i % 2)), *floors.items()):
            said = forked(cut, net, seconds)
            if isinstance(said, str):
                return row | {"error": f"{side}: {said}"}
            row[side].append(said)
        if sum(sum(row[side][0]) for side in row.keys() & {*cuts, *floors}) > ROUND:
            break
    return row


def forked(cut: Callable[[Network], float], net: Network, seconds: int) -> list[float] | str:
    """Seconds of the first and of the second cut in a process of its own; in words, why there are none."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        model, args, kwargs = net
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        try:
            sender.send([round(cut((copy.deepcopy(model), args, kwargs)), 4) for _ in range(2)])
        except Exception as error:
            sender.send(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])

    gc.collect()
    process = FORK.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(20 * seconds) else f"stopped after {20 * seconds} s"
    except EOFError:
        return f"stopped after {seconds} s of the processor"
    finally:
        process.kill()
        process.join()


def child(tool: str, keys: list[str], rounds: int, seconds: int) -> None:
    """Measure networks one after the other; print a row for each."""
    import torchvision  # noqa: F401
    import transformers  # noqa: F401

    importlib.import_module("optipfair" if tool == "optipfair" else "torch_pruning")
    torch.set_num_threads(1)
    for key in keys:
        apart.tell(turns(tool, key, rounds, seconds))


# --- the side that calls --------------------------------------------------------------------------------------------


def networks(tool: str, sample: int, known: dict[str, apart.Row]) -> Iterator[str]:
    """The networks that a tool cuts: all, or a sample of each kind."""
    if tool == "optipfair":
        yield from (f"transformers/{name}" for name in GATED[: sample or None])
        return
    for kind in KINDS:
        cut = [key for key, row in sorted(known.items()) if key.startswith(f"{kind}/") and _is_cut(row.get(tool, {}))]
        yield from cut[:: max(1, len(cut) // sample)][:sample] if sample else cut


def _is_cut(row: apart.Row) -> bool:
    return bool(row.get("runs")) and row.get("after", 0) < row["before"]


def page(rows: dict[str, apart.Row], known: dict[str, apart.Row]) -> str:
    """Per tool and kind: medians over the networks, and of the ratios of each network's medians."""
    titles = ("peer", "networks", "of", "regrow, first cut", "peer", "ratio", "regrow, second cut", "peer", "ratio")
    floors = ("one recording ÷ peer", "torch.export ÷ peer", "wrong cuts")
    lines = [f"| {' | '.join((*titles, *floors))} |", "|---" * 12 + "|"]
    for tool in TOOLS:
        for kind, precision in product(KINDS, ("", DOUBLE)):
            every = {key: row for key, row in rows.items() if key.startswith(f"{tool} {kind}/") and "error" not in row}
            own = [row for key, row in every.items() if key.endswith(DOUBLE) == bool(precision)]
            if not own:
                continue
            cells = [tool, kind + precision, str(len(own))]
            for turn in (0, 1):
                pairs = [tuple(median(one[turn] for one in row[side]) for side in ("regrow", "peer")) for row in own]
                ratios = sorted(a / b for a, b in pairs)
                cells += [f"{median(side):.3f} s" for side in zip(*pairs, strict=True)]
                cells.append(f"{median(ratios):.2f} × ({ratios[0]:.2f} to {ratios[-1]:.2f})")
            cells += [_floor(own, side) for side in ("recording", "export")]
            verdicts = [row[tool]["verdict"] for key, row in known.items() if key.startswith(kind) and _cut(row, tool)]
            cells.append(f"{sum(one != 'exact' for one in verdicts)} of {len(verdicts)}" if verdicts else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _floor(rows: list[apart.Row], side: str) -> str:
    """Median of the ratios of a floor to the peer, of second turns; how many networks have one if not all."""
    measured = [row for row in rows if row.get(side)]
    pairs = [[median(one[1] for one in row[key]) for key in (side, "peer")] for row in measured]
    ratios = [a / b for a, b in pairs if a == a]
    few = "" if len(ratios) == len(rows) else f" (of {len(ratios)})"
    return f"{median(ratios):.2f} ×{few}" if ratios else "refused" if measured else "not measured"


def _cut(row: apart.Row, tool: str) -> bool:
    return _is_cut(row.get(tool, {})) and "verdict" in row[tool]


def main() -> None:
    """Measure what has no row yet, or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--tools", nargs="*", choices=[*TOOLS], default=[*TOOLS])
    parser.add_argument("--sample", type=int, default=5, help="networks per kind and tool; 0: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each tool")
    parser.add_argument("--seconds", type=int, default=60, help="CPU seconds of two cuts at most")
    parser.add_argument("--double", action="store_true", help="networks in float64, as in peers.py")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--show", action="store_true", help="print the table in Markdown")
    parser.add_argument("--environments", type=Path, default=peer.HOME, help="where environments are made")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.child[1:], args.rounds, args.seconds)
        return
    known = apart.rows(peers.OUT)
    done = {} if args.again else apart.rows(args.out)
    about = {"date": time.strftime("%Y-%m-%d"), "machine": platform.machine(), "cores": os.cpu_count()}
    about |= {"load": round(os.getloadavg()[0], 1), "versions": versions()}
    for tool in () if args.show else args.tools:
        sample = [key + DOUBLE * args.double for key in networks(tool, args.sample, known)]
        keys = [key for key in sample if f"{tool} {key}" not in done]
        if not keys:
            continue
        python = peer.environment(args.environments / tool, TOOLS[tool])
        limits = ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
        paths = f"{Path(__file__).parent}:{Path(__file__).parents[1] / 'src'}"
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [python, __file__, *limits, "--child", tool, *keys]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    row = json.loads(line) | about
                    done[row["key"]] = row
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    print(row["key"], row["regrow"], row["peer"], row.get("error", ""), file=sys.stderr, flush=True)
    print(page(apart.rows(args.out), known))


if __name__ == "__main__":
    main()
