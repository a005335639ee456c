"""Plans in ledgers: units in intervals come back as they were, and a short file does not stand for very many."""

import json
import random

import pytest
import torch
from torch import nn

from regrow import Plan, trace
from regrow.store.convert import expand_plans, from_intervals, to_intervals
from regrow.store.errors import StoreError
from regrow.store.ledger import Ledger


def plans_of(width):
    """A plan that grows, one that cuts, and one that brings units back, of one network."""
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    axes = trace(net, torch.ones(1, 4))
    keep = sorted(random.Random(0).sample(range(width), width // 2))
    return [Plan.growing(axes, {"0.weight:0": 3}), Plan.keeping(axes, {"0.weight:0": keep}), Plan(origin={"why": []})]


def written(folder, plans):
    ledger = Ledger(folder / "ledger.json")
    for plan in plans:
        ledger.append(plan)
    return ledger


@pytest.mark.parametrize("seed", range(20))
def test_numbers_come_back(seed):
    drawn = random.Random(seed)
    numbers = [n for n in range(drawn.randrange(200)) if drawn.random() < seed / 20] + drawn.sample(range(99), 9)
    short = to_intervals(numbers)
    assert from_intervals(json.loads(json.dumps(short))) == numbers
    assert len(json.dumps(short)) <= len(json.dumps(numbers))


def test_plans_come_back(tmp_path):
    plans = plans_of(30)
    ledger = written(tmp_path, plans)
    assert list(ledger.plans()) == plans
    ledger.truncate(1)
    assert list(ledger.plans()) == plans[:1]


def test_a_plan_takes_as_much_room_for_a_wide_layer(tmp_path):
    sizes = []
    for width in (200, 900):
        (folder := tmp_path / str(width)).mkdir()
        sizes.append(written(folder, plans_of(width)[:1]).path.stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("interval", [[5, 2], [-1, 3], [0, 1, 2], [0], ["0", 3], [0, 2.0], [True, 4], [[0, 3]], {}])
def test_what_is_no_interval_is_refused(tmp_path, interval):
    path = written(tmp_path, plans_of(30)[:1]).path
    path.write_text(path.read_text().replace("[0, 29]", json.dumps(interval)))
    with pytest.raises(StoreError, match="plan 1 cannot be used"):
        Ledger(path).plans()


def test_a_short_file_does_not_stand_for_very_many_units(tmp_path):
    path = written(tmp_path, plans_of(30)[:1]).path
    path.write_text(path.read_text().replace("[0, 29]", "[0, 9223372036854775806]"))
    with pytest.raises(StoreError, match="which is no plan of a network") as caught:
        Ledger(path).plans()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_ledger_of_another_version_is_refused(tmp_path):
    path = written(tmp_path, plans_of(30)[:1]).path
    path.write_text(path.read_text().replace("regrow-ledger/2", "regrow-ledger/1"))
    says = "has the format regrow-ledger/1, this version of regrow reads regrow-ledger/2"
    with pytest.raises(StoreError, match=says):
        Ledger(path).plans()


def test_what_is_no_plan_stays_as_it_is():
    odd = [1, None, {}, {"changes": []}, {"changes": {"a": 3}}, {"changes": {"a": {"keep": "ab"}}}]
    assert expand_plans(odd, 100) == odd
