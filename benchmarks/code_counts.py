"""Counts that say how large and how repetitive the source code of a checkout is.

    python benchmarks/code_counts.py                                    # this checkout
    python benchmarks/code_counts.py --root OTHER --json benchmarks/results/code_counts.json

Files are parsed, never imported. Each counting rule is the docstring of its function. Duplicate code is what pylint's
checker finds at six lines with nothing left out (ignore-imports, ignore-comments, ignore-docstrings and
ignore-signatures all off; with them on, pylint's defaults, it finds almost nothing and takes minutes). ``--json`` adds
one row for the commit, or replaces the row that the commit has.
"""

import argparse
import ast
import datetime
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMANDS = ("prune", "recover", "learn", "search", "evaluate")
"""Those that have settings."""
LONG_FILE = 350
SIMILAR_LINES = 6

USER_INPUTS = {
    "trace.args", "trace.kwargs", "trace.axes", "load.example", "example_of.args", "example_of.kwargs",
    "record.args", "record.kwargs", "declare.args", "declare.kwargs", "to_tasks.tasks", "logits_in.answer",
    "cross_entropy.output", "reply.model", "reply.tokenizer", "prompt.tokenizer", "perplexity.tokenizer",
    "choices.tokenizer", "harness.tokenizer", "windows.tokenizer", "windows.kwargs", "save.tokenizer",
    "write_model.tokenizer", "write_tokenizer.tokenizer", "vocabulary.tokenizer", "compare_predictions.tokenizer",
    "prune.settings", "forward.args", "forward.kwargs", "Batch.args", "Batch.kwargs", "Example.args",
    "Example.kwargs",
}  # fmt: skip
"""``function.parameter`` (or ``Class.field``) that hands on what the user's own network, tokenizer or data set takes or
returns: no narrower type than ``Any`` exists for these."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
FOREIGN_ROOTS_ALLOWED = {"ABC", "Protocol", "Generic", "object", "NamedTuple", "TypedDict", "Enum", "StrEnum", "Struct"}


@dataclass(frozen=True)
class Module:
    """One source file: its path below the package, the file, its text and its syntax tree."""

    path: str
    file: str
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        """Dotted name below the package: ``store.tensors``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def functions(self, *, nested: bool = True) -> dict[str, Function]:
        """Functions and methods by their own name; also those inside functions, if wanted."""
        if nested:
            return {node.name: node for node in ast.walk(self.tree) if isinstance(node, Function)}
        bodies = [self.tree.body, *(node.body for node in self.tree.body if isinstance(node, ast.ClassDef))]
        return {node.name: node for body in bodies for node in body if isinstance(node, Function)}


def read_modules(root: Path) -> list[Module]:
    """Every source file of the package in a checkout."""
    package = root / "src" / "regrow"
    paths = sorted(package.rglob("*.py"))
    texts = [path.read_text("utf-8") for path in paths]
    return [
        Module(path.relative_to(package).as_posix(), str(path), text, ast.parse(text))
        for path, text in zip(paths, texts, strict=True)
    ]


def calls(node: ast.AST) -> Iterator[ast.Call]:
    """Every call below a node."""
    return (found for found in ast.walk(node) if isinstance(found, ast.Call))


def called_name(call: ast.Call) -> str:
    """The last name of what is called: ``step`` of ``optimizer.step()``."""
    func = call.func
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def fields_of(node: ast.ClassDef) -> set[str]:
    """The annotated fields of a class."""
    return {s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}


