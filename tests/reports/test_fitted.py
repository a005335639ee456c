"""What was measured per layer, why so much of it was cut, and what least squares recovered: seen and unseen apart."""

import json

import pytest

from regrow.reports import findings, summarise, to_html, to_markdown, words
from regrow.reports.summary import read_summary
from reports.folders import KINDS, LAYERS, write_run

FITS = [
    {"weight": f"model.layers.{i}.mlp.down_proj.weight", "before": 0.4, "after": 0.3, "seen": 0.2, "ridge": 1.0}
    | {"shrinkage": 0.9}
    for i in range(LAYERS)
]


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def reconstructed(tmp_path):
    """A run whose cut was measured, then reconstructed: half of the loss on code is recovered."""
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    after = {row["source"]: row for row in rows if row["what"] == "perplexity" and row["model"] == "pruned"}
    before = {row["source"]: row for row in rows if row["what"] == "perplexity" and row["model"] == "dense"}
    for source, row in after.items():
        rows.append({**row, "model": "cut", "ppl": row["ppl"] ** 2 / before[source]["ppl"]})
    rows.append(
        {"what": "reconstruction", "tokens": 8192, "choose_on": "left_out_source", "layers": FITS, "seconds": 1.0}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_what_a_reconstruction_recovered_is_shown_for_seen_and_unseen_text(reconstructed):
    summary, run = summarise([reconstructed]), read_summary([reconstructed]).runs[0]
    assert run.outcome == "Reconstructed"
    assert [row.recovered for row in run.perplexity] == pytest.approx([0.5] * len(KINDS))
    assert [run.means[which].recovered for which in ("seen", "unseen")] == pytest.approx([0.5, 0.5])
    shares = [words.fitted_share(run.reconstruction.layers, name) for name in ("after", "seen")]
    assert shares == pytest.approx([0.25, 0.5]) and len(run.reconstruction.layers) == LAYERS
    page, text = to_html(summary), to_markdown(summary)
    for said in ("Loss recovered", "left-out sources went from 0.400 to 0.300", "fitted sources went from 0.400 to"):
        assert said in page and said in text
    assert "50.0\N{NO-BREAK SPACE}% on text domains not seen in calibration" in text
    assert "(25.0\N{NO-BREAK SPACE}% less)" in page


def test_what_layers_were_fitted_to_is_said(reconstructed):
    path, own, dense = reconstructed / "metrics.jsonl", "as it is after the cut", "in the network before the cut"
    for target, said, unsaid in (("own", own, dense), ("dense", dense, own)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "target": target}) + "\n" for row in rows))
        page = to_html(summarise([reconstructed]))
        assert said in page and unsaid not in page


def test_a_recovery_after_a_reconstruction_has_a_column_of_its_own(reconstructed):
    path = reconstructed / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows += [{**row, "model": "recovered"} for row in rows if row.get("model") == "dense" and "ppl" in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_summary([reconstructed]).runs[0]
    row = run.perplexity[0]
    assert run.outcome == "Recovered" and row.recovered == pytest.approx(1)
    assert row.ppl("before") == row.ppl("after") < row.ppl("fitted") < row.ppl("cut")
    heads = next(line for line in to_markdown(summarise([reconstructed])).splitlines() if "| Before |" in line)
    assert [one.strip() for one in heads.strip("|").split("|")][2:6] == ["Before", "Cut", "Reconstructed", "Recovered"]


def test_a_start_that_learning_did_not_improve_is_said(tmp_path):
    folder = write_run(tmp_path / "run", "gprune")
    edit(folder / "findings.json", lambda found: found.update(history=[], starts={"base": 0.6, "inner": 0.5}))
    edit(folder / "run.json", lambda run: run["settings"].update(only=["mlp"]))
    summary = summarise([folder])
    for text in (to_html(summary), to_markdown(summary)):
        assert "not better on held-out text than its best start, inner (the same fraction" in text
        assert "only mlp" in text


@pytest.mark.parametrize(
    ("settings", "line", "reason", "metric"),
    [
        ({"allocation": "ranked"}, "of the standardised scores", "scores below the common threshold", "wifv"),
        ({"allocation": "ranked"}, "loss per removed weight", "scores below the common threshold", "fisher/cost"),
        ({"allocation": "uniform"}, "Every candidate loses the same fraction", "the same fraction as others", "wifv"),
        (
            {"allocation": "measured"},
            "compared by the loss of the cut",
            "as the allocation with the lowest loss",
            "fisher",
        ),
        ({"allocation": "uniform", "spare_first": 0.125}, "outside the first and last blocks", "left whole", "wifv"),
    ],
)
def test_how_much_of_each_layer_is_cut_is_explained(tmp_path, settings, line, reason, metric):
    folder = write_run(tmp_path / "run")
    edit(folder / "run.json", lambda run: run.update(defaults=settings))
    edit(folder / "axes.json", lambda axes: axes["before"][0].update(key="other:0"))
    edit(folder / "scores.json", lambda scores: scores.update(metric=metric))
    run = read_summary([folder]).runs[0]
    reasons = {*findings.explain_widths(run).values()}
    assert line in findings.describe_allocation(run)[0] and {reason, "not a candidate"} <= reasons
