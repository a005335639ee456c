"""Old names of settings are read, and both names of one setting at once are refused."""

from dataclasses import fields

import pytest

from regrow.errors import InputError
from regrow.methods import TABLES
from regrow.run_folder import RunFolder
from regrow.settings.learn import Settings as LearnSettings
from regrow.settings.renamed import SETTINGS, rename_recorded
from regrow.settings.search import Settings as SearchSettings
from regrow.settings.words import build_settings
from regrow.store.errors import StoreError

ENTRIES = {name: entry for table in TABLES.values() for name, entry in table.items()}


@pytest.mark.parametrize("method", SETTINGS)
def test_present_names_are_fields_and_old_ones_are_not(method: str) -> None:
    entry = ENTRIES[method]
    names = {one.name for one in fields(entry.settings)}
    assert entry.renamed == SETTINGS[method]
    assert {*SETTINGS[method].values()} <= names and not names & {*SETTINGS[method]}
    assert len({*SETTINGS[method].values()}) == len(SETTINGS[method])


@pytest.mark.parametrize("method", SETTINGS)
def test_a_method_is_built_by_old_names_as_by_present_ones(method: str) -> None:
    entry = ENTRIES[method]
    defaults = {one.name: one.default for one in fields(entry.settings)}
    for old, new in SETTINGS[method].items():
        assert new not in entry.defaults({old}) and new in entry.defaults({"target"})
        entry.made(method, {old: defaults[new]})
        with pytest.raises(InputError, match=f"{old} is the old name of {new}, and both are given; drop {old}"):
            entry.made(method, {old: defaults[new], new: defaults[new]})


def test_settings_from_the_command_line_get_present_names(caplog: pytest.LogCaptureFixture) -> None:
    given = {"space": "cells:4-2-1", "data": "digits", "target": "0.2", "method_settings": {"press": 0.1, "warm": 1}}
    settings = build_settings(SearchSettings, given, {})
    assert settings.method_settings == {"sparsity_penalty": 0.1, "warm": 1}, "mgas is the default method"
    assert "note: the setting press is now called sparsity_penalty" in caplog.text
    given = {"tasks": ("split:digits:2",), "method": "naive", "method_settings": {"press": 1}}
    assert build_settings(LearnSettings, given, {}).method_settings == {"press": 1}, "of another method"


def test_a_run_that_was_begun_by_old_names_is_resumed_by_either(tmp_path):  # type: ignore[no-untyped-def]
    def identity(own, defaults):  # type: ignore[no-untyped-def]
        return {"verb": "search", "settings": {"method": "mgas", "method_settings": own}, "defaults": defaults}

    old = identity({"press": 0.1}, {"floor": 1.0})
    with RunFolder.create(tmp_path / "run", **old):
        pass
    for own, defaults in (({"press": 0.1}, {"floor": 1.0}), ({"sparsity_penalty": 0.1}, {"min_cost": 1.0})):
        assert RunFolder.check(tmp_path / "run", **identity(own, defaults))
    with pytest.raises(StoreError, match=r"min_cost was 1\.0"):
        RunFolder.check(tmp_path / "run", **identity({"press": 0.1}, {"min_cost": 0.5}))


def test_a_recovery_has_the_present_names_of_the_run_before() -> None:
    inner = {"method": "mgas", "method_settings": {"pace": 1.0}}
    assert rename_recorded({"settings": {"by": "lora", "pruning": inner}})["settings"]["pruning"] == {
        "method": "mgas",
        "method_settings": {"filter_lr_ratio": 1.0},
    }
