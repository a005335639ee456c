"""``prune --reconstruct`` on a language model: left-out sources, attention, the model loaded again."""

from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from regrow.evaluation import perplexity
from regrow.jobs.inputs import read_sources
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.pruning_inputs import make_source_specs, read_pruning_settings
from regrow.store.run_folder import RunFolder

DATA = ("--source", "news", "--source", "code", "--tokens", "256", "--eval-tokens", "64", "--seq-len", "32")
WORDS = ("--method", "wanda_sp", "--reconstruct")


def test_layers_are_fitted_on_left_out_sources(regrow: Run, tiny_language_model: Path) -> None:
    command = ("prune", str(tiny_language_model), "--keep", "0.6", *WORDS, *DATA, "--out", "run")
    code, out, err = regrow(*command)
    assert code == 0, err
    assert out.count("fitted by least squares on 496 tokens") == 1
    assert "Before Cut Reconstructed" in " ".join(out.split())
    folder = RunFolder.open("run")
    rows = folder.metrics()
    (row,) = (row for row in rows if row["what"] == "reconstruction")
    nll = {(one["model"], one["source"]): one["nll"] for one in rows if one["what"] == "perplexity"}
    assert {model for model, _ in nll} == {"dense", "cut", "pruned"}
    assert "Reconstructed</th>" in (folder.path / "report.html").read_text(encoding="utf-8")
    layers = {layer["weight"].split(".", 2)[2]: layer for layer in row["layers"]}
    assert {"0.self_attn.o_proj.weight", "1.mlp.down_proj.weight"} < set(layers)
    assert all(
        layer["after"] <= layer["before"] and layer["ridge"] in (0, 0.03, 0.1, 0.3, 1, 3) for layer in layers.values()
    )
    settings = read_pruning_settings(folder.read_record()["settings"])
    loaded = load_model(ModelSpec(str(folder.path)))
    assert torch.count_nonzero(loaded.model.get_parameter("model.layers.1.mlp.down_proj.bias"))
    for source in read_sources(make_source_specs(settings), loaded).evaluation:
        assert perplexity(loaded.model, source).mean == pytest.approx(nll["pruned", source.name], rel=1e-6)