def training_loops(modules: list[Module]) -> list[str]:
    """Functions with a loop in which ``.backward(`` and an optimizer's ``.step()`` are called.

    Both may be reached through functions of the same module or through functions imported from the package. Of
    functions that call each other, only the innermost is counted. ``.step()`` takes no argument, or a closure.
    """
    by_name = {module.name: module for module in modules}

    def resolve(module: Module, call: ast.Call) -> tuple[Module, Function] | None:
        name = called_name(call)
        own = isinstance(call.func, ast.Name) or ast.unparse(call.func).startswith("self.")
        if own and name in module.functions(nested=False):
            return module, module.functions()[name]
        for node in module.tree.body if isinstance(call.func, ast.Name) else ():
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("regrow."):
                other = by_name.get((node.module or "").removeprefix("regrow."))
                if other and any((a.asname or a.name) == name for a in node.names) and name in other.functions():
                    return other, other.functions()[name]
        return None

    def key_of(module: Module, function: Function) -> str:
        return f"{module.path}:{function.lineno} {function.name}"

    def effects(module: Module, node: ast.AST, seen: frozenset[str]) -> set[str]:
        result: set[str] = set()
        for call in calls(node):
            if isinstance(call.func, ast.Attribute):
                if call.func.attr == "backward":
                    result.add("backward")
                if call.func.attr == "step" and len(call.args) + len(call.keywords) <= 1:
                    result.add("step")
            target = resolve(module, call)
            if target and key_of(*target) not in seen:
                result |= effects(*target, seen | {key_of(*target)})
        return result

    def loops(module: Module, function: Function, stop: frozenset[str] = frozenset()) -> bool:
        seen = stop | {key_of(module, function)}
        bodies = [node for node in ast.walk(function) if isinstance(node, ast.For | ast.While)]
        return any(effects(module, body, seen) >= {"backward", "step"} for body in bodies)

    every = [(module, function) for module in modules for function in module.functions().values()]
    looping = [(module, function) for module, function in every if loops(module, function)]
    keys = frozenset(key_of(*one) for one in looping)
    return [key_of(*one) for one in looping if loops(*one, stop=keys - {key_of(*one)})]


def resume_records(modules: list[Module]) -> list[str]:
    """Classes with a field ``step`` or ``epoch`` that some ``write_…`` function takes and a ``read_…`` one returns.

    Their mirror in ``store/schemas.py``, which only checks the JSON, is not counted again.
    """
    classes = {
        node.name: f"{module.path}:{node.lineno} {node.name}"
        for module in modules
        for node in (module.tree.body if module.path != "store/schemas.py" else ())
        if isinstance(node, ast.ClassDef) and fields_of(node) & {"step", "epoch"}
    }
    written, read = set(), set()
    for module in modules:
        for function in module.functions().values():
            if function.name.startswith("write_"):
                written |= set().union(*(names_in(a.annotation) for a in arguments(function)))
            if function.name.startswith("read_"):
                read |= names_in(function.returns)
    return [place for name, place in classes.items() if name in written & read]


def tensor_codecs(modules: list[Module]) -> list[str]:
    """Functions that write a safetensors file with a header of their own.

    They call safetensors' ``save_file`` with more metadata than ``{"format": "pt"}``, or our ``save_tensors``.
    """
    places = []
    for module in modules:
        for function in module.functions().values():
            for call in calls(function):
                own = called_name(call) == "save_tensors" and len(call.args) > 2
                own = own or (called_name(call) == "save_file" and len(call.args) > 2)
                if own and ast.unparse(call.args[2]) != "{'format': 'pt'}":
                    places.append(f"{module.path}:{function.lineno} {function.name}")
    return places


def tensor_layouts(modules: list[Module]) -> list[str]:
    """Functions that lay a record out as named tensors and a header.

    Those of `tensor_codecs` or, where one codec writes all files, the callers of its ``write_tensors``.
    """
    callers = [
        f"{module.path}:{function.lineno} {function.name}"
        for module in modules
        for function in module.functions().values()
        if any(called_name(call) == "write_tensors" for call in calls(function))
    ]
    return callers or tensor_codecs(modules)


