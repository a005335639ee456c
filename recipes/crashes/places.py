"""A folder in which a case runs again and again from the same beginning, and what lies in it, without the clock."""

import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from crashes.cases import CASES, Case, Step, digest_by, page_again, work
from crashes.supervised import Act, Outcome, run, steady, usable

CLOCK = {
    "started": "run.json: when the run began",
    "finished": "run.json: when it ended",
    "seconds": "run.json, metrics.jsonl and the state of unfinished work: how long something took",
}
"""Fields that tell the time, wherever they stand in JSON data: only these may differ."""
LOADED = (
    "accelerate", "jinja2", "matplotlib.backends.backend_svg", "sklearn.datasets", "tokenizers.implementations",
    "torchvision.models", "transformers.models.llama.modeling_llama", "transformers.models.llama.tokenization_llama",
    "regrow.cli.app", "regrow.reports.page", "regrow.jobs.learn", "regrow.jobs.prune",
)  # fmt: skip
"""What is imported once, before anything is forked."""
Contents = Mapping[str, str]
"""Path → digest of a file, without the clock; folders end in ``/``."""


@contextmanager
def workplace(parent: Path | None = None) -> Iterator[Path]:
    """Make a folder for cases, in memory unless said, in which other users may work, too."""
    if why := usable():
        sys.exit(why)
    with TemporaryDirectory(dir=parent or ("/dev/shm" if Path("/dev/shm").is_dir() else None)) as name:
        work, home = Path(name), Path(name, "hf")
        work.chmod(0o755)
        home.mkdir()
        home.chmod(0o777)
        os.environ |= {"HF_HOME": str(home), "TMPDIR": name}
        yield work


def place_of(case: str, work: Path, *, exchange: bool = True) -> "Place":
    """The place of a case, by the name of the case."""
    return Place(CASES[case], work / re.sub(r"\W+", "-", case), exchange)


@dataclass
class Place:
    """Where a case runs.

    Args:
        case: The case.
        folder: Its folder: ``root/at``, where it runs; ``root/in``, what it reads; ``first``, how both begin.
        exchange: Whether the file system can exchange two names; if not, only regrow need read at every moment.
        old: Reader → what it finds before the command; empty if there is no result yet.
        new: The same after it.
        before: What lies there before the command.
        whole: The same after it.
    """

    case: Case
    folder: Path
    exchange: bool = True
    old: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    before: Contents = field(default_factory=dict)
    whole: Contents = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that is watched and compared."""
        return self.folder / "root"

    @property
    def result(self) -> Path:
        """The file or folder that the command makes."""
        return self.root / "at" / self.case.result

    def prepare(self) -> Outcome:
        """Make what the case begins with, run it undisturbed twice, and note what it makes.

        Returns:
            How the first of both runs went, with its file operations.

        Raises:
            RuntimeError: If a step fails, or both runs do not make the same.
        """
        _import(LOADED)
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("at", "in"):
            (self.root / name).mkdir(parents=True)
        for step in self.case.prepare:
            self._expect(self.go(step))
        shutil.copytree(self.root, self.folder / "first", symlinks=True)
        self.before = contents(self.root)
        self.old = self.readings() if self.result.exists() else {}
        first = self._expect(self.go(watched=True))
        self.whole, self.new = contents(self.root), self.readings()
        self.reset()
        self._expect(self.go())
        if odd := differences(self.whole, contents(self.root)):
            raise RuntimeError(f"two undisturbed runs differ: {odd[:5]}")
        if odd := self.stale_pages():
            raise RuntimeError(f"a page does not tell what its folder holds: {odd}")
        return first

    def reset(self, kept: str = "first") -> None:
        """Go back to the beginning, or to what was kept."""
        for path in self.root.iterdir():
            shutil.rmtree(path)
        shutil.copytree(self.folder / kept, self.root, symlinks=True, dirs_exist_ok=True)

    def keep(self) -> None:
        """Keep what lies there now as ``kept``."""
        shutil.rmtree(self.folder / "kept", ignore_errors=True)
        shutil.copytree(self.root, self.folder / "kept", symlinks=True)

    def go(
        self,
        step: Step | None = None,
        *,
        watched: bool = False,
        act: Act | None = None,
        user: int = 0,
        interrupt: float = 0.0,
    ) -> Outcome:
        """Run the command, or another step, in a child process; as another user, or with Ctrl-C at some time."""
        does, modules = work(self.case.command if step is None else step), self.folder / "modules"

        def child() -> None:
            if user:
                os.setgid(user)
                os.setuid(user)
            try:
                does()
            finally:
                if not user and not interrupt:
                    modules.write_text(json.dumps(list(sys.modules)))

        watch = self.root if watched else None
        text = self.folder / ("text-watched" if watched else "text")  # both may run at once
        more = {"exchange": self.exchange, "interrupt": interrupt}
        outcome = run(child, self.root / "at", text, root=watch, act=act, **more)
        if modules.is_file():
            _import(json.loads(modules.read_text()))
            modules.unlink()
        return outcome

    def readings(self) -> dict[str, str]:
        """What each reader finds in the result now."""
        readers = [reader for reader in self.case.read if self.exchange or reader == "regrow"]
        if not readers:
            return {}
        found = self.folder / "readings"

        def child() -> None:
            found.write_text(json.dumps({reader: digest_by(reader, self.result) for reader in readers}))

        outcome = run(child, self.folder, self.folder / "text")
        if outcome.code:
            return dict.fromkeys(readers, f"unreadable: {outcome.last[:160]}")
        return dict(json.loads(found.read_text()))

    def stale_pages(self) -> list[str]:
        """Pages of runs that are not what their folder's page is when it is rendered anew."""
        page, again = self.result / "report.html", self.folder / "again.html"
        if not page.is_file():
            return []
        again.unlink(missing_ok=True)
        run(lambda: page_again(self.result, again), self.folder, self.folder / "text")
        same = again.is_file() and again.read_bytes() == page.read_bytes()
        return [] if same else [str(page.relative_to(self.root))]

    def faults(self, *, excused: bool = False) -> tuple[list[str], Outcome]:
        """What is wrong after a command was broken off: at once, and once the same command has been run again.

        Args:
            excused: Whether an earlier result may be gone, since that is what was done to it.

        Returns:
            What is wrong, and how the second run went.
        """
        self.keep()
        found = [] if excused else [f"at once: {what}" for what in [*self.unreadable(), *self.mixed()]]
        self.reset("kept")  # loading may complete or revert what was under way; running again must do so, too
        there = contents(self.root)
        complete = not differences(_of(self.whole, self.case.result), _of(there, self.case.result))
        again = self.go()
        found += differences(self.whole, contents(self.root))
        found += [f"stale {page}" for page in self.stale_pages()]
        if again.code and not (complete and not found and again.code == 2):  # it may say that all is done
            found.append(f"run again: exit code {again.code}: {again.last[:200]}")
        return found, again

    def unreadable(self) -> list[str]:
        """Readers that find neither the old nor the new result now; before a first one, they may find none."""
        faults = []
        for reader, found in self.readings().items():
            none_yet = not self.old and found.startswith("unreadable: ")
            if found not in (self.old.get(reader), self.new[reader]) and not none_yet:
                faults.append(f"{reader}: {found if found.startswith('unreadable') else 'neither old nor new'}")
        return faults

    def mixed(self) -> list[str]:
        """Files of an earlier result that are visibly neither all old nor all new now."""
        if not _of(self.before, self.case.result):
            return []
        now = _of(contents(self.root), self.case.result)
        odd = [differences(_of(known, self.case.result), now) for known in (self.before, self.whole)]
        return min(odd, key=len)

    def _expect(self, outcome: Outcome) -> Outcome:
        if outcome.code:
            raise RuntimeError(f"exit code {outcome.code}: {outcome.text[-2000:]}")
        return outcome


