"""What tests of the command line share: a way to call it, and a small language model."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regrow.cli import main
from regrow.reports import page

Run = Callable[..., tuple[int, str, str]]
RunOnce = Callable[..., None]
STORED: dict[tuple[str, ...], Path] = {}
"""A module's name and the words of the commands of a test up to one → a copy of the folder that it wrote."""


@pytest.fixture
def regrow(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command line in an empty folder; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["regrow", *words])
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a command that is over leaves it ignored
        with pytest.raises(SystemExit) as stop:
            main()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        captured = capfd.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def run_once(regrow: Run, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunOnce:
    """Run a command that writes a folder, or copy the folder if the same commands ran in another test of the module."""
    done = [request.module.__name__]

    def run(*words: str, out: str) -> None:
        done.extend((*words, out))
        key = tuple(done)
        if key in STORED:
            shutil.copytree(STORED[key], out)
            return
        code, _, err = regrow(*words, "--out", out)
        assert code == 0, err
        STORED[key] = tmp_path_factory.mktemp("stored") / out
        shutil.copytree(out, STORED[key])

    return run


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave figures out of the pages, which other tests look at: drawing takes as long as the rest of a tiny run."""
    monkeypatch.setattr(page, "FIGURES", dict.fromkeys(page.FIGURES, lambda run: None))


VOCABULARY = 1024
"""Tokens of the tiny model: a real tokenizer's special ones, single bytes, and most frequent merges."""


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformers folder of a tiny random Llama with the tokenizer of a real model, of fewer merges."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from regrow.nets.packaged import packaged_folder

    folder = tmp_path_factory.mktemp("tiny")
    AutoTokenizer.from_pretrained(packaged_folder("smollm2-135m", lambda *_: None)).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < VOCABULARY}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
