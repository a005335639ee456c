"""Counts that say how large and how repetitive the source code of a checkout is.

    python benchmarks/code_counts.py                                    # this checkout
    python benchmarks/code_counts.py --root OTHER --json benchmarks/results/code_counts.json
    python benchmarks/code_counts.py --list circles                     # every place of one count

Files are parsed, never imported. Each counting rule is the docstring of its function. ``--json`` adds one row for the
commit, or replaces the row that the commit has.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import shared

Function = ast.FunctionDef | ast.AsyncFunctionDef
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
VAGUE_NAMES = ("one", "own", "given", "place", "kinds", "more", "found")
MANY_ARGUMENTS = 8
SIMILAR_LINES = 6
PRUNE_FILES = {
    "api/prune.py", "api/streamed.py", "cli/prune.py", "commands/calibration.py", "commands/cutting.py",
    "commands/generated.py", "commands/later_plans.py", "commands/prune.py", "commands/prune_settings.py",
    "commands/pruning.py", "commands/reconstruction.py", "commands/run_state.py", "commands/score_summary.py",
    "commands/share_pruning.py", "commands/shared_work.py", "commands/streamed.py",
    "commands/streamed_reconstruction.py", "commands/streamed_run.py", "jobs/calibration.py", "jobs/cutting.py",
    "jobs/generated.py", "jobs/later_plans.py", "jobs/prune.py", "jobs/prune_settings.py", "jobs/pruning.py",
    "jobs/pruning_inputs.py", "jobs/recovering.py",
    "jobs/reconstruction.py", "jobs/recovery_steps.py", "jobs/run_state.py", "jobs/score_summary.py",
    "jobs/share_pruning.py", "jobs/memory_needs.py", "jobs/run_networks.py",
    "jobs/shared_work.py", "jobs/streamed.py", "jobs/streamed_reconstruction.py", "jobs/streamed_run.py",
    "settings/prune.py", "streaming/cut.py",
}  # fmt: skip
"""Files of a prune run: flags, settings, Python, whole and streamed, other ranks, and the steps that they share.

