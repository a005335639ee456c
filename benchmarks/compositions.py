"""Every command on the result of every other: all ordered pairs of prune, grow, recover, learn and search.

    python benchmarks/compositions.py --work FOLDER                      # all networks, at the smallest sizes that run
    python benchmarks/compositions.py --work FOLDER --networks own       # some
    python benchmarks/compositions.py --work FOLDER --missing            # only pairs that have no row yet
    python benchmarks/compositions.py --show

A pair runs the first command on the network and the second on its run folder, from the command line; a recovery that
comes first is one of a pruned network. A row says whether the second ran, or the line by which it, or the first, was
refused.
"""

import argparse
import contextlib
import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.cli import boundary
from regrow.cli.app import code_of

RESULTS = Path(__file__).resolve().parent / "results" / "compositions.jsonl"
COMMANDS = ("prune", "grow", "recover", "learn", "search")
_IMAGES = {
    "prune": "--method magnitude --keep 0.9 --source digits --tokens 128 --eval-tokens 64",
    "grow": "--channels +1",
    "recover": "--by distil --tokens 128",
    "learn": "--method naive --epochs 1 --train 64 --test 32",
    "search": "--data digits --target 0.9 --epochs 3 --retrain 0 --train 48 --test 16",
}
_FILTERS = (
    """--data digits --target 0.9 --method blind --set what=["filters"] --epochs 0 --retrain 0 --train 48 --test 16"""
)
_LARGE = _IMAGES | {"search": _FILTERS}
_TEXT = {
    "prune": "--method magnitude --keep 0.95 --source news --tokens 256 --eval-tokens 128 --seq-len 64 --no-verify",
    "grow": "--mlp +1% --no-verify",
    "recover": "--by lora --tokens 256",
    "learn": "--method naive --epochs 1 --train 4 --test 2 --seq-len 32 --batch-size 2",
    "search": """--data news --target 0.95 --method blind --set what=["filters"] --epochs 0 --retrain 0 --train 6 """
    "--test 2 --validation 0.3 --seq-len 32 --batch-size 2",
}
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "own": {"model": "compositions:network", "code": True, "options": _IMAGES, "task": "digits"},
    "resnet18": {"model": "resnet18", "input": "1x3x32x32", "options": _LARGE, "task": "digits"},
    "smollm2-135m": {"model": "smollm2-135m", "options": _TEXT, "task": "news"},
}


def network() -> tuple[nn.Module, torch.Tensor]:
    """Return a small convolutional classifier of 8 × 8 images, as a user's own code builds it, and an input."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1)]
    head = [nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)]
    return nn.Sequential(*body, *head), torch.randn(1, 1, 8, 8)


def command_words(case: Mapping[str, Any], command: str, model: str, out: str) -> list[str]:
    """Return the words of a command on a model.

    Args:
        case: The entry of ``NETWORKS``.
        command: The command.
        model: The network's name, or a run folder.
        out: The run folder to write.
    """
    first = [case["task"], "--model", model] if command == "learn" else [model]
    new = model == case["model"]
    more = ["--input", case["input"]] if new and "input" in case and command != "recover" else []
    code = ["--code", case["model"]] if case.get("code") and not new else []
    return [command, *first, *case["options"][command].split(), *more, *code, "--out", out]


def run_command(words: list[str]) -> tuple[str, str, float]:
    """Run a command in this process; return ``ran``, ``refused`` or ``failed``, its last line of errors, and seconds.

    Args:
        words: The words after ``regrow``.
    """
    errors, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            code = code_of(words)
        except Exception as error:  # a traceback, where there should be a line
            code, trace = 1, f"{type(error).__name__}: {error}"
            errors.write(trace)
    seconds = round(time.perf_counter() - start, 1)
    lines = [line for line in errors.getvalue().splitlines() if line.strip()]
    if code == 0:
        return "ran", "", seconds
    last = lines[-1].removeprefix("regrow: ") if lines else ""
    return "refused" if code in (boundary.USAGE, boundary.REFUSED) else "failed", last, seconds


def run_pairs(name: str, work: Path, done: set[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Run all pairs on a network, and yield a row for each.

    Args:
        name: The key in ``NETWORKS``.
        work: A new folder.
        done: Pairs that are left out.
    """
    case, firsts = NETWORKS[name], {}
    if len(done) == len(COMMANDS) ** 2:
        return
    work.mkdir(parents=True)
    os.chdir(work)
    for command in COMMANDS:
        model = "prune" if command == "recover" else case["model"]
        firsts[command] = run_command(command_words(case, command, model, command))
        print(name, command, *firsts[command], flush=True)
    for first in COMMANDS:
        outcome, reason, seconds = firsts[first]
        for second in COMMANDS:
            if (first, second) in done:
                continue
            row = {"network": name, "first": first, "second": second, "outcome": outcome, "refused": first}
            row |= {"reason": reason, "seconds": seconds}
            if outcome == "ran":
                words = command_words(case, second, first, f"{first}-{second}")
                result, line, spent = run_command(words)
                row |= {"outcome": result, "reason": line, "seconds": spent, "refused": second}
            if row["outcome"] == "ran":
                del row["refused"], row["reason"]
            yield row | {"date": datetime.now(UTC).date().isoformat()}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table: one line per network and first command, seconds or a reason per second one.

    Args:
        rows: The rows.
    """
    lines = [f"| network | first | {' | '.join(COMMANDS)} |", "|---" * (2 + len(COMMANDS)) + "|"]
    reasons: dict[str, int] = {}
    known = {(row["network"], row["first"], row["second"]): row for row in rows}
    for name in dict.fromkeys(row["network"] for row in rows):
        for first in COMMANDS:
            cells = []
            for second in COMMANDS:
                row = known.get((name, first, second))
                if row is None:
                    cells.append("not run")
                    continue
                if row["outcome"] == "ran":
                    cells.append(f"{row['seconds']:.0f} s")
                    continue
                reason = re.sub(r"^[\w-]+: ", "", row["reason"])
                cells.append(f"{row['outcome']} ({reasons.setdefault(reason, len(reasons) + 1)})")
            lines.append(f"| {name} | {first} | {' | '.join(cells)} |")
    counts = [
        f"{name}: {sum(r['outcome'] == 'ran' for r in rows if r['network'] == name)} ran, "
        f"{sum(r['outcome'] == 'refused' for r in rows if r['network'] == name)} refused, "
        f"{sum(r['outcome'] == 'failed' for r in rows if r['network'] == name)} failed"
        for name in dict.fromkeys(row["network"] for row in rows)
    ]
    return "\n".join([*lines, "", *counts, "", *(f"({i}) {reason}" for reason, i in reasons.items())])


def main() -> None:
    """Run the pairs, and write the rows; or print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--networks", nargs="*", default=[*NETWORKS], choices=[*NETWORKS])
    parser.add_argument("--missing", action="store_true", help="only pairs that have no row yet")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    if not given.show:
        for name in given.networks:
            known = [row for row in known if row["network"] != name or given.missing]
            done = {(row["first"], row["second"]) for row in known if row["network"] == name}
            for row in run_pairs(name, given.work.resolve() / name, done):
                print(json.dumps(row), flush=True)
                known.append(row)
                RESULTS.write_text("".join(json.dumps(one) + "\n" for one in known))
    print(table(known))


if __name__ == "__main__":
    main()
