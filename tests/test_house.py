"""The house rules, as ratchets: each notices one kind of slip while it is still cheap to put right.

The reasons are in CONTRIBUTING.md. Exceptions are listed here by name, with the size they have; the lists only shrink.
"""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tree

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "regrow"
SOURCES = sorted(HOUSE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text("utf-8")) for path in SOURCES}

FILE_LINES = 350
RUN_LINES = 450
"""Of a file that is one whole run."""
FUNCTION_LINES = 80
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
CEILINGS = {"code_lines": 34_840, "tokens": 389_411, "files": 285}
"""Of the whole source, as `benchmarks/code_counts.py` counts; they only fall."""

VAGUE = {"utils", "util", "common", "misc", "helper", "helpers", "tools", "stuff"}
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
HEAVY = (
    "torch", "numpy", "transformers", "torchvision", "matplotlib", "accelerate", "gguf", "onnx", "onnxruntime", "ray",
    "sklearn",
)  # fmt: skip
PUBLIC = {"trace", "apply", "verify", "load", "prune", "Plan"}

BLIND = ("tracing", "allocation", "scoring", "surgery")
FAMILIES = (
    "llama qwen gpt gptj neox mistral mixtral gemma opt bloom falcon olmo mamba smollm starcoder bert deberta vit swin "
    "maxvit resnet resnext densenet mobilenet efficientnet shufflenet googlenet convnext regnet alexnet squeezenet"
)
FAMILY = re.compile(rf"(?<![a-z])({'|'.join(FAMILIES.split())})(?![a-z])", re.IGNORECASE)


def inside(path):
    """A file's name as seen from the house."""
    return path.relative_to(HOUSE).as_posix()


def functions(tree, prefix=""):
    """Every function and method with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")


def public(tree, prefix=""):
    """Every public class, function and method that a reader can import, with its dotted name."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield f"{prefix}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from public(node, f"{prefix}{node.name}.")


def test_the_folders_in_the_documentation_are_those_on_disk():
    drawn = tree.BLOCK.search(tree.PAGE.read_text("utf-8"))
    assert drawn, "docs/architecture.md has no list of folders (a code block that begins with `cli/`)"
    assert drawn[0].splitlines()[1:-1] == tree.draw().splitlines(), "renew it: make tree"


def test_the_page_of_results_is_short():
    assert len((ROOT / "REPRODUCTIONS.md").read_text("utf-8").splitlines()) <= 100


def test_nothing_is_printed_outside_the_cli():
    calls = [
        f"{inside(path)}:{node.lineno}"
        for path in SOURCES
        if not inside(path).startswith("cli/")
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print"
    ]
    assert not calls, "print outside cli/: return data, and let cli/ print it"


