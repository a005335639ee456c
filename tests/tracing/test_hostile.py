"""Hostile networks: a sample of the recipe, whose masking is written by hand and shares nothing with ``verify``."""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"
SAMPLE = 40


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The recipe, in float64."""
    monkeypatch.syspath_prepend(str(RECIPES))
    torch.set_default_dtype(torch.float64)
    yield importlib.import_module("hostile_networks")
    torch.set_default_dtype(torch.float32)


def test_a_sample_is_cut_exactly_or_refused_in_one_line(recipe: Any) -> None:
    """Families and variants by a seed; together the seeds of a few months would see all of them."""
    families = Random(24).sample(sorted(recipe.FAMILIES), SAMPLE)
    found = [recipe.examine(name, lambda name=name: recipe.own(name)) for name in (f"{one}#1" for one in families)]
    bad = [row for row in found if row["outcome"] not in ("ok", "refused", "nothing to cut")]
    assert not bad
    assert sum(row["outcome"] == "ok" for row in found) >= SAMPLE // 2, "what is refused is not compared"


def test_the_masking_by_hand_notices_a_wrong_cut(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where surgery keeps other rows of one weight than planned."""
    from regrow.surgery import apply, compensate

    whole = compensate.resize

    def wrong(name: str, tensor: torch.Tensor, *given: Any) -> torch.Tensor:
        cut = whole(name, tensor, *given)
        return cut.roll(1, 0) if name == "up.weight" and cut.shape != tensor.shape else cut

    monkeypatch.setattr(compensate, "resize", wrong)
    monkeypatch.setattr(sys.modules[apply.__module__], "check_blocks", lambda change: None)  # which refuses it
    row = recipe.examine("control/batch_decides#0", lambda: recipe.own("control/batch_decides#0"))
    assert row["outcome"] == "wrong"


def test_the_committed_results_are_of_every_network_and_none_is_wrong() -> None:
    found = [json.loads(line) for line in (RECIPES / "results" / "hostile_networks.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in found} <= {"ok", "refused", "nothing to cut"}
    assert max(row["largest"] for row in found) < 1e-9
    cut = Counter(row["network"].partition("/")[0] for row in found if row["outcome"] == "ok")
    assert cut["peft"] >= 10 and cut["timm"] >= 95 and cut.total() - cut["peft"] - cut["timm"] >= 300
    assert len({row["network"] for row in found}) == len(found)
