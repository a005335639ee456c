"""Code lines, tokens and files of the package; ``tests/test_house.py`` has their ceilings.

python benchmarks/code_counts.py [FOLDER]                # per folder and in all
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "regrow"
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT}


def code_tokens(text: str) -> list[tokenize.TokenInfo]:
    """The tokens of a file without comments, docstrings, line breaks and indentation."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, DOCUMENTED))
    docstrings = {(node.body[0].lineno, node.body[0].col_offset) for node in nodes if ast.get_docstring(node)}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [token for token in tokens if token.type not in LAYOUT and token.start not in docstrings]


def count(path: Path) -> Counter[str]:
    """The counts of a file."""
    tokens = code_tokens(path.read_text("utf-8"))
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return Counter(code_lines=len(lines), tokens=len(tokens), files=1)


def sizes(package: Path = PACKAGE) -> Counter[str]:
    """The counts of all files below a folder."""
    return sum(map(count, package.rglob("*.py")), Counter())


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if sys.argv[1:] else PACKAGE
    for part in (*sorted(path for path in folder.iterdir() if any(path.rglob("*.py"))), folder):
        print(part.name, dict(sizes(part)))
