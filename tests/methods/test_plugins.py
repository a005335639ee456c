"""The method of docs/add-a-method.md: one file in an external package, no change to the core, and all laws run."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import regrow
from regrow.methods import TABLES, MethodKind
from regrow.testing import LAWS, check_method
from regrow.training.learner import PLAIN

PAGE = (Path(__file__).parents[2] / "docs" / "add-a-method.md").read_text("utf-8")
PRUNER, SEARCH, CODE = (part.partition("```")[0] for part in PAGE.split("```python\n")[1:])
META = {
    "METADATA": "Metadata-Version: 2.1\nName: regrow-anchored\nVersion: 1.0\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "entry_points.txt": "[regrow.methods]\nanchored = anchored:ANCHORED\nbroken = nowhere:BROKEN\n",
    "RECORD": "",
}
LEARN = ["learn", "permuted:digits:2", "--model", "mlp:8", "--epochs", "1", "--train", "64", "--test", "32"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the package."""
    folder = tmp_path_factory.mktemp("anchored")
    wheel = folder / "regrow_anchored-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("anchored.py", CODE)
        for name, text in META.items():
            archive.writestr(f"regrow_anchored-1.0.dist-info/{name}", text)
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    return site


def python(*words: str, site: Path | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(regrow.__file__).parents[1]), *([str(site)] if site else [])]
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )


def commands(*calls: list[str], site: Path | None, cwd: Path) -> tuple[list[int], str, str]:
    """Run commands of regrow one after the other in one fresh process; return their exit codes, output and errors."""
    code = "import json, sys; from regrow.cli import run_command; print([*map(run_command, json.loads(sys.argv[1]))])"
    done = python("-c", code, json.dumps(calls), site=site, cwd=cwd)
    assert done.returncode == 0, done.stderr
    output, _, codes = done.stdout.rstrip().rpartition("\n")
    return json.loads(codes), output, done.stderr


def test_an_installed_method_is_listed_explained_and_run(installed: Path, tmp_path: Path) -> None:
    calls = ["methods"], ["methods", "anchored"], [*LEARN, "--method", "anchored", "--out", "run"]
    codes, output, errors = commands(*calls, site=installed, cwd=tmp_path)
    assert codes == [0, 0, 0], errors
    assert "anchored " in output and "broken" not in output, errors
    assert "--set strength=0.01" in output and "The strength of the pull" in output
    codes, _, errors = commands(["learn", "--resume", "run", "--task", "digits"], site=installed, cwd=tmp_path)
    assert codes == [0], errors


def test_every_law_runs_on_an_installed_method(installed: Path, tmp_path: Path) -> None:
    check = "from regrow.testing import LAWS, check_method; print(check_method('anchored') == tuple(LAWS['continual']))"
    found = python("-c", check, site=installed, cwd=tmp_path)
    assert found.stdout.strip() == "True", found.stderr


def test_the_pruning_method_of_the_page_obeys_the_laws_and_prunes(tmp_path: Path) -> None:
    (tmp_path / "largest.py").write_text(PRUNER)
    check = "from regrow.testing import check_method; print(len(check_method('largest:LARGEST')))"
    found = python("-c", check, site=None, cwd=tmp_path)
    assert found.stdout.strip() == str(len(LAWS[MethodKind.PRUNING])), found.stderr
    code = "from regrow.cli import main; raise SystemExit(main())"
    words = ["prune", "resnet18", "--method", "largest:LARGEST", "--keep", "0.9", "--dry-run", "plan.json"]
    run = python("-c", code, *words, site=None, cwd=tmp_path)
    assert run.returncode == 0 and (tmp_path / "plan.json").is_file(), run.stderr


def test_the_search_method_of_the_page_obeys_the_laws_and_searches(tmp_path: Path) -> None:
    (tmp_path / "smallest.py").write_text(SEARCH)
    check = "from regrow.testing import check_method; print(len(check_method('smallest:SMALLEST')))"
    found = python("-c", check, site=None, cwd=tmp_path)
    assert found.stdout.strip() == str(len(LAWS[MethodKind.SEARCH])), found.stderr
    code = "from regrow.cli import main; raise SystemExit(main())"
    words = ["search", "cells:4-2-1", "--data", "digits", "--method", "smallest:SMALLEST", "--target", "params=40%"]
    words += ["--epochs", "1", "--retrain", "0", "--train", "96", "--test", "50", "--out", "run"]
    run = python("-c", code, *words, site=None, cwd=tmp_path)
    assert run.returncode == 0 and (tmp_path / "run" / "report.html").is_file(), run.stderr


def test_a_law_that_is_broken_is_named() -> None:
    def forgetful(settings: Any) -> Any:
        return replace(PLAIN, state=[])

    with pytest.raises(AssertionError, match=r"^a learner and its state are frozen records: the state is a list"):
        check_method(replace(TABLES[MethodKind.CONTINUAL]["naive"], build=forgetful))


def test_a_method_of_a_users_own_code_is_named_on_the_command_line_alone(tmp_path: Path) -> None:
    """A name of code in a run folder is never imported."""
    (tmp_path / "mine.py").write_text(CODE)
    code = "from regrow.cli import main; raise SystemExit(main())"
    run = python("-c", code, *LEARN, "--method", "mine:ANCHORED", "--out", "run", site=None, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (tmp_path / "mine.py").write_text("raise SystemExit('code named in a file has run')")
    refused = python("-c", code, "learn", "--resume", "run", "--task", "digits", site=None, cwd=tmp_path)
    assert refused.returncode == 2 and "a name in a file is never imported" in refused.stderr
    refused = python("-c", code, "learn", "--config", "run", "--out", "other", site=None, cwd=tmp_path)
    assert refused.returncode == 2 and "only the command line names code" in refused.stderr, refused.stderr
    for name, told in (("mine:NONE", "NONE"), ("os:path", "not a regrow.methods.MethodEntry"), ("toi", "did you mean")):
        (tmp_path / "mine.py").write_text(CODE)
        refused = python("-c", code, *LEARN, "--method", name, "--out", "third", site=None, cwd=tmp_path)
        assert refused.returncode == 2 and (told in refused.stderr or name == "toi"), refused.stderr
