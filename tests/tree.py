"""The list of folders in docs/architecture.md, drawn from the layers in pyproject.toml: `make tree` renews it.

A folder's remark is the first sentence of its package's docstring.
"""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"^```\ncli/ .*?^```$", re.DOTALL | re.MULTILINE)


def draw() -> str:
    """The folders of the package, the highest layer first; an empty line is between layers."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["regrow"])
    drawn = []
    for layer in layers:
        folders = [name for name in re.findall(r"\w+", layer) if (ROOT / "src" / "regrow" / name).is_dir()]
        if folders:
            drawn.append("\n".join(f"{name + '/':<14}{_remark(name)}" for name in folders))
    return "\n\n".join(drawn)


def _remark(folder):
    text = ast.get_docstring(ast.parse((ROOT / "src" / "regrow" / folder / "__init__.py").read_text("utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "").removesuffix(".")


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: f"```\n{draw()}\n```", PAGE.read_text("utf-8")), "utf-8")