Not the methods, and not what every command uses (models, data, measurements, run folders)."""


@dataclass(frozen=True)
class Module:
    """One source file: its path below the package, the file, its text and its syntax tree."""

    path: str
    file: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Dotted name below the package: ``store.tensors``; a package's ``__init__`` has the name of the package."""
        return self.path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")

    @property
    def top(self) -> str:
        """The module or folder at the top level of the package that the file is, or lies in."""
        return self.name.split(".")[0]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Every node of the syntax tree."""
        return list(ast.walk(self.tree))

    @cached_property
    def tokens(self) -> list[tokenize.TokenInfo]:
        """The tokens without comments, docstrings, line breaks and indentation."""
        every = tokenize.generate_tokens(io.StringIO(self.text).readline)
        skipped = {(node.lineno, node.col_offset) for node in self.docstrings}
        kept = (token for token in every if token.type not in {*LAYOUT, tokenize.COMMENT})
        return [token for token in kept if token.type != tokenize.STRING or token.start not in skipped]

    @cached_property
    def docstrings(self) -> list[ast.stmt]:
        """The docstrings of the module, its classes and functions; a string below a field is code."""
        documented = (node for node in self.nodes if isinstance(node, ast.Module | ast.ClassDef | Function))
        return [node.body[0] for node in documented if ast.get_docstring(node) is not None]


def read_modules(root: Path) -> list[Module]:
    """Every source file of the package in a checkout."""
    package = root / "src" / "regrow"
    paths = sorted(package.rglob("*.py"))
    texts = [path.read_text("utf-8") for path in paths]
    return [
        Module(path.relative_to(package).as_posix(), str(path), text, ast.parse(text))
        for path, text in zip(paths, texts, strict=True)
    ]


def code_lines(module: Module) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    return len({line for token in module.tokens for line in range(token.start[0], token.end[0] + 1)})


def docstring_lines(module: Module) -> int:
    """Lines of docstrings."""
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 for node in module.docstrings)


def sizes(modules: list[Module]) -> dict[str, int]:
    """Code lines, tokens and files; ``tests/test_house.py`` has their ceilings."""
    tokens = sum(len(module.tokens) for module in modules)
    return {"code_lines": sum(map(code_lines, modules)), "tokens": tokens, "files": len(modules)}


def imported_modules(module: Module, modules: dict[str, Module]) -> Iterator[tuple[str, int]]:
    """The files of the package that a file imports, with the line: within functions and for type checkers, too."""
    for node in module.nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, inside = name.partition(".")
            target = inside if inside in modules else inside.rpartition(".")[0]
            if package == "regrow" and (target or "__init__") in modules:
                yield target or "__init__", node.lineno


def top_imports(modules: list[Module]) -> dict[tuple[str, str], list[str]]:
    """Imports between the modules and folders at the top level of the package: pair → places."""
    by_name = {module.name: module for module in modules}
    pairs = defaultdict(list)
    for module in modules:
        for name, line in imported_modules(module, by_name):
            if by_name[name].top != module.top:
                pairs[module.top, by_name[name].top].append(f"{module.path}:{line}")
    return dict(pairs)


def upward_imports(modules: list[Module]) -> list[str]:
    """Imports between top-level names that do not go down in the layers of ``pyproject.toml``.

    A module that the layers do not name lies just above the highest module that it imports.
    """
    pyproject = Path(modules[0].file.partition("/src/regrow/")[0]) / "pyproject.toml"
    contracts = tomllib.loads(pyproject.read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    heights = {name: float(-depth) for depth, layer in enumerate(layers) for name in re.findall(r"\w+", layer)}
    pairs = top_imports(modules)
    for name in sorted({module.top for module in modules} - heights.keys()):
        below = [heights[lower] for upper, lower in pairs if upper == name and lower in heights]
        heights[name] = max(below, default=float(-len(layers))) + 0.5
    return [
        f"{upper} → {lower}: {', '.join(places)}"
        for (upper, lower), places in pairs.items()
        if heights[upper] <= heights[lower]
    ]


def circles(modules: list[Module]) -> list[str]:
    """Groups of files that import each other, directly or through others.

    What a file imports of the packages that it lies in is not counted: Python imports these before the file.
    """
    by_name = {module.name: module for module in modules}
    targets = {
        name: {other for other, _ in imported_modules(module, by_name) if not f"{name}.".startswith(f"{other}.")}
        for name, module in by_name.items()
    }

    def reached(name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            new = targets[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {name: reached(name) for name in by_name}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in by_name}
    return sorted(" ↔ ".join(sorted(group)) for group in groups if group)


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Every call below a node."""
    return (child for child in ast.walk(node) if isinstance(child, ast.Call))


def starred(call: ast.Call) -> list[ast.expr]:
    """What a call unpacks: ``values`` of ``f(*values)`` and ``options`` of ``f(**options)``."""
    lists = [argument.value for argument in call.args if isinstance(argument, ast.Starred)]
    return lists + [keyword.value for keyword in call.keywords if keyword.arg is None]


def starred_calls(modules: list[Module]) -> list[str]:
    """Calls with starred arguments."""
    return [f"{module.path}:{call.lineno}" for module in modules for call in calls(module.tree) if starred(call)]


def starred_local_calls(modules: list[Module]) -> list[str]:
    """Calls with starred arguments that unpack a plain name, such as ``f(*given, **more)``."""
    return [
        f"{module.path}:{call.lineno} {ast.unparse(call.func)}"
        for module in modules
        for call in calls(module.tree)
        if any(isinstance(value, ast.Name) for value in starred(call))
    ]


def any_variables(modules: list[Module]) -> list[str]:
    """Variables and fields that are annotated as plain ``Any``."""
    return [
        f"{module.path}:{node.lineno} {ast.unparse(node.target)}"
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation) == "Any"
    ]


def vague_names(modules: list[Module]) -> dict[str, int]:
    """Uses of variables and parameters with a name that says nothing, by name."""
    names = Counter(
        node.id if isinstance(node, ast.Name) else node.arg
        for module in modules
        for node in module.nodes
        if isinstance(node, ast.Name | ast.arg)
    )
    return {name: names[name] for name in VAGUE_NAMES}


def prune_implementations(modules: list[Module]) -> list[str]:
    """Functions outside ``testing`` that call ``plan_cut``: each is a run of prune of its own."""
    return [
        f"{module.path}:{node.lineno} {node.name}"
        for module in modules
        for node in module.nodes
        if isinstance(node, Function)
        and module.top != "testing"
        and any(ast.unparse(call.func).split(".")[-1] == "plan_cut" for call in calls(node))
    ]


