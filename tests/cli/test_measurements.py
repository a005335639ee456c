"""Measurements that are damaged or gone are told before a run goes on with them, with file, line and field."""

import json
import shutil
from pathlib import Path

import pytest

from cli.conftest import Run
from regrow.store.errors import StoreError
from regrow.store.metrics import ROW_KINDS, Metrics, MetricsRow

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs"
LEARN = ("learn", "permuted:digits:1", "--model", "mlp:8", "--epochs", "1", "--train", "64", "--test", "32")
TASK = {"what": "task", "name": "a", "task": 0, "accuracy": [0.5], "parameters": 9}


def unfinished(folder: Path) -> Path:
    """A finished run as it lay in its working area right before its end."""
    data = json.loads((folder / "run.json").read_text())
    del data["finished"]
    (folder / ".work").mkdir()
    for one in folder.iterdir():
        if one.name != ".work":
            one.rename(folder / ".work" / one.name)
    (folder / ".work" / "run.json").write_text(json.dumps(data))
    return folder / ".work"


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unfinished learning run of one task that is over."""
    from regrow.jobs.learn import Settings, learn_named
    from regrow.jobs.recording import Invocation

    out = tmp_path_factory.mktemp("learned") / "learned"
    learn_named(Settings(("permuted:digits:1",), model="mlp:8", epochs=1, train=64, test=32), Invocation(out))
    unfinished(out)
    return out


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (None, "holds 0 of the 1 tasks that are over; restore it"),
        ([], "holds 0 of the 1 tasks that are over; restore it"),
        ([{"what": "task"}], "line 1: Object missing required field `name`; restore it or delete that line"),
        ([TASK | {"accuracy": []}], "line 1: Expected `array` of length >= 1 - at `$.accuracy`"),
        ([TASK | {"accuracy": [1e999]}], "line 1: Expected `float` <= 1.0 - at `$.accuracy[0]`"),
        ([TASK | {"task": 7}], "line 1: Field `accuracy` has 1 entries at task 7"),
        ([TASK, TASK], "row 2 of the kind 'task' is of task 0, not 1; restore it"),
    ],
)
def test_a_learning_run_does_not_go_on_with_damaged_measurements(
    regrow: Run, learned: Path, tmp_path: Path, rows: list[dict[str, object]] | None, says: str
) -> None:
    shutil.copytree(learned, tmp_path / "learned")
    metrics = tmp_path / "learned" / ".work" / "metrics.jsonl"
    metrics.unlink()
    if rows is not None:
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = contents(tmp_path / "learned")
    for words in (("learn", "--resume", "learned", "--task", "permuted:digits:2"), (*LEARN, "--out", "learned")):
        code, _, err = regrow(*words)
        line = err.splitlines()[-1]
        assert code == 2 and "metrics.jsonl" in line and says in line, err
        assert contents(tmp_path / "learned") == before


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"what": "choice"}, "line 1: Object missing required field `model`"),
        ({"what": "size", "model": "dense"}, "line 1: Object missing required field `params_all`"),
        (
            {"what": "verify", "max_abs_diff": "x", "bound": 1},
            "line 1: Expected `float | null`, got `str`",
        ),
    ],
)
def test_a_pruning_run_does_not_go_on_with_damaged_measurements(
    regrow: Run, tmp_path: Path, row: dict[str, object], says: str
) -> None:
    run = tmp_path / "run"
    begun = Path(shutil.copytree(FIXTURES / "prune", run / ".work"))
    record = json.loads((begun / "run.json").read_text())
    del record["finished"]
    (begun / "run.json").write_text(json.dumps(record))
    words = record["command"].split()[1:-1]
    (begun / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    before = contents(run)
    code, _, err = regrow(*words, "run")
    assert code == 2 and f"run/.work/metrics.jsonl: {says}" in err, err
    assert contents(run) == before


@pytest.mark.parametrize(
    "folder", [path.parent for path in sorted(FIXTURES.glob("*/metrics.jsonl"))], ids=lambda p: p.name
)
def test_measurements_of_runs_hold_what_is_needed(folder: Path) -> None:
    assert Metrics(folder / "metrics.jsonl").rows()


@pytest.mark.parametrize("kind", [kind for kind, (schema, _) in ROW_KINDS.items() if schema is not MetricsRow])
def test_every_kind_is_checked(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"what": "other", "x": 1}) + "\n" + json.dumps({"what": kind}) + "\n")
    with pytest.raises(StoreError, match="line 2: Object missing required field"):
        Metrics(path).rows()
