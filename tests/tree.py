"""The tree of packages at the end of docs/architecture.md, drawn from what is on disk: `make tree` renews it.

A package's remark is the first sentence of its docstring; what its files hold is the first line of each.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"^```\nregrow/\n.*?^```$", re.DOTALL | re.MULTILINE)

TOP = {
    ".ci/": "`run`: what CI runs",
    ".gitignore": "what never enters the repository",
    "CHANGELOG.md": "what changed, per version",
    "CONTRIBUTING.md": "set-up, adding a method, what we avoid and why",
    "LICENSE": "Apache-2.0",
    "Makefile": "demo, test, check",
    "README.md": "what regrow is, and where to read on",
    "REPRODUCTIONS.md": "what of each paper is reproduced, and what is not",
    "benchmarks/": "speed and memory, beside others, in one run; results with their date",
    "docs/": "one page per subject; the picture of the README",
    "examples/": "short scripts",
    "pyproject.toml": "dependencies, style, types, import floors",
    "recipes/": "golden runs in plain Python",
    "src/": "",
    "tests/": "mirrors src/regrow; zoo/: networks, laws.py: the laws, test_house.py: the rules of this house",
}
ORDER = [
    "core",
    "settings",
    "tracing",
    "scoring",
    "allocation",
    "surgery",
    "nets",
    "data",
    "evaluation",
    "store",
    "training",
    "methods",
    "jobs",
    "exporters",
    "reports",
    "cli",
]
"""The folders from the lowest layer to the highest."""


def draw() -> str:
    """The tree as text."""
    lines = ["regrow/"]
    top = [name for name in TOP if (ROOT / name).is_file() or any(p.is_file() for p in (ROOT / name).rglob("*"))]
    for name in top:
        branch, indent = _branch(name == top[-1])
        lines.append(_line(branch + name, TOP[name]))
        if name == "src/":
            lines.append(f"{indent}└── regrow/")
            lines.extend(_folder(ROOT / "src" / "regrow", f"{indent}    "))
    return "\n".join(lines)


def _folder(folder, indent):
    shown = [path for path in folder.iterdir() if _shown(path)]
    shown.sort(key=lambda path: (ORDER.index(path.name) if path.name in ORDER else len(ORDER), path.name))
    for path in shown:
        branch, deeper = _branch(path == shown[-1])
        yield _line(f"{indent}{branch}{path.name}/", _remark(path / "__init__.py"))
        yield from _folder(path, indent + deeper)


def _shown(path):
    return path.is_dir() and any(path.rglob("*.py"))


def _branch(last):
    return ("└── ", "    ") if last else ("├── ", "│   ")


def _line(name, remark):
    return f"{name:<39} {remark}".rstrip()


def _remark(path):
    text = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "") if path.exists() else ""
    line = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"\1", " ".join(text.split("\n\n")[0].split())).replace("``", "")
    return re.split(r"[;:] " if len(line) > 80 else r"\.$", line)[0].removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: f"```\n{draw()}\n```", PAGE.read_text("utf-8")), "utf-8")
