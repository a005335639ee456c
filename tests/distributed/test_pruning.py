"""``regrow prune`` in several processes: the files are those of a single one, byte for byte."""

import json

import pytest

from distributed.processes import finish, start

COMMAND = ("--keep", "0.7", "--source", "news", "--source", "code", "--tokens", "160", "--eval-tokens", "96")
"""Five calibration windows and three for evaluation: ranks get unequal shares."""
STREAMED = "from regrow.streaming import requirements; requirements.WHOLE = 1e9; from regrow.cli import main; main()"
FILES = ("ledger.json", "model.safetensors", "shapes.json", "axes.json", "scores.json", "probe.st", "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("memory", [(), ("--memory", "64GiB")], ids=["whole", "streamed"])
def test_two_processes_write_the_files_of_one(regrow, tiny_language_model, tmp_path, monkeypatch, memory):
    words = ("prune", str(tiny_language_model), *COMMAND, "--seq-len", "32", *memory)
    starting = (
        "from regrow.streaming import requirements; requirements.WHOLE = 1e9; from regrow.cli import main; main()"
    )
    two = start("-c", starting, *words, "--out", "two", cwd=tmp_path)
    if memory:
        monkeypatch.setattr("regrow.streaming.requirements.WHOLE", 1e9)
    assert regrow(*words, "--out", "one")[0] == 0
    (said, errors, code), (silence, complaints, other) = finish(two)
    assert (code, other) == (0, 0), errors + complaints
    assert "model and page are in two" in said
    assert not silence and not complaints
    assert {path.name for path in (tmp_path / "one").iterdir()} == {path.name for path in (tmp_path / "two").iterdir()}
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    runs = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert runs[0]["settings"] == runs[1]["settings"]
