"""Settings of the command line have precedence over those of an earlier run."""

import pytest

from regrow.core.errors import InputError
from regrow.settings import prune, search
from regrow.settings.words import build_settings, format_command_line


def test_a_size_is_recorded_in_one_way() -> None:
    target = prune.Settings("m", target="params=70%")
    assert prune.Settings("m", smaller=0.3) == target
    assert (target.keep, target.smaller) == (None, None)
    assert format_command_line(target) == "regrow prune m --target params=70%"
    assert search.Settings("cells:4-2-1", "digits", smaller=0.8).target == "params=20%"
    with pytest.raises(InputError, match="--smaller must be between 0 and 1, got 30; for example --smaller 30%"):
        prune.Settings("m", smaller=30)
    with pytest.raises(InputError, match="--target: a target is like"):
        search.Settings("cells:4-2-1", "digits", "half")


def test_the_command_line_counts() -> None:
    recorded = {
        "model": "m",
        "method": "flap",
        "keep": 0.5,
        "target": "",
        "method_settings": {"a": 1, "b": 2},
        "seed": 3,
    }
    built = build_settings(prune.Settings, {"target": "bytes=2M", "method_settings": {"b": 4}}, recorded)
    assert built == prune.Settings("m", "flap", target="bytes=2M", method_settings={"a": 1, "b": 4}, seed=3)
    assert build_settings(prune.Settings, {"seed": 4}, recorded).keep == 0.5
    with pytest.raises(InputError, match=r"say how much stays, by one of --keep 0\.8, --target .* or --smaller 30%"):
        build_settings(prune.Settings, {"model": "m"}, {})
    with pytest.raises(InputError, match="say how much stays"):
        build_settings(prune.Settings, {"keep": 0.5, "target": "bytes=2M"}, recorded)
    with pytest.raises(InputError, match="MODEL is missing; for example `regrow prune smollm2-135m"):
        build_settings(prune.Settings, {"keep": 0.5}, {})
