"""Give every command malformed inputs, and require one line, a documented exit code, and nothing left behind.

    python recipes/malformed_inputs.py                         620 inputs, drawn with seed 0, and those of permissions
    python recipes/malformed_inputs.py --count 40 --seed 3 --out FILE
    python recipes/malformed_inputs.py --case 17               one of them, with all it said
    python recipes/malformed_inputs.py --show --messages       what is committed, with the distinct messages

An input is a command of ``malformed/commands.py`` with one option changed, or one file that it reads damaged
(``malformed/mutations.py``), or made unreadable or unwritable. Each runs in a child that is forked with everything
imported. Faults are:

* a traceback, a bug (exit code 70), an undocumented exit code, or an end by a signal;
* more than 10 s of processor time, or more than 10 s asleep without progress;
* more than 1 GiB of resident memory above a command that does nothing;
* not exactly one line of error, or a control character in it;
* a file or folder that was not there before, after a command that was refused (exit codes 2 and 4).
"""

import ctypes
import importlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass, field
from pathlib import Path

from harness import Row, add, arguments
from harness import rows as read
from malformed.commands import COMMANDS, Command, prepare
from malformed.mutations import DENIED, VALUES

OUT = Path(__file__).parent / "results" / "malformed_inputs.jsonl"
SECONDS, BYTES = 10.0, 2**30
WAITING = 900.0  # on a machine with other work
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
            mutations = (*dict(self.command.files).get(self.file, ()), *DENIED)
            known = {mutation.__name__: mutation for mutation in mutations}
            known[self.how](Path(self.file), random.Random(self.draw))

    @property
    def denied(self) -> bool:
        """Whether it is about what a user may do, so that root must become another one for it."""
        return self.how in {mutation.__name__ for mutation in DENIED} and os.geteuid() == 0


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
    draw, drawn = random.Random(seed), []
    while len(drawn) < count:
        for command in COMMANDS:
            places = [*command.options, *(file for file, _ in command.files)]
            place = draw.choice(places)
            if place in command.options:
                drawn.append(_with_option(command, place, draw.choice(VALUES)))
            else:
                how = draw.choice(dict(command.files)[place])
                words = tuple(command.words.split())
                drawn.append(Input(words, command, place, how.__name__, draw.randrange(2**32)))
    return drawn[:count]


def forbidden() -> list[Input]:
    """Files and folders that the user may not read, and places that the user may not write, for each command."""
    drawn = []
    for command in COMMANDS:
        words = tuple(command.words.split())
        first = [file for file, _ in command.files][:1]
        folders = [file.partition("/")[0] for file in first if "/" in file]
        drawn += [Input(words, command, place, "unreadable") for place in (*first, *folders)]
        if "--out" in words or "--json" in words:
            drawn.append(Input(words, command, ".", "unwritable"))
    return drawn


def _with_option(command: Command, name: str, value: str) -> Input:
    words = command.words.split()
    if not name.startswith("-"):
        words[1] = value
    elif name in words:
        words[words.index(name) + 1] = value
    else:
        words += [name, value]
    return Input(tuple(words), command, how=f"{name} {value}"[:80])


def forked(work: Callable[[], int], said: Path, seconds: float = SECONDS) -> Outcome:
    """Do something in a child; a child that takes too long is ended."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        _child(work, said)
    asleep, longest, spent, looked = 0.0, 0.0, 0.0, time.monotonic()
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
        now = time.monotonic()
        state, busy = _state(child)
        asleep = asleep + now - looked if state in "SD" and busy == spent else 0.0
        longest = max(longest, asleep)
        spent, looked = busy, now
        if busy > seconds + 2 or asleep > seconds + 2 or now - began > WAITING:
            os.kill(child, signal.SIGKILL)
    code, text = os.waitstatus_to_exitcode(status), said.read_bytes().decode("utf-8", errors="replace")
    return Outcome(code, text, usage.ru_utime + usage.ru_stime, asleep, usage.ru_maxrss * 1024)


def _child(work: Callable[[], int], said: Path) -> None:
    """The life of the child; does not return."""
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
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def obey() -> None:
    """Have root respect the permissions of files, as other users must: give up two capabilities for good."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of which the first 32 and then the others
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data):
        raise OSError(ctypes.get_errno(), "capget")
    for at in range(3):
        data[at] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    if libc.capset(header, data):
        raise OSError(ctypes.get_errno(), "capset")


