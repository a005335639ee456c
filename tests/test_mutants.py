"""The mutants of ``benchmarks/mutants.json`` are slips in the source as it is now; this runs none of them."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def mutants(monkeypatch):
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mutants", module)
    spec.loader.exec_module(module)
    return module


def test_each_slip_fits_its_file_once_and_can_be_parsed(mutants):
    for mutant in mutants.read_mutants():
        mutant.mutated(ROOT)


def test_each_has_a_name_of_its_own_and_tests(mutants):
    listed = mutants.read_mutants()
    assert len({mutant.name for mutant in listed}) == len(listed) == 60
    assert not [name for mutant in listed for name in mutant.tests if not (ROOT / name).exists()]
    assert all(mutant.tests and mutant.behaviour.endswith(".") for mutant in listed)


def test_a_snippet_that_is_gone_is_named(mutants):
    mutant = mutants.Mutant("gone", "Nothing.", "core/budget.py", "no such code", "", ())
    with pytest.raises(ValueError, match="gone: the old snippet occurs 0 times"):
        mutant.mutated(ROOT)
    mutant = mutants.Mutant("idle", "Nothing.", "core/budget.py", "floor(self.keep", "floor( self.keep", ())
    with pytest.raises(ValueError, match="idle: the new snippet changes nothing"):
        mutant.mutated(ROOT)


def test_survivors_alone_run_the_whole_suite_and_rows_are_not_run_again(mutants, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        '{"name": "a", "state": "before", "verdict": "survived", "full": false}\n'
        '{"name": "b", "state": "before", "verdict": "survived", "full": false}\n'
        '{"name": "b", "state": "before", "verdict": "killed", "full": true}\n'
    )
    listed = [mutants.Mutant(name, "Nothing.", "core/budget.py", "", "", ()) for name in "abc"]

    def left(**given):
        options = Namespace(**{"state": "before", "full": False, "again": False} | given)
        return [mutant.name for mutant in mutants.left_to_run(listed, mutants.read_rows(rows), options)]

    assert left() == ["c"]
    assert left(state="after") == left(again=True) == ["a", "b", "c"]
    assert left(full=True) == ["a"]