def prune_files(modules: list[Module]) -> list[str]:
    """Files of a prune run that exist (``PRUNE_FILES``), with their code lines."""
    return [f"{module.path} {code_lines(module)}" for module in modules if module.path in PRUNE_FILES]


def parameters(function: Function) -> list[ast.arg]:
    """All parameters of a function, variadic ones too."""
    a = function.args
    variadic = [argument for argument in (a.vararg, a.kwarg) if argument]
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *variadic]


def many_arguments(modules: list[Module]) -> list[str]:
    """Functions with more than eight parameters, outside the Python interface (``api``)."""
    return [
        f"{module.path}:{node.lineno} {node.name} {len(parameters(node))}"
        for module in modules
        for node in module.nodes
        if isinstance(node, Function) and module.top != "api" and len(parameters(node)) > MANY_ARGUMENTS
    ]


def duplicate_classes(modules: list[Module]) -> dict[str, list[str]]:
    """Class names that are defined more than once, except Settings."""
    places = defaultdict(list)
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.ClassDef) and node.name != "Settings":
                places[node.name].append(f"{module.path}:{node.lineno}")
    return {name: where for name, where in sorted(places.items()) if len(where) > 1}


def duplicate_code(modules: list[Module]) -> list[str]:
    """Groups of six or more similar lines, by pylint's checker with nothing left out (imports and docstrings count)."""
    files = [module.file for module in modules]
    code = "from pylint.checkers.symilar import Run; Run()"
    command = [sys.executable, "-c", code, "-d", str(SIMILAR_LINES), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "TOTAL lines" not in done.stdout:
        raise SystemExit(f"pylint did not run ({done.stderr.strip()[-200:]}); install it: pip install '.[dev]'")
    return re.findall(
        r"^\d+ similar lines in.*?(?=^\d+ similar lines in|^TOTAL)", done.stdout, re.MULTILINE | re.DOTALL
    )


def count(root: Path) -> dict[str, Any]:
    """All counts of a checkout."""
    modules = read_modules(root)
    prune = [module for module in modules if module.path in PRUNE_FILES]
    tops = {module.top for module in modules}
    return {
        **sizes(modules),
        "docstring_lines": sum(map(docstring_lines, modules)),
        "top_level_files": sum("/" not in module.path for module in modules),
        "top_level_folders": len({module.top for module in modules if "/" in module.path}),
        "top_level_names": len(tops),
        "top_level_imports": len(top_imports(modules)),
        "upward_imports": len(upward_imports(modules)),
        "circles": len(circles(modules)),
        "starred_calls": len(starred_calls(modules)),
        "starred_local_calls": len(starred_local_calls(modules)),
        "any_variables": len(any_variables(modules)),
        "vague_names": vague_names(modules),
        "prune_implementations": len(prune_implementations(modules)),
        "prune_code_lines": sum(map(code_lines, prune)),
        "prune_files": len(prune),
        "many_arguments": len(many_arguments(modules)),
        "duplicate_classes": len(duplicate_classes(modules)),
        "duplicate_code": len(duplicate_code(modules)),
    }


def git(root: Path, *words: str) -> str:
    """What git says about the checkout."""
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the counts; with ``--json``, keep them."""
    options = shared.arguments(__doc__, root=Path(__file__).parents[1], json=Path, list="")
    if options.list:
        places = globals()[options.list](read_modules(options.root))
        print(*(f"{k}: {v}" for k, v in places.items()) if isinstance(places, dict) else places, sep="\n")
        return
    commit, dated = git(options.root, "log", "-1", "--format=%h %cs").split()
    commit += " with changes" if git(options.root, "status", "--porcelain", "--", "src") else ""
    row: dict[str, Any] = {"commit": commit, "committed": dated, "counted": shared.today(), **count(options.root)}
    print(json.dumps(row, indent=1))
    if options.json:
        rows = json.loads(options.json.read_text("utf-8")) if options.json.exists() else []
        shared.write(options.json, [other for other in rows if other["commit"] != commit] + [row])


if __name__ == "__main__":
    main()
