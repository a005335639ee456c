"""Records in files are read strictly: an error names file, field, value and remedy, in one line."""

import ast
import json
import shutil
from pathlib import Path

import msgspec
import pytest

from regrow.jobs.pruning_inputs import read_pruning_settings
from regrow.store import StoreError, schemas
from regrow.store import convert as convert_module
from regrow.store.convert import convert, read_json
from regrow.store.ledger import Ledger
from regrow.store.run_folder import RunFolder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(FIXTURES / "prune", tmp_path / "run"))


def edited(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["settings"].update(keep="0.5"), ("float", "keep`")),
        (lambda d: d["settings"].update(seed=True), ("int", "seed`")),
        (lambda d: d["settings"].update(sources="digits"), ("array", "sources`")),
        (lambda d: d["settings"].update(sources=[{}]), ("str", "sources[0]`")),
        (lambda d: d["settings"].update(builder="pwned:boom"), ("'builder' is unknown", "version of regrow")),
        (
            lambda d: d.update(versions=["x"]),
            ("run.json: Expected `object`, got `array`", "restore it"),
        ),
        (
            lambda d: d.update(seconds={"load": "long"}),
            ("run.json: Expected `float`", "$.seconds[...]", "restore it"),
        ),
        (lambda d: d.update(notes=[1]), ("Expected `str`, got `int` - at `$.notes[0]`",)),
        (
            lambda d: d.update(format="regrow-run/9"),
            ("regrow-run/9, this version of regrow reads regrow-run/2", "run it again"),
        ),
    ],
)
def test_run_json(run, change, words):
    edited(run / "run.json", change)
    with pytest.raises(StoreError) as caught:
        read_pruning_settings(RunFolder.open(run).read_record()["settings"], "toys:classifier")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), caught.value


def change_of(data):
    return next(iter(data["plans"][0]["changes"].values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: change_of(d).update(size=3.5), ("int", "size`")),
        (lambda d: change_of(d)["keep"].append("1"), ("int", "keep[")),
        (lambda d: change_of(d)["slots"][0].update(role="runs"), ("enum value 'runs'", "slots[0].role`")),
        (lambda d: change_of(d).update(call="pwned:boom"), ("unknown field `call`",)),
        (
            lambda d: d["plans"][0].update(drop={"a": {"a": {"gives": "code", "takes": 0}}}),
            ("enum value 'code'", "gives`"),
        ),
        (lambda d: d["plans"][0].update(means={"w": {"0": None}}), ("Expected `float`, got `null`",)),
        (lambda d: d.update(code="pwned:boom"), ("unknown field `code`",)),
        (lambda d: d.update(plans={}), ("Expected `array`, got `object` - at `$.plans`",)),
    ],
)
def test_ledger(run, change, words):
    edited(run / "ledger.json", change)
    with pytest.raises(StoreError) as caught:
        Ledger(run / "ledger.json").plans()
    line = str(caught.value)
    assert all(word in line for word in (*words, "ledger.json", "restore")) and "\n" not in line, line


def test_depth_and_rows(run):
    (run / "ledger.json").write_text('{"format": "regrow-ledger/2", "plans": [' + "[" * 2000 + "]" * 2000 + "]}")
    with pytest.raises(StoreError, match="nested deeper than 100 levels"):
        Ledger(run / "ledger.json").plans()
    path = run / "metrics.jsonl"
    path.write_text('{"what": 3}\n' + path.read_text())
    with pytest.raises(StoreError, match=r"metrics\.jsonl: line 1 is not a measurement"):
        RunFolder.open(run).metrics()


@pytest.mark.parametrize("module", [schemas, convert_module])
def test_records_know_nothing_of_torch(module):
    tree = ast.parse(Path(module.__file__).read_text())
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    # These know nothing of torch, either.
    known = {
        "regrow.core",
        "regrow.core.errors",
        "regrow.core.limits",
        "regrow.store.errors",
    }
    assert names <= {"math", "re", "collections.abc", "itertools", "pathlib", "typing", "msgspec"} | known


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("axes", lambda d: d["before"][0].update(size="12"), ("Expected `int`, got `str` - at `$.before[0].size`",)),
        ("axes", lambda d: d["after"][1].update(call="os:abort"), ("unknown field `call`",)),
        ("axes", lambda d: d.pop("after"), ("missing required field `after`",)),
    ],
)
def test_records_that_inform(tmp_path, name, change, words):
    path = Path(shutil.copytree(FIXTURES / "gprune", tmp_path / "run")) / f"{name}.json"
    assert convert(read_json(path), schemas.AxisRows, path)
    edited(path, change)
    with pytest.raises(StoreError) as caught:
        convert(read_json(path), schemas.AxisRows, path)
    line = str(caught.value)
    assert all(word in line for word in (*words, f"{name}.json", "restore it")) and "\n" not in line, line


@pytest.mark.parametrize(
    "data", [{"a - at `$.b[...][...]`": 1, "b": {"c": "d"}}, {"b": {"a - at `$[...]": []}}, {"b": "[...]"}]
)
def test_names_that_look_like_places_are_named_as_they_are(data: dict) -> None:
    class Strict(msgspec.Struct, forbid_unknown_fields=True):
        b: dict[str, dict[str, float]] = {}

    with pytest.raises(StoreError, match="restore it"):
        convert(data, Strict, "x.json")
