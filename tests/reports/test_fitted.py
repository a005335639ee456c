"""What least squares recovered: seen and unseen text apart."""

import json

import pytest

from regrow.reports import summarise, to_html, to_markdown, words
from reports.folders import KINDS, LAYERS, write_run

FITS = [
    {"weight": f"model.layers.{i}.mlp.down_proj.weight", "before": 0.4, "after": 0.3, "seen": 0.2, "ridge": 1.0}
    | {"shrinkage": 0.9}
    for i in range(LAYERS)
]


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
    summary, run = summarise([reconstructed]), summarise([reconstructed]).runs[0]
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
    run = summarise([reconstructed]).runs[0]
    row = run.perplexity[0]
    assert run.outcome == "Recovered" and row.recovered == pytest.approx(1)
    assert row.ppl("before") == row.ppl("after") < row.ppl("fitted") < row.ppl("cut")
    heads = next(line for line in to_markdown(summarise([reconstructed])).splitlines() if "| Before |" in line)
    assert [one.strip() for one in heads.strip("|").split("|")][2:6] == ["Before", "Cut", "Reconstructed", "Recovered"]
