"""What tests of the command line share: a way to call it, and a small language model."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regrow.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def regrow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty folder; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow", *words])
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit) as stop:
            main()
        signal.signal(signal.SIGINT, handler)  # which is ignored when a command is over
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a tiny random Llama with the tokenizer of a real model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from regrow.nets import load as load_by_name

    tokenizer = load_by_name("smollm2-135m").tokenizer
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