def setting_declarations(modules: list[Module]) -> dict[str, int]:
    """Ways in which the settings of a command are declared, with the number of declarations in each.

    ``fields`` of the dataclasses named Settings in ``runs/``, ``commands/`` or ``settings/``; ``options``: calls of
    click's ``option`` or ``argument`` in the modules of ``cli/`` that are of commands with settings (``COMMANDS``, and
    ``options.py``, which they share) whose parameter has the name of such a field; ``command_lines``: methods
    ``command`` of those dataclasses that put the command line together again.
    """
    fields: set[str] = set()
    counts = {"fields": 0, "options": 0, "command_lines": 0}
    for module in modules:
        for node in module.tree.body if module.path.startswith(("runs/", "commands/", "settings/")) else ():
            if isinstance(node, ast.ClassDef) and node.name == "Settings":
                names = fields_of(node)
                fields |= names
                counts["fields"] += len(names)
                counts["command_lines"] += sum(isinstance(s, Function) and s.name == "command" for s in node.body)
    for module in modules:
        shared = module.path in {f"cli/{name}.py" for name in ("options", *COMMANDS)}
        for call in calls(module.tree) if shared else ():
            if call.args and ast.unparse(call.func) in ("click.option", "click.argument"):
                flags = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                plain = [flag for flag in flags if not flag.startswith("-")] or [flags[-1].split("/")[0].strip("-")]
                counts["options"] += plain[-1].replace("-", "_") in fields
    return counts


def duplicate_classes(modules: list[Module]) -> dict[str, list[str]]:
    """Class names that are defined more than once, except Settings."""
    places = defaultdict(list)
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and node.name != "Settings":
                places[node.name].append(f"{module.path}:{node.lineno}")
    return {name: where for name, where in sorted(places.items()) if len(where) > 1}


def overridden_methods(modules: list[Module]) -> list[str]:
    """Methods that override a concrete method of a base class of ours.

    A method is abstract if it is decorated so or if its body is nothing but a docstring, ``...`` or
    ``raise NotImplementedError``. Hierarchies that end in a class of another package (torch, transformers, click) or
    in an exception are left out.
    """
    classes: dict[str, tuple[str, ast.ClassDef]] = {}
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                classes[f"{module.name}:{node.name}"] = module.path, node

    def bases(key: str) -> list[str]:
        module = key.split(":")[0]
        keys = []
        for base in classes[key][1].bases:
            name = ast.unparse(base).split("[")[0].split(".")[-1]
            local = f"{module}:{name}"
            others = [k for k in classes if k.endswith(f":{name}")]
            keys.append(local if local in classes else others[0] if len(others) == 1 else name)
        return keys

    def ancestors(key: str) -> list[str]:
        return [a for b in bases(key) for a in [b, *(ancestors(b) if b in classes else [])]]

    places = []
    for key, (path, node) in classes.items():
        above = ancestors(key)
        if any(a not in classes and a not in FOREIGN_ROOTS_ALLOWED for a in above):
            continue
        concrete = {m.name for a in above if a in classes for m in classes[a][1].body if is_concrete(m)}
        places += [f"{path}:{m.lineno} {node.name}.{m.name}" for m in node.body if getattr(m, "name", "") in concrete]
    return places


def is_concrete(node: ast.stmt) -> bool:
    """Whether this is a method with a body."""
    if not isinstance(node, Function) or any("abstractmethod" in ast.unparse(d) for d in node.decorator_list):
        return False
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return any(not re.fullmatch(r"\.\.\.|pass|raise NotImplementedError.*", ast.unparse(one)) for one in body)


def values_subscripts(modules: list[Module]) -> list[str]:
    """Places that read or write ``values["…"]``: entries that no type checker sees."""
    return [
        f"{module.path}:{node.lineno}"
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
        and ast.unparse(node.value).split(".")[-1] == "values"
    ]


def arguments(function: Function) -> list[ast.arg]:
    """All parameters of a function, variadic ones too."""
    a = function.args
    return [*a.posonlyargs, *a.args, *a.kwonlyargs, *(one for one in (a.vararg, a.kwarg) if one)]