def imports(node):
    """The top-level packages that a node imports; ``pickle`` where it reads or writes pickles through another."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {(node.module or "").split(".")[0]}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "numpy.load"):
        return {"pickle"}
    return set()


def test_nothing_is_pickled():
    found = [
        f"{inside(path)}:{node.lineno}" for path in SOURCES for node in ast.walk(TREES[path]) if imports(node) & PICKLES
    ]
    assert not found, "safetensors and JSON only; a pickle runs code when it is read"


def test_no_file_has_a_name_that_says_nothing():
    assert not [inside(path) for path in SOURCES if path.stem in VAGUE or path.parent.name in VAGUE]


def test_the_core_knows_no_model_family():
    named = {
        f"{inside(path)}:{number}": line.strip()
        for path in SOURCES
        if inside(path).startswith(BLIND) and path.name != "attributes.py"  # the one table of names of attributes
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if FAMILY.search(line)
    }
    assert not named, "special cases belong in the axes"


@pytest.mark.parametrize("what", ["regrow", "regrow.cli.app"])
def test_importing_regrow_loads_nothing_heavy(what):
    code = f"import sys, {what}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not run.stdout.split(), f"imported with {what}; import it inside the function that needs it"


def test_the_core_loads_torch_alone():
    code = f"import sys; from regrow import *; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {*run.stdout.split()} <= {"torch", "numpy"}, "import it inside the function that needs it"


def test_every_public_name_says_what_it_is():
    bare = [inside(path) for path in SOURCES if TREES[path].body and not ast.get_docstring(TREES[path])]
    assert not bare, "the module has no docstring"
    names = [
        f"{inside(path)}:{name}"
        for path in SOURCES
        for name, node in public(TREES[path])
        if not ast.get_docstring(node)
    ]
    assert not names, "no docstring"


def test_files_stay_short():
    lengths = {inside(path): len(path.read_text("utf-8").splitlines()) for path in SOURCES}
    runs = {name for name in lengths if name.startswith("jobs/")}
    limits = {name: RUN_LINES if name in runs else FILE_LINES for name in lengths}
    shrinking({name: n for name, n in lengths.items() if n > limits[name]}, LONG_FILES, FILE_LINES)


def test_functions_stay_short():
    lengths = {
        f"{inside(path)}:{name}": node.end_lineno - node.lineno + 1
        for path in SOURCES
        for name, node in functions(TREES[path])
    }
    shrinking({name: n for name, n in lengths.items() if n > FUNCTION_LINES}, LONG_FUNCTIONS, FUNCTION_LINES)


def shrinking(found, allowed, limit):
    """Too long ones must be listed, at no more than the listed length; whoever shortens one takes it off the list."""
    assert not {name: n for name, n in found.items() if n > allowed.get(name, limit)}, f"longer than {limit} lines"
    assert not allowed.keys() - found.keys(), "short now: take it off the list in tests/test_house.py"


def test_the_source_does_not_grow(monkeypatch):
    spec = importlib.util.spec_from_file_location("code_counts", ROOT / "benchmarks" / "code_counts.py")
    counts = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "code_counts", counts)
    spec.loader.exec_module(counts)
    sizes = counts.sizes()
    assert not {name: n for name, n in sizes.items() if n > CEILINGS[name]}, "delete as much as you add"


def test_the_names_of_the_public_interface_are_kept():
    import regrow

    assert set(regrow.__all__) >= PUBLIC
    assert not [name for name in regrow.__all__ if not hasattr(regrow, name)]


def test_the_public_interface_is_documented():
    import regrow

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    assert not [name for name in regrow.__all__ if not re.search(rf"(regrow\.|`){name}\b", text)]


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"(?<![\w.])/(root|home|Users|work)/|pythonhosted\.org|download\.pytorch\.org")
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", *ROOT.glob("docs/**/*"), *SOURCES]
    named = [path.name for path in pages if path.is_file() and places.search(path.read_text("utf-8"))]
    assert not named


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("tracing/planted.py", "import regrow.methods"),
        ("evaluation/planted.py", "import regrow.surgery"),
        ("reports/planted.py", "import torch"),
        ("methods/continual/ewc.py", "import regrow.methods.search.darts"),
    ],
)
def test_the_import_floors_catch_a_planted_violation(where, line, tmp_path):
    pytest.importorskip("importlinter")
    package = tmp_path / "regrow"
    for path in SOURCES:
        copy = package / inside(path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("")

    options = ("--no-cache", "--config", str(ROOT / "pyproject.toml"))

    def lint():
        return subprocess.run(
            [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", *options],
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=False,
        )

    assert lint().returncode == 0, lint().stdout
    (package / where).write_text(line)
    assert lint().returncode == 1


def imports_of_other_methods(trees):
    """Modules of methods → the modules of other methods that they import."""
    from regrow.methods import TABLES

    methods = {f"regrow.methods.{kind}.{name}." for kind, table in TABLES.items() for name in table}
    found = {}
    for path, parsed in trees.items():
        module = ".".join(path.relative_to(HOUSE.parent).with_suffix("").parts) + "."
        imported = {f"{node.module}." for node in ast.walk(parsed) if isinstance(node, ast.ImportFrom)}
        used = {method for method in methods if any(name.startswith(method) for name in imported)}
        if others := {method for method in used if not module.startswith(method)}:
            found[module] = others
    return found


def test_no_method_imports_another():
    trees = {path: parsed for path, parsed in TREES.items() if path.is_relative_to(HOUSE / "methods")}
    assert not imports_of_other_methods(trees)
    planted = {HOUSE / "methods/search/darts.py": ast.parse("from regrow.methods.search.mgas import Settings")}
    assert imports_of_other_methods(planted)
