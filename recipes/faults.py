"""What every command does when the world around it fails; the table is in ``docs/reproductions/reliability.md``.

    python recipes/faults.py                             everything; the full disk needs root, to mount a small one
    python recipes/faults.py --only "full disk" --case learn
    python recipes/faults.py --sample 5 --seed 1         so many moments per command
    python recipes/faults.py --show                      the table of what is committed

* ``two processes``: while a command is stopped at a file operation, the same command is started once more.
* ``read-only``: the folder around the result, or the earlier result, may not be written by the user.
* ``full disk``: from a write on, no byte is left on the disk.
* ``no space``: the same, but it is only the command that is told so; needs no root.
* ``read-only system``: every change of a file is refused, as on a file system that is mounted read-only.
* ``folder deleted``: at a file operation, the result's folder is deleted with all that is in it.
* ``clock set back``: a killed run has files and dates of tomorrow when it goes on.
* ``Ctrl-C``: SIGINT at a random moment.

Each trial: the command meets the fault and ends; then the fault is gone and the same command runs again. An earlier
result must be readable in between, and be the old or the new one; at the end everything must be as if nothing had
happened, and no other file may be there (``crashes/places.py``). A failure is one line, and no traceback.
"""

import errno
import os
import random
import re
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from crashes.cases import CASES
from crashes.places import Place, contents, differences, place_of, workplace
from crashes.supervised import BEFORE, Outcome
from harness import Row, add, arguments, rows, table, today

OUT = Path(__file__).parent / "results" / "faults.jsonl"
NOBODY, DISK = 65534, 64
DATE = re.compile(rb"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d")


def two_processes(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """The same command twice at once: one of both is refused in one line, the other one is not disturbed."""
    for index in _drawn(draw, len(first.operations), many):
        place.reset()
        second: list[Outcome] = []

        def start(operation: Any, when: str, _: int, index: int = index, second: list[Outcome] = second) -> bool:
            if (operation.index, when) == (index, BEFORE):
                second.append(place.go())
            return False

        went = place.go(watched=True, act=start)
        codes = sorted([went.code, *(outcome.code for outcome in second)])
        refused = next((outcome for outcome in [*second, went] if outcome.code), None)
        faults = _spoken(refused) if refused else []
        faults += differences(place.whole, contents(place.root)) + [f"stale {page}" for page in place.stale_pages()]
        if codes[0] or (refused and codes[1] not in (2, 4)):
            faults.append(f"exit codes {codes}")
        yield _row(str(first.operations[index]), refused or went, faults)


def read_only(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """Without the right to write: nothing is changed, and that is said in one line."""
    targets = {"the folder around it": place.root / "at"}
    if (place.folder / "first" / "at" / place.case.result).exists():
        targets["the earlier result"] = place.result
    for what, target in targets.items():
        place.reset()
        before = contents(place.root)
        for path in [place.root / "at", *place.root.rglob("*")] if os.geteuid() == 0 else []:
            os.chown(path, NOBODY, NOBODY)
        modes = {path: path.stat().st_mode for path in [target, *target.rglob("*")] if not path.is_symlink()}
        for path in modes:
            path.chmod(path.stat().st_mode & ~0o222)
        went = place.go(user=NOBODY if os.geteuid() == 0 else 0)
        faults = [f"changed: {what}" for what in differences(before, contents(place.root))] if went.code else []
        faults += _spoken(went) if went.code else []
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)
        after, again = place.faults()
        yield _row(what, went, faults + after, again)


def full_disk(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """No byte is left from a write on: an earlier result stays, and with some space the command goes on."""
    writes = _named(first, "write", "open", "mkdir", "truncate")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(place.root)], check=True)
    filler = place.root / "filler"
    try:
        for index in _drawn(draw, writes, many):
            place.reset()
            went = place.go(watched=True, act=_at(index, lambda: _fill(filler)))
            filler.unlink(missing_ok=True)
            faults = _spoken(went) if went.code else []
            after, again = place.faults()
            yield _row(str(first.operations[index]), went, faults + after, again)
    finally:
        subprocess.run(["umount", str(place.root)], check=True)