def _state(child: int) -> tuple[str, float]:
    try:
        words = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "Z", 0.0
    return words[0], (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def tried(malformed: Input, source: Path, said: Path) -> Outcome:
    """Run one input in a place of its own."""
    from regrow.cli import run_command

    def work() -> int:
        if malformed.denied:
            obey()
        return run_command(list(malformed.words))

    with tempfile.TemporaryDirectory(prefix="malformed-") as name, chdir(name):
        place = Path(name)
        for need in malformed.command.needs:
            made = shutil.copytree if (source / need).is_dir() else shutil.copy
            made(source / need, place / need)  # type: ignore[operator]
        malformed.damage()
        before = _entries(place)
        outcome = forked(work, said)
        outcome.left = sorted(_entries(place) - before)
        return outcome


def _entries(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*") if "__pycache__" not in path.parts}


def faults(outcome: Outcome, baseline: int) -> list[str]:
    """What is wrong with an outcome."""
    from regrow.cli.boundary import BUG, ENVIRONMENT, EXIT_CODES, USAGE

    lines = [line for line in outcome.said.splitlines() if line.startswith("regrow: ")]
    if "running code: os:abort (named on the command line)" in outcome.said:
        return []  # which is what was asked for
    wrong = []
    if "Traceback (most recent call last)" in outcome.said:
        wrong.append("traceback")
    if outcome.code not in EXIT_CODES or outcome.code == BUG:
        wrong.append(f"exit code {outcome.code}")
    if outcome.seconds > SECONDS or outcome.asleep > SECONDS:
        wrong.append(f"hang ({outcome.seconds:.0f} s, {outcome.asleep:.0f} s asleep)")
    if outcome.peak - baseline > BYTES:
        wrong.append(f"memory ({(outcome.peak - baseline) / 2**30:.1f} GiB)")
    if outcome.code and len(lines) != 1:
        wrong.append(f"{len(lines)} lines of error")
    if any(_CONTROL.search(line) for line in lines):
        wrong.append("control characters")
    if outcome.code in (USAGE, ENVIRONMENT) and outcome.left:
        wrong.append(f"left {', '.join(outcome.left[:3])}")
    return wrong


def message(outcome: Outcome) -> str:
    """The message without values: what is the same for inputs of one kind."""
    line = next((line for line in outcome.said.splitlines() if line.startswith("regrow: ")), "")
    line = re.sub(r"/\S*/(malformed|regrow)-\w+", "PLACE", line.removeprefix("regrow: "))
    line = re.sub(r"(['\"`]).*?\1", "'…'", re.sub(r"x{20,}", "xx…", line))
    return re.sub(r"\d[\d,.e+]*", "N", line)[:200]


LOADED = (
    "accelerate", "filecmp", "gguf", "jinja2", "matplotlib.pyplot", "onnx", "sklearn.datasets",
    "tokenizers.implementations", "torch", "torchvision.models", "toys", "transformers",
    "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama", "regrow.cli.app",
    "regrow.jobs.export", "regrow.exporters.gguf", "regrow.exporters.onnx", "regrow.exporters.transformers",
    "regrow.reports", "regrow.jobs.evaluate", "regrow.jobs.learn", "regrow.jobs.prune",
    "regrow.jobs.recover", "regrow.jobs.search",
)  # fmt: skip
"""What is imported once, before anything is forked."""


def make(source: Path) -> None:
    """Make all inputs in a child, so that this process keeps as it is."""
    from regrow.cli import run_command

    with chdir(source):
        outcome = forked(lambda: prepare(run_command), source / "said.txt", 600.0)
    if outcome.code:
        sys.exit(outcome.said)


def try_some(every: list[Input], numbers: list[int], source: Path, out: Path, loud: bool) -> None:
    """Try some of the inputs; a row for each is added to the output as it comes."""
    from regrow.cli import run_command

    said = source / "said.txt"
    baseline = forked(lambda: run_command(["methods"]), said).peak
    for number in numbers:
        malformed = every[number]
        outcome = tried(malformed, source, said)
        wrong = faults(outcome, baseline)
        row = {"number": number, "words": " ".join(malformed.words)[:200], "file": malformed.file}
        row |= {"how": malformed.how, "draw": malformed.draw}
        row |= {"code": outcome.code, "message": message(outcome), "cpu_seconds": round(outcome.seconds, 2)}
        row |= {"seconds_asleep": round(outcome.asleep, 2), "resident_bytes": outcome.peak}
        add(out, row | {"faults": wrong})
        if loud or wrong:
            print(number, wrong, row["words"], "|", malformed.file, malformed.how)
            print("    ", outcome.said[-3000 if loud else -400 :].strip().replace("\n", "\n     "), flush=True)


def show(results: list[Row], messages: bool) -> None:
    """Say what came of the inputs."""
    codes = Counter(row["code"] for row in results)
    wrong = Counter(fault.split(" (")[0] for row in results for fault in row["faults"])
    print(f"{len(results)} inputs, exit codes {dict(sorted(codes.items()))}, faults {dict(wrong)}")
    most = {name: max(row[name] for row in results) for name in ("cpu_seconds", "seconds_asleep", "resident_bytes")}
    print(", ".join(f"most {name} {value:,}" for name, value in most.items()))
    counts = Counter(row["message"] for row in results if row["message"])
    print(f"{len(counts)} distinct messages")
    for text, many in counts.most_common() if messages else ():
        print(f"{many:4}  {text}")


def run(args: Namespace, source: Path) -> None:
    """Try what has no row yet."""
    every = inputs(args.count, args.seed) + (forbidden() if args.permissions else [])
    make(source)
    if args.case:
        args.out = source / "cases.jsonl"
    done = {row["number"] for row in read(args.out)}
    for module in LOADED:
        importlib.import_module(module)
    left = [number for number in args.case or range(len(every)) if number not in done]
    try_some(every, left, source, args.out.resolve(), bool(args.case))


def main() -> None:
    """Try them, and say what came of it."""
    args = arguments(__doc__, OUT, count=620, seed=0, permissions=True, case=[int], messages=False)
    with tempfile.TemporaryDirectory(prefix="inputs-") as name:
        if not args.show:
            run(args, Path(name).resolve())
        rows = read(args.out)
    show(rows, args.messages)
    sys.exit(any(row["faults"] for row in rows))


if __name__ == "__main__":
    main()
