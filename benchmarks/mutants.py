"""What the tests notice: 60 wrong versions of the source, each with one slip, and the tests that should fail for it.

    python benchmarks/mutants.py --clean                       # do the tests pass without a slip?
    python benchmarks/mutants.py                               # every mutant that has no row yet
    python benchmarks/mutants.py --full --jobs 2               # the whole suite for those that survived
    python benchmarks/mutants.py --only budget-ceil --again    # one of them once more
    python benchmarks/mutants.py --state after                 # all of them on a changed source
    python benchmarks/mutants.py --show                        # the table, in Markdown

A mutant is killed if a test fails. The list is ``mutants.json``: the names and what goes wrong for a user stay; if code
moves, the file, the snippets and the tests of a mutant move with it (``tests/test_mutants.py`` notices). Each mutant is
run in a copy of the files that git knows: first the doctests of its file, then what ``make test`` runs of the tests of
the list, up to the first failure. Random tests draw the same examples each time. ``--full`` runs every test but the
rules of style, which would kill a mutant for its form.

``--limit`` are the seconds of one mutant, after which it counts as killed, and ``--jobs`` the processes of ``--full``.
Rows are added to ``results/mutants.jsonl`` as they come; a later one replaces an earlier one of the same state.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from shared import Row, add, arguments, last_line, rows, table

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.json")
ROWS = Path(__file__).parent / "results" / "mutants.jsonl"
PACKAGE = Path("src", "regrow")
NO_BEHAVIOUR = ("tests/test_house.py", "tests/test_mutants.py")
"""Tests that read the source as text."""
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Mutant:
    """A slip in the source.

    Args:
        name: A short name.
        behaviour: What goes wrong for a user.
        file: The file that has the slip, below the package.
        old: The right code, which occurs once in the file.
        new: The wrong code.
        tests: Files and folders of tests that cover it, the fastest first.
    """

    name: str
    behaviour: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def mutated(self, root: Path) -> str:
        """The text of the file with the slip; ValueError if the right code does not occur once, or the wrong is none.

        Args:
            root: The checkout.
        """
        text = (root / PACKAGE / self.file).read_text("utf-8")
        if (many := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: the old snippet occurs {many} times in {self.file}; correct {LIST.name}")
        wrong = text.replace(self.old, self.new)
        if ast.dump(ast.parse(wrong)) == ast.dump(ast.parse(text)):
            raise ValueError(f"{self.name}: the new snippet changes nothing; correct {LIST.name}")
        return wrong


def read_mutants() -> list[Mutant]:
    """All mutants, in the order of the list."""
    records = json.loads(LIST.read_text("utf-8"))
    return [Mutant(**record | {"tests": tuple(record["tests"])}) for record in records]


def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each state and mutant."""
    return {(row["state"], row["name"]): row for row in rows(path)}


def git(*words: str) -> str:
    """What git says about the checkout."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()


def copy_checkout(folder: Path) -> None:
    """Copy the files that git knows, and new ones that it does not ignore."""
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def run_tests(folder: Path, words: Sequence[str], seconds: float) -> Row:
    """Run pytest in a copy of the checkout up to the first failure; return the verdict, what failed, and the time."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1", "CI": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = f"stopped after {seconds:g} s"
        finally:  # with the processes that tests have started
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    first = FAILED.search(said)
    failed = first[1] if first else late
    row: Row = {"verdict": "killed" if failed else "survived", "failed": failed}
    if not failed and process.returncode:
        row = {"verdict": "error", "failed": f"pytest ended with {process.returncode}: {last_line(said)}"}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def run_mutant(mutant: Mutant, full: bool, jobs: int, seconds: float) -> Row:
    """Run the tests on a copy of the checkout that has the slip."""
    words = ["--tier", "usual", (PACKAGE / mutant.file).as_posix(), *mutant.tests]
    if full:
        words = [f"--ignore={name}" for name in NO_BEHAVIOUR]
        words += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    try:
        wrong = mutant.mutated(ROOT)
    except (ValueError, OSError) as error:
        return {"verdict": "error", "failed": str(error), "seconds": 0.0}
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as folder:
        copy_checkout(Path(folder))
        (Path(folder) / PACKAGE / mutant.file).write_text(wrong, "utf-8")
        return run_tests(Path(folder), words, seconds)


