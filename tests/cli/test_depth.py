"""``prune --method depth``: the run names what it dropped, is recovered and exported."""

from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from regrow.jobs import memory_needs
from regrow.jobs.models import ModelSpec, load_model
from regrow.store.run_folder import RunFolder

DATA = ("--source", "news", "--source", "code", "--tokens", "128", "--eval-tokens", "64", "--seq-len", "32")
DEPTH = ("--method", "depth", "--set", "unit=block", "--set", "fill=none", "--keep", "0.6")


def test_a_run_without_a_block_is_recovered_and_exported(
    regrow: Run, tiny_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = regrow("prune", str(tiny_language_model), *DEPTH, *DATA, "--out", "run")
    assert code == 0 and "removed 9.8" in out, err  # of all parameters, embeddings too
    (note,) = (one for one in RunFolder.open("run").read_record()["notes"] if "dropped whole" in one)
    assert note == "modules dropped whole: 1 of 1 (model.layers.1); 50.00 % of weights stays"
    code, _, err = regrow("recover", "run", "--by", "refit", "--out", "run2")
    assert code == 0, err
    with monkeypatch.context() as patch:
        patch.setattr(memory_needs, "SPARE_BYTES", 2**40)
        code, _, err = regrow("recover", "run", "--by", "refit", "--memory", "64GiB", "--out", "run3")
    said = " ".join(err.split())
    assert code == 2 and "the run dropped whole modules" in said and "give more memory" in said
    code, _, err = regrow("export", "run", "--to", "transformers", "--out", "plain")
    assert code == 0, err
    ids = torch.arange(12)[None]
    with torch.no_grad():
        small, plain = (load_model(ModelSpec(name)).model(input_ids=ids).logits for name in ("run2", "plain"))
    assert torch.equal(small, plain)
