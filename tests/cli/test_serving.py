"""`regrow export` and `regrow chat` from the command line: what they leave, say and refuse."""

import json
from pathlib import Path

from cli.conftest import Run


def test_an_export_tells_how_it_was_checked(regrow: Run, tiny_language_model: Path) -> None:
    code, out, err = regrow("export", str(tiny_language_model), "--to", "transformers", "--out", "out")
    assert code == 0, err
    assert "checked: max abs diff 0" in out and "no code needed" in out
    assert "auto_map" not in json.loads(Path("out/config.json").read_text())


def test_what_cannot_be_exported_is_told_in_a_line(regrow: Run, tiny_language_model: Path) -> None:
    model = str(tiny_language_model)
    for words, said in (
        (("--to", "pdf", "--out", "x"), "known: transformers, gguf, onnx, torchvision"),
        (("--to", "gguf", "--dtype", "q1", "--out", "x.gguf"), "it stores f16"),
        (("--to", "torchvision", "--out", "x"), "no torchvision network"),
    ):
        code, _, err = regrow("export", model, *words)
        assert code == 2 and said in err and not Path("x").exists()


def test_a_model_answers_beside_another(regrow: Run, tiny_language_model: Path) -> None:
    model = str(tiny_language_model)
    code, out, err = regrow("chat", model, model, "--prompt", "a river", "--longest", "3")
    assert code == 0, err
    first, second = (line for line in out.splitlines() if line.startswith(model))
    assert first == second
