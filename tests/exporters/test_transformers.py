"""Export to transformers of models that take no text, and of inputs that are known from the saved folder."""

from pathlib import Path

import pytest
import torch

import regrow
from regrow.exporters import ExportError
from regrow.jobs.export import export_named
from regrow.jobs.recording import Invocation
from regrow.settings.export import Settings

transformers = pytest.importorskip("transformers", reason="needs regrow[llm]")
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "image_size": 32} | {
    "patch_size": 8,
    "intermediate_size": 40,
}
VISION = ("ViT", "DeiT", "Dinov2")


@pytest.mark.parametrize("name", VISION)
def test_a_vision_transformer_is_written_and_compared(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**SIZES, num_labels=5)
    getattr(transformers, f"{name}ForImageClassification")(config).save_pretrained(tmp_path / "model")
    written = regrow.export(tmp_path / "model", tmp_path / "plain", format="transformers")
    loaded = transformers.AutoModelForImageClassification.from_pretrained
    before, after = (loaded(tmp_path / folder).state_dict() for folder in ("model", "plain"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # Some processors round otherwise where weights are read from another alignment in memory.
    assert written.checked["max_abs_diff"] < 1e-7 and "no code needed" in written.notes[0]
    regrow.prune(tmp_path / "model", {"x": torch.randn(4, 3, 32, 32)}, keep=0.8, method="random", out=tmp_path / "cut")
    written = regrow.export(tmp_path / "cut", tmp_path / "made", format="transformers")
    assert written.checked["max_abs_diff"] < 1e-5 and written.checked["loaded_as"].startswith("Regrown")


def test_a_network_in_training_mode_is_compared_without_dropout(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    net = transformers.GPT2LMHeadModel(config).train()
    written = regrow.export(net, tmp_path / "out", format="transformers")
    assert written.checked["max_abs_diff"] == 0 and net.training


def test_a_model_that_takes_another_input_is_refused_in_a_line(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    net = transformers.Wav2Vec2ForCTC(config).eval()
    with pytest.raises(ExportError, match=r"Wav2Vec2ForCTC does not take an input of .*give an input"):
        regrow.export(net, tmp_path / "out", format="transformers")
    example = {"input_values": torch.randn(1, 4000)}
    written = regrow.export(net, tmp_path / "out", format="transformers", example=example)
    assert written.checked["max_abs_diff"] < 1e-4


def test_the_recorded_input_of_a_saved_folder_is_used(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import saved_network

        regrow.save(saved_network.build(), tmp_path / "net", example=torch.randn(1, 3, 8, 8))
        call = Invocation(tmp_path / "net.onnx", "saved_network:build")
        written = export_named(Settings(str(tmp_path / "net"), "onnx"), call)
    assert "input [batch, 3, 8, 8]" in written.notes[0]