def names_in(annotation: ast.expr | None) -> set[str]:
    """The names in an annotation, also in one that is written as a string."""
    if annotation is None:
        return set()
    text = " ".join(n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return set(re.findall(r"\w+", f"{ast.unparse(annotation)} {text}"))


def any_in_signatures(modules: list[Module]) -> list[str]:
    """Parameters, results and fields whose annotation has ``Any``, of public functions, methods and classes.

    Public: no name on the way has a leading underscore; ``__init__`` and ``__call__`` count.
    """
    places = []

    def visit(module: Module, body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(module, node.body, f"{node.name}.")
            if isinstance(node, ast.AnnAssign) and prefix and "Any" in names_in(node.annotation):
                name = ast.unparse(node.target)
                places.extend([] if name.startswith("_") else [f"{module.path}:{node.lineno} {prefix}{name}"])
            if isinstance(node, Function) and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
                where = f"{module.path}:{node.lineno} {prefix}{node.name}"
                places.extend(f"{where}.{a.arg}" for a in arguments(node) if "Any" in names_in(a.annotation))
                places.extend([f"{where}.return"] if "Any" in names_in(node.returns) else [])

    for module in modules:
        visit(module, module.tree.body, "")
    return places


def is_user_input(place: str) -> bool:
    """Whether a place of `any_in_signatures` is in the list of users' inputs."""
    return ".".join(place.split(" ")[1].split(".")[-2:]) in USER_INPUTS


def duplicate_code(modules: list[Module]) -> list[str]:
    """Groups of six or more similar lines in the package, by pylint's checker."""
    files = [module.file for module in modules]
    code = "from pylint.checkers.symilar import Run; Run()"
    command = [sys.executable, "-c", code, "-d", str(SIMILAR_LINES), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "TOTAL lines" not in done.stdout:
        raise SystemExit(f"pylint did not run ({done.stderr.strip()[-200:]}); install it: pip install '.[dev]'")
    return re.findall(
        r"^\d+ similar lines in.*?(?=^\d+ similar lines in|^TOTAL)", done.stdout, re.MULTILINE | re.DOTALL
    )


def code_lines(module: Module) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def count(root: Path) -> dict[str, Any]:
    """All counts of a checkout; ``places`` names what was counted where the list is short."""
    modules = read_modules(root)
    settings = setting_declarations(modules)
    public_any = any_in_signatures(modules)
    long_files = [f"{m.path} {m.text.count(chr(10))}" for m in modules if m.text.count("\n") > LONG_FILE]
    lists: dict[str, Callable[[list[Module]], Any]] = {
        "training_loops": training_loops,
        "resume_records": resume_records,
        "tensor_codecs": tensor_codecs,
        "tensor_layouts": tensor_layouts,
        "duplicate_class_names": duplicate_classes,
        "overridden_concrete_methods": overridden_methods,
        "values_subscripts": values_subscripts,
    }
    found = {name: rule(modules) for name, rule in lists.items()}
    return {
        **{name: len(places) for name, places in found.items()},
        "setting_declarations": sum(n > 0 for n in settings.values()),
        "setting_declarations_by_way": settings,
        "any_in_public_signatures": len(public_any),
        "any_for_user_inputs": sum(map(is_user_input, public_any)),
        "duplicate_code": len(duplicate_code(modules)),
        "files_over_350_lines": len(long_files),
        "code_lines": sum(code_lines(m) for m in modules if not m.path.startswith("testing/")),
        "files": len(modules),
        "places": {**{n: p for n, p in found.items() if n != "values_subscripts"}, "files_over_350_lines": long_files},
    }


def git(root: Path, *words: str) -> str:
    """What git says about the checkout."""
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Print the counts; with ``--json``, keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to count")
    parser.add_argument("--json", type=Path, help="the file of rows to add to")
    parser.add_argument("--list", metavar="COUNT", help="print every place of one count, such as any_in_signatures")
    options = parser.parse_args()
    if options.list:
        places = globals()[options.list](read_modules(options.root))
        print(*(f"{k}: {v}" for k, v in places.items()) if isinstance(places, dict) else places, sep="\n")
        return
    commit, dated = git(options.root, "log", "-1", "--format=%h %cs").split()
    clean = not git(options.root, "status", "--porcelain", "--", "src")
    row = {
        "commit": commit if clean else f"{commit} with changes",
        "committed": dated,
        "counted": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **count(options.root),
    }
    print(json.dumps(row, indent=1))
    if options.json:
        rows = json.loads(options.json.read_text("utf-8")) if options.json.exists() else []
        rows = [other for other in rows if other["commit"] != row["commit"]] + [row]
        options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
