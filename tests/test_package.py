"""The package as it is published: its version, its page, and the commands that install what is missing."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from regrow.core.errors import install_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]
STRINGS = [
    (path.relative_to(ROOT / "src" / "regrow").as_posix(), node)
    for path in sorted((ROOT / "src").rglob("*.py"))
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
]


def test_the_version_is_known_without_torch():
    code = "import sys, regrow; print(regrow.__version__, 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [PROJECT["project"]["version"], "False"]


def test_one_function_says_how_to_install_what_is_missing():
    written = {
        name
        for name, node in STRINGS
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if "pip install" in node.value or re.search(r"regrow\[\w+\]", node.value)
    }
    assert written == {"core/errors.py", "nets/packaged.py"}, "use regrow.core.errors.install_command"
    named = {
        node.args[0].value
        for _, node in STRINGS
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("install_command", "missing_package")
        if isinstance(node.args[0], ast.Constant)
    }
    assert {"llm", "vision", "report", "export", "recover", "text", "digits"} == named <= EXTRAS.keys()


@pytest.mark.parametrize("extra", ["llm", "demo", "text", "digits"])
def test_it_names_the_packages_of_an_extra_and_no_package_regrow(extra):
    words = install_command(extra).split()
    assert words[:2] == ["pip", "install"] and not any("regrow" in word for word in words)
    own = [name for name in EXTRAS[extra] if not name.startswith("regrow[")]
    for name in own:
        assert any(re.match(rf"'?{re.split('[<>=]', name)[0]}[<>=]", word) for word in words)


def test_in_a_checkout_that_is_not_installed_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(metadata, "distributions", lambda name: [])
    assert install_command("llm") == "pip install '.[llm]'"


def test_links_of_the_package_page_are_absolute():
    page, hook = (ROOT / "README.md").read_text("utf-8"), PROJECT["tool"]["hatch"]["metadata"]["hooks"]
    for rule in hook["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    links = re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page)
    assert len(links) > 5 and all(re.match("https://|#", link or image) for link, image in links)
    inside = re.findall(r"regrow-ml/regrow/(?:(?:tree|blob)/)?main/([^)\s\"#]+)", page)
    assert inside and not [name for name in inside if not (ROOT / name).exists()]


def test_files_for_hosts_are_valid():
    files = (".github/workflows/ci.yml", ".pre-commit-config.yaml", "CITATION.cff", ".github/ISSUE_TEMPLATE/bug.yml")
    workflow, hooks, citation, bug = (yaml.safe_load((ROOT / name).read_text("utf-8")) for name in files)
    assert any(".ci/run" in step.get("run", "") for step in workflow["jobs"]["check"]["steps"])
    oldest = workflow["jobs"]["release"]["strategy"]["matrix"]["include"][0]["torch"]
    assert f"torch>={oldest.removesuffix('.0')},<3" in PROJECT["project"]["dependencies"]
    assert {hook["id"] for repo in hooks["repos"] for hook in repo["hooks"]} == {"ruff-check", "ruff-format", "mypy"}
    assert citation["version"] == PROJECT["project"]["version"] and citation["license"] == "Apache-2.0"
    assert [paper["title"] for paper in citation["references"]] == ["GPrune-LLM", "SparseGrow", "MGAS"]
    assert {part["type"] for part in bug["body"]} <= {"markdown", "textarea", "input"}