def run_clean(mutants: Iterable[Mutant], seconds: float) -> Row:
    """Run the tests of all these mutants on a copy of the checkout as it is."""
    words = {name: None for mutant in mutants for name in ((PACKAGE / mutant.file).as_posix(), *mutant.tests)}
    with tempfile.TemporaryDirectory(prefix="clean-", ignore_cleanup_errors=True) as folder:
        copy_checkout(Path(folder))
        return run_tests(Path(folder), ["--tier", "usual", *sorted(words)], seconds)


def commit() -> str:
    """The commit of the checkout, and whether its source or tests have changed since."""
    changed = git("status", "--porcelain", "--", "src", "tests")
    return git("log", "-1", "--format=%h") + (" with changes" if changed else "")


def left_to_run(mutants: Iterable[Mutant], known: dict[tuple[str, str], Row], options: Any) -> list[Mutant]:
    """The mutants without a row; with ``--full``, those that survived the tests of the list."""
    never = {"verdict": "", "full": False}
    found = {mutant: known.get((options.state, mutant.name), never) for mutant in mutants}
    if options.full:
        return [m for m, row in found.items() if row["verdict"] == "survived" and (options.again or not row["full"])]
    return [m for m, row in found.items() if options.again or row["verdict"] in ("", "error")]


def show(mutants: Sequence[Mutant], known: dict[tuple[str, str], Row]) -> None:
    """Print the table of all states, and what it comes to."""
    states = list(dict.fromkeys(state for state, _ in known))

    def line(mutant: Mutant) -> list[str]:
        found = [known.get((state, mutant.name)) for state in states]
        cells = [row["verdict"] + " (whole suite)" * row["full"] if row else "" for row in found]
        failed = next((row["failed"] for row in reversed(found) if row and row["failed"]), "")
        return [f"`{mutant.name}`", mutant.behaviour, *cells, failed and f"`{failed}`"]

    print("\n".join(table(["mutant", "what goes wrong", *states, "first test that fails"], map(line, mutants))))
    killed: dict[str, set[str]] = {}
    for state in states:
        verdicts = {m.name: known[state, m.name]["verdict"] for m in mutants if (state, m.name) in known}
        many = Counter(verdicts.values())
        counts = f"{many['killed']} of {len(verdicts)} killed, {many['survived']} survived"
        print(f"\n{state}: {counts}, {many['error']} could not be run")
        killed[state] = {name for name, verdict in verdicts.items() if verdict == "killed"}
        for earlier in states[: states.index(state)]:
            if lost := sorted((killed[earlier] & verdicts.keys()) - killed[state]):
                print(f"killed {earlier} and not {state}: {', '.join(lost)}")


def main() -> None:
    """Run mutants and add their rows, or print the table."""
    which = {"only": [str], "state": "before", "again": False}
    how = {"full": False, "jobs": 1, "limit": 10_800.0, "clean": False, "show": False}
    options, mutants, known = arguments(__doc__, **which, **how), read_mutants(), read_rows(ROWS)
    if options.only:
        if unknown := set(options.only) - {mutant.name for mutant in mutants}:
            raise SystemExit(f"no mutant is called {', '.join(sorted(unknown))}")
        mutants = [mutant for mutant in mutants if mutant.name in options.only]
    if options.show:
        show(mutants, known)
        return
    if options.clean:
        row = run_clean(mutants, options.limit)
        print(row["failed"] or "all pass", f"({row['seconds']} s)")
        sys.exit(row["verdict"] != "survived")
    for mutant in left_to_run(mutants, known, options):
        done = run_mutant(mutant, options.full, options.jobs, options.limit)
        state = {"name": mutant.name, "state": options.state}
        row = add(ROWS, state | done | {"full": options.full, "commit": commit()})
        print(f"{mutant.name}: {row['verdict']} {row['failed']} ({row['seconds']} s)", flush=True)


if __name__ == "__main__":
    main()
