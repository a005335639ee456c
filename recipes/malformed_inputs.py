"""Give every command malformed inputs, and require one line, a documented exit code, and nothing left behind.

    python recipes/malformed_inputs.py                            600 inputs, drawn with seed 0
    python recipes/malformed_inputs.py --count 40 --seed 3        so many
    python recipes/malformed_inputs.py --case 17 --seed 0 -v      one of them, with what it said
    python recipes/malformed_inputs.py --messages                 the distinct messages of what is committed

An input is a command of ``malformed/commands.py`` with one option changed, or one file that it reads damaged
(``malformed/mutations.py``). Each runs in a child that is forked with everything imported. Faults are:

* a traceback, a bug (exit code 70), an undocumented exit code, or an end by a signal;
* more than 10 s of processor time, or more than 10 s asleep without progress;
* more than 1 GiB of resident memory above a command that does nothing;
* not exactly one line of error, or a control character in it;
* a file or folder that was not there before, after a command that was refused (exit codes 2 and 4).
"""

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "cli")]

from malformed.commands import COMMANDS, Command, prepare  # noqa: E402
from malformed.mutations import VALUES  # noqa: E402

OUT = HERE / "results" / "malformed_inputs.json"
SECONDS, BYTES = 10.0, 2**30
WAITING = 120.0  # on a machine with other work
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Input:
    """One malformed input.

    Args:
        words: The command line.
        command: What it comes from.
        file: The file that is damaged; empty: none.
        how: The mutation, or the option.
        draw: The seed of the mutation.
    """

    words: tuple[str, ...]
    command: Command
    file: str = ""
    how: str = ""
    draw: int = 0

    def damage(self) -> None:
        """Do to the file what is to be done to it."""
        if self.file:
            known = {one.__name__: one for one in dict(self.command.files)[self.file]}
            known[self.how](Path(self.file), random.Random(self.draw))


@dataclass
class Outcome:
    """What came of it."""

    code: int
    said: str
    seconds: float
    asleep: float
    peak: int
    left: list[str] = field(default_factory=list)


def inputs(count: int, seed: int) -> list[Input]:
    """So many malformed inputs: each command in turn, options and files alike."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        for command in COMMANDS:
            places = [*command.options, *(file for file, _ in command.files)]
            place = draw.choice(places)
            if place in command.options:
                found.append(_with_option(command, place, draw.choice(VALUES)))
            else:
                how = draw.choice(dict(command.files)[place])
                words = tuple(command.words.split())
                found.append(Input(words, command, place, how.__name__, draw.randrange(2**32)))
    return found[:count]


def _with_option(command: Command, name: str, value: str) -> Input:
    words = command.words.split()
    if not name.startswith("-"):
        words[1] = value
    elif name in words:
        words[words.index(name) + 1] = value
    else:
        words += [name, value]
    return Input(tuple(words), command, how=f"{name} {value}"[:80])


def forked(work: Callable[[], int], said: Path) -> Outcome:
    """Do something in a child; a child that takes too long is ended."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        with said.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 99
        try:
            code = work()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:  # what the command line itself lets through
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    asleep, spent, looked = 0.0, 0.0, time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
        now = time.monotonic()
        state, busy = _state(child)
        asleep = asleep + now - looked if state in "SD" and busy == spent else 0.0
        spent, looked = busy, now
        if busy > SECONDS + 2 or asleep > SECONDS + 2 or now - began > WAITING:
            os.kill(child, signal.SIGKILL)
    text = said.read_bytes().decode("utf-8", errors="replace")
    return Outcome(
        os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime, asleep, usage.ru_maxrss * 1024
    )


