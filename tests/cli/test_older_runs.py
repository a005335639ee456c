"""Run folders that earlier versions left behind are still read, and half-finished ones still come to their end.

The folders and what made them: ``tests/fixtures/make_runs.py``.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fixtures.make_runs import RUNS
from regrow import load as load_folder
from regrow.amounts import Measure
from regrow.commands.prune_settings import budget_of, read_pruning_settings
from regrow.reports import summarise
from regrow.run_folder import RunFolder
from regrow.settings.renamed import SETTINGS
from regrow.store.atomic import LEFTOVER
from regrow.store.metrics import KEYS

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = [(version.name, name) for version in sorted(FIXTURES.glob("[0-9]*")) for name in RUNS]
RENAMED = [
    (name, old, new)
    for name in ("search", "learn")
    for old, new in SETTINGS.get({"search": "mgas", "learn": "sparsegrow"}[name], {}).items()
]
CLOCK = {"seconds", "started", "finished"}
"""Fields that tell the time."""


def load(folder):
    """The network of a run folder."""
    from toys import classifier

    mine = json.loads((folder / "shapes.json").read_text())["origin"]["kind"] == "callable"
    return load_folder(folder, model=classifier if mine else None)


def rows(folder):
    """What a run measured, without the time it took."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in RunFolder.open(folder).metrics()]


def identity(row):
    """What tells a row from the others."""
    return row["what"], *(row.get(name) for name in KEYS.get(row["what"], ()))


def alike(one, other):
    """Whether JSON data are equal, but for the last digits of numbers."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(alike, one, other))
    return one == (pytest.approx(other, rel=1e-3, abs=1e-5) if isinstance(other, float) else other)


@pytest.fixture
def folders(tmp_path, regrow):
    """A copy of the fixtures of a version, where commands run."""

    def copied(version):
        shutil.copytree(FIXTURES / version, tmp_path, dirs_exist_ok=True)
        return tmp_path

    return copied


@pytest.mark.parametrize(("version", "name"), FOLDERS)
def test_a_finished_run_of_an_earlier_version_is_read(version, name, folders):
    folder = folders(version) / name
    assert load(folder) is not None
    assert summarise([folder])
    assert rows(folder)


def test_what_keep_counted_in_0_1_is_called_weights(folders):
    here = folders("0.1")
    for name in ("prune", "gprune"):
        settings = read_pruning_settings(RunFolder.open(here / name).run()["settings"], "toys:classifier")
        assert (settings.keep, settings.measure, settings.target) == (0.6, "weights", "")
        assert budget_of(settings).measure == Measure.WEIGHTS
    assert RunFolder.open(here / "recover").run()["settings"]["pruning"]["measure"] == "weights"
    (page,) = summarise([here / "prune"])["runs"]
    assert page["measure"] == "weights" and {"name": "measure", "value": "weights"} in page["settings"]


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_renamed_settings_of_an_earlier_version_have_their_present_names(name, old, new, folders, regrow):
    here = folders("0.1")
    written = json.loads((here / name / "run.json").read_text())["defaults"]
    read = RunFolder.open(here / name).run()["defaults"]
    assert read[new] == written[old] and old not in read and new not in written
    (run,) = summarise([here / name])["runs"]
    assert {new, old} & {pair["name"] for pair in run["defaults"]} == {new}
    # A command that names the old setting is that of the same run, and a note names the new one.
    command, _ = RUNS[name]
    settings = {"--set", f"{old}={json.dumps(written[old])}"}
    code, _, errors = regrow(*command.split(), *sorted(settings), "--out", name)
    assert code == 2 and f"note: the setting {old} is now called {new}" in errors
    assert "method_settings was" in errors, "another run, since this one took the default"
    code, _, errors = regrow(*command.split(), *sorted(settings), "--set", f"{new}=1", "--out", name)
    assert code == 2 and f"{old} is the old name of {new}, and both are given; drop {old}" in errors


@pytest.mark.slow
@pytest.mark.parametrize(("version", "name"), FOLDERS)
def test_a_half_finished_run_of_an_earlier_version_comes_to_its_end(version, name, folders, regrow):
    here = folders(version)
    command, _ = RUNS[name]
    mine = ["--code", "toys:classifier"] if name == "recover" else []
    code, _, errors = regrow(*command.split(), *mine, "--out", f"{name}-unfinished")
    assert code == 0, errors
    whole, resumed = here / name, here / f"{name}-unfinished"
    expected, found = load(whole).state_dict(), load(resumed).state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)  # another processor adds in another order
    assert [identity(row) for row in rows(resumed)] == [identity(row) for row in rows(whole)]
    for before, after in zip(rows(whole), rows(resumed), strict=True):
        shared = (before.keys() & after.keys()) - {"measure"}  # which has another name now
        if name == "search" and before["what"] == "front":
            shared -= {"accuracy"}  # of networks whose BatchNorms are measured again since
        assert alike({name: before[name] for name in shared}, {name: after[name] for name in shared}), before["what"]
    assert not [path for path in resumed.rglob(".*") if path.name == ".work" or LEFTOVER.fullmatch(path.name)]