def no_space(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """From a write on, every write and every new folder fails for lack of space."""
    for index in _drawn(draw, _named(first, "write", "mkdir"), many):
        yield _told_no(place, first, index, errno.ENOSPC, ("write", "mkdir"))


def read_only_system(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """No file can be changed from the beginning on."""
    yield _told_no(place, first, 0, errno.EROFS, tuple({operation.name for operation in first.operations}))


def _told_no(place: Place, first: Outcome, index: int, number: int, names: tuple[str, ...]) -> Row:
    """Have file operations of some names fail from one on."""

    def refused(operation: Any, when: str, _: int) -> OSError | None:
        fails = operation.index >= index and when == BEFORE and operation.name in names
        return OSError(number, "") if fails else None

    place.reset()
    went = place.go(watched=True, act=refused)
    faults = _spoken(went) if went.code else ["exit code 0"]
    if "nothing was changed" in went.text:  # what was finished before is there
        faults.append("says that nothing was changed")
    after, again = place.faults()
    return _row(str(first.operations[index]), went, faults + after, again)


def folder_deleted(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """The result's folder vanishes at a file operation."""
    for index in _drawn(draw, len(first.operations), many):
        place.reset()
        went = place.go(watched=True, act=_at(index, lambda: _delete(place.result)))
        faults = _spoken(went) if went.code else []
        if place.case.prepare and not place.result.exists() and place.old:
            place.reset()  # what the command begins with is gone, too
        after, again = place.faults(excused=True)
        yield _row(str(first.operations[index]), went, faults + after, again)


def clock_back(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """A run was killed tomorrow, and goes on today: nothing may go by the time of files, or by dates in them."""
    for index in _drawn(draw, len(first.operations), many):
        place.reset()
        went = place.go(watched=True, act=lambda op, when, _, index=index: (op.index, when) == (index, BEFORE))
        for path in [*(place.root / "at").rglob("*")]:
            if path.suffix == ".json" and path.is_file():
                path.write_bytes(DATE.sub(_tomorrow, path.read_bytes()))
            os.utime(path, (time.time() + 86400,) * 2, follow_symlinks=False)
        for page in place.stale_pages():  # it tells the dates
            shutil.copy(place.folder / "again.html", place.root / page)
        after, again = place.faults()
        yield _row(str(first.operations[index]), went, after, again)


def ctrl_c(place: Place, first: Outcome, draw: random.Random, many: int) -> Iterator[Row]:
    """SIGINT after a random share of the processor time that the command takes."""
    place.reset()
    began = os.times().children_user
    place.go()
    whole = os.times().children_user - began
    for _ in range(many):
        share = draw.uniform(0.02, 1.0)
        place.reset()
        went = place.go(interrupt=share * whole)
        faults = _spoken(went) if went.code else []
        if went.code not in (0, 130):
            faults.append(f"exit code {went.code}")
        after, again = place.faults()
        yield _row(f"{share:.2f} of {whole:.1f} s", went, faults + after, again)


FAULTS = {
    "two processes": two_processes,
    "read-only": read_only,
    "full disk": full_disk,
    "no space": no_space,
    "read-only system": read_only_system,
    "folder deleted": folder_deleted,
    "clock set back": clock_back,
    "Ctrl-C": ctrl_c,
}


def _drawn(draw: random.Random, among: Any, many: int) -> list[int]:
    """Some of all operations, or all if there are no more."""
    every = list(range(among)) if isinstance(among, int) else among
    return sorted(draw.sample(every, min(many, len(every))))


def _named(outcome: Outcome, *names: str) -> list[int]:
    """Which operations have one of these names."""
    return [operation.index for operation in outcome.operations if operation.name in names]


def _at(index: int, does: Any) -> Any:
    """What does something before one file operation."""

    def act(operation: Any, when: str, _: int) -> bool:
        if (operation.index, when) == (index, BEFORE):
            does()
        return False

    return act


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _tomorrow(date: re.Match[bytes]) -> bytes:
    return (datetime.fromisoformat(date[0].decode()) + timedelta(days=1)).isoformat().encode()


def _spoken(outcome: Outcome) -> list[str]:
    """What is wrong with what a failing command said: it is one line, which names regrow, and no traceback."""
    lines = [line for line in outcome.text.splitlines() if re.match(r"regrow: |\w+Error: |KeyboardInterrupt$", line)]
    if "Traceback" in outcome.text or outcome.code == 70:
        return [f"traceback or bug: {outcome.last[:200]}"]
    return [] if len(lines) == 1 and lines[0] == outcome.last else [f"not one line: {outcome.text[-300:]}"]


def _row(at: str, outcome: Outcome, faults: list[str], again: Outcome | None = None) -> Row:
    said = re.sub(r"/\S*/(?=\w)", "", outcome.last)[:200] if outcome.code > 0 else ""
    return {"at": at, "code": outcome.code, "said": said, "again": again and again.code, "faults": faults}


def trials(args: Namespace, work: Path) -> None:
    """Run the trials and add a row for each; what is in the output is not done again."""
    done = Counter((row["fault"], row["case"]) for row in rows(args.out))
    for name in args.case:
        place = first = None
        for fault in args.only:
            if done[fault, name]:
                continue
            if place is None:
                place = place_of(name, work)
                first = place.prepare()
            draw = random.Random(f"{args.seed} {name} {fault}")
            results = list(FAULTS[fault](place, first, draw, args.interrupts if fault == "Ctrl-C" else args.sample))
            for row in results:
                add(args.out, {"fault": fault, "case": name, **row}, day=today())
                if row["faults"]:
                    print(f"  {fault}, {name}, {row['at']}: {row['code']} {row['said']}: {row['faults'][:4]}")
            faulty = sum(bool(row["faults"]) for row in results)
            print(f"{fault}, {name}: {len(results)} trials, {faulty} faults", flush=True)


def show(results: list[Row]) -> Iterator[list[object]]:
    """What came of each fault."""
    for fault in FAULTS:
        mine = [row for row in results if row["fault"] == fault]
        codes = ", ".join(f"{code}: {many}" for code, many in sorted(Counter(row["code"] for row in mine).items()))
        yield [fault, len({row["case"] for row in mine}), len(mine), codes, sum(bool(row["faults"]) for row in mine)]


def main() -> None:
    """Run the chosen faults, or print the table of earlier ones."""
    args = arguments(__doc__, OUT, only=(*FAULTS,), case=(*CASES,), sample=6, interrupts=20, seed=0)
    if not args.show:
        with workplace() as work:
            trials(args, work)
    results = rows(args.out)
    print("\n".join(table(("fault", "commands", "trials", "exit codes", "wrong"), show(results))))
    sys.exit(any(row["faults"] for row in results))


if __name__ == "__main__":
    main()