def _state(child: int) -> tuple[str, float]:
    try:
        words = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0.0
    return words[0], (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def tried(one: Input, source: Path, said: Path) -> Outcome:
    """Run one input in a place of its own."""
    with tempfile.TemporaryDirectory(prefix="malformed-") as name:
        place = Path(name)
        for need in one.command.needs:
            made = shutil.copytree if (source / need).is_dir() else shutil.copy
            made(source / need, place / need)  # type: ignore[operator]
        here = Path.cwd()
        os.chdir(place)
        try:
            one.damage()
            before = _entries(place)

            def work() -> int:
                from regrow.cli import code_of

                return code_of(list(one.words))

            outcome = forked(work, said)
            outcome.left = sorted(_entries(place) - before)
        finally:
            os.chdir(here)
        return outcome


def _entries(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if "__pycache__" not in path.parts}


def faults(outcome: Outcome, baseline: int) -> list[str]:
    """What is wrong with an outcome."""
    from regrow.cli.boundary import BUG, ENVIRONMENT, EXIT_CODES, USAGE

    lines = [line for line in outcome.said.splitlines() if line.startswith("regrow: ")]
    found = []
    if "Traceback (most recent call last)" in outcome.said:
        found.append("traceback")
    if outcome.code not in EXIT_CODES or outcome.code == BUG:
        found.append(f"exit code {outcome.code}")
    if outcome.seconds > SECONDS or outcome.asleep > SECONDS:
        found.append(f"hang ({outcome.seconds:.0f} s, {outcome.asleep:.0f} s asleep)")
    if outcome.peak - baseline > BYTES:
        found.append(f"memory ({(outcome.peak - baseline) / 2**30:.1f} GiB)")
    if outcome.code and len(lines) != 1:
        found.append(f"{len(lines)} lines of error")
    if any(_CONTROL.search(line) for line in lines):
        found.append("control characters")
    if outcome.code in (USAGE, ENVIRONMENT) and outcome.left:
        found.append(f"left {', '.join(outcome.left[:3])}")
    return found


def message(outcome: Outcome) -> str:
    """The message without values: what is the same for inputs of one kind."""
    line = next((line for line in outcome.said.splitlines() if line.startswith("regrow: ")), "")
    line = re.sub(r"(['\"`]).*?\1", "'…'", line.removeprefix("regrow: "))
    return re.sub(r"\d[\d,.e+]*", "N", line)[:200]


def rows(found: list[Input], source: Path) -> Iterator[tuple[Input, Outcome, list[str]]]:
    """Try all inputs, one after the other."""
    import torch  # noqa: F401
    import toys  # noqa: F401
    import transformers  # noqa: F401
    from sklearn.datasets import load_digits  # noqa: F401

    from regrow.cli import code_of

    said = source / "said.txt"
    baseline = forked(lambda: code_of(["methods"]), said).peak
    for one in found:
        outcome = tried(one, source, said)
        yield one, outcome, faults(outcome, baseline)


def made(source: Path) -> None:
    """Make all inputs in a child, so that this process keeps as it is."""
    from regrow.cli import code_of

    here = Path.cwd()
    os.chdir(source)

    def work() -> int:
        prepare(source, code_of)
        return 0

    global SECONDS
    was, SECONDS = SECONDS, 600.0
    outcome = forked(work, source / "said.txt")
    SECONDS = was
    os.chdir(here)
    if outcome.code:
        sys.exit(outcome.said)


def main() -> None:
    """Try them, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, action="append")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--inputs", type=Path, help="a folder to make inputs in, or with those of an earlier call")
    parser.add_argument("--messages", action="store_true")
    parser.add_argument("-v", action="store_true")
    told = parser.parse_args()
    if told.messages:
        for text, many in json.loads(OUT.read_text())["messages"].items():
            print(f"{many:4}  {text}")
        return
    found = inputs(told.count, told.seed)
    chosen = told.case or range(len(found))
    with tempfile.TemporaryDirectory(prefix="inputs-") as name:
        source = (told.inputs or Path(name)).resolve()
        if not (source / "run2").is_dir():
            source.mkdir(parents=True, exist_ok=True)
            made(source)
        codes, messages, bad, most = Counter[int](), Counter[str](), list[dict[str, Any]](), [0.0, 0.0, 0]
        began = time.monotonic()
        for number, (one, outcome, wrong) in zip(chosen, rows([found[i] for i in chosen], source), strict=True):
            codes[outcome.code] += 1
            messages[message(outcome)] += 1
            most = [max(a, b) for a, b in zip(most, (outcome.seconds, outcome.asleep, outcome.peak), strict=True)]
            if wrong or told.v:
                print(number, wrong, " ".join(one.words)[:150], "|", one.file, one.how)
                print("    ", outcome.said[-3000 if told.v else -400 :].strip().replace("\n", "\n     "), flush=True)
            if wrong:
                about = {"words": one.words, "file": one.file, "how": one.how, "draw": one.draw}
                bad.append({"number": number, "faults": wrong, **about})
    kinds = Counter(fault.split(" (")[0].split(" out")[0] for row in bad for fault in row["faults"])
    print(
        f"{sum(codes.values())} inputs in {time.monotonic() - began:.0f} s, codes {dict(codes)}, faults {dict(kinds)}"
    )
    if told.case is None and told.out:
        record = {
            "date": datetime.now(UTC).date().isoformat(),
            "inputs": sum(codes.values()),
            "seed": told.seed,
            "exit_codes": {str(code): many for code, many in sorted(codes.items())},
            "faults": dict(kinds),
            "most_cpu_seconds": round(most[0], 2),
            "most_seconds_asleep": round(most[1], 2),
            "most_resident_bytes": most[2],
            "faulty": bad,
            "messages": dict(messages.most_common()),
        }
        told.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
