"""What a run says about the first and last blocks, where a method measures whether they are pruned."""

import json

from regrow.scoring import spaces


def test_the_losses_of_all_allocations_are_in_the_plan_and_the_report(
    regrow, tiny_language_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(spaces, "OUTER_BLOCKS", (0.5, 0.0))
    words = ("--method", "fisher", "--set", "allocation=measured", "--only", "mlp", "--keep", "0.9")
    text = ("--source", "news", "--tokens", "512", "--seq-len", "64", "--eval-tokens", "128", "--out", "run")
    code, _, error = regrow("prune", str(tiny_language_model), *words, *text)
    assert code == 0, error
    (plan,) = json.loads((tmp_path / "run" / "ledger.json").read_text("utf-8"))["plans"]
    (note,) = plan["origin"]["notes"]
    assert note.startswith("the allocation with the lowest loss before any refit was taken: ")
    assert note in (tmp_path / "run" / "report.html").read_text("utf-8")