def contents(folder: Path) -> Contents:
    """What lies in a folder: path → digest without the clock."""
    there = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            there[name] = f"link to {path.readlink()}"
        elif path.is_dir():
            there[f"{name}/"] = ""
        else:
            there[name] = hashlib.sha256(_without_clock(path)).hexdigest()[:16]
    return there


def state(there: Contents) -> str:
    """A digest of everything in a place; random parts of names do not count."""
    entries = sorted((steady(name), digest) for name, digest in there.items())
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:12]


def differences(expected: Contents, there: Contents) -> list[str]:
    """What is missing, different, or there beside what is expected."""
    faults = [f"missing {name}" for name in expected if name not in there]
    faults += [f"different {name}" for name in expected if name in there and there[name] != expected[name]]
    return faults + [f"left over {steady(name)}" for name in there if name not in expected]


def _of(there: Contents, result: str) -> Contents:
    """Those of the entries that a reader of the result sees."""
    place = f"at/{result}"
    return {
        name: digest
        for name, digest in there.items()
        if (name == place or name.startswith(f"{place}/"))
        and not any(part.startswith(".") for part in Path(name).parts)
    }


def _without_clock(path: Path) -> bytes:
    data = path.read_bytes()
    try:
        match path.suffix:
            case ".json":
                return _plain(json.loads(data))
            case ".jsonl":
                return b"\n".join(_plain(json.loads(line)) for line in data.splitlines())
            case ".safetensors" | ".st":
                size = struct.unpack("<Q", data[:8])[0]
                return _plain(json.loads(data[8 : 8 + size])) + data[8 + size :]
            case ".html" if (path.parent / "run.json").exists():
                return b"page" if data.rstrip().endswith(b"</html>") else data
    except (ValueError, struct.error):
        pass
    return data


def _plain(value: Any) -> bytes:
    return json.dumps(_masked(value), sort_keys=True).encode()


def _masked(value: Any) -> Any:
    match value:
        case dict():
            return {name: _hidden(one) if name in CLOCK else _masked(one) for name, one in value.items()}
        case list():
            return [_masked(one) for one in value]
        case str() if value[:1] in "{[":  # JSON inside the header of a tensor file
            try:
                return _masked(json.loads(value))
            except ValueError:
                return value
    return value


def _hidden(value: Any) -> Any:
    """What remains of a field that tells the time: whether it is there."""
    match value:
        case dict():
            return {name: _hidden(one) for name, one in value.items()}
        case None:
            return None
    return "clock"


def _import(names: Iterable[str]) -> None:
    """Import what a child had to import, so that the next need not."""
    for name in names:
        if name not in sys.modules and not name.startswith(("transformers_modules", "__")):
            try:
                import_module(name)
            except Exception:
                continue
