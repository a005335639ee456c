"""Watches a process: which modules it imports, which code it runs, which programs it starts, and named functions."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

MODULES = ("pwned", "evil", "modeling_evil", "tokenization_evil", "toys", "plugin")
"""Canaries: modules that lie in the working directory, which nobody names."""
CODE = (".py", ".pyc", ".so")
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
CANARY = (
    "import builtins\nbuiltins.canary = True\nclass Evil:\n    pass\ndef boom(*a, **k):\n    raise SystemExit('ran')\n"
)

OURS = "transformers:get_class_from_dynamic_module"
"""What an export does with the code that it has just written; it is noted, and compared with the honest folder."""

foreign: list[str] = []
"""What should not have happened, in words."""
_watching = False
_profile: Callable[[FrameType, str, Any], None] | None = None


def lay_canaries(folder: Path) -> None:
    """Put every canary into a folder."""
    for name in MODULES:
        (folder / f"{name}.py").write_text(CANARY)


def start(folder: Path) -> None:
    """Begin to watch; everything below ``folder`` is foreign."""
    root = str(folder.resolve())

    def note(what: str) -> None:
        if _watching:
            foreign.append(what)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if not _watching:
            return
        match event, args:
            case "import", (str(name), *_) if name.split(".")[0] in MODULES:
                note(f"import {name}")
            case "exec", (CodeType() as code, *_) if _inside(code.co_filename, root):
                note(f"exec {code.co_filename}")
            case "compile", (_, filename, *_) if _inside(filename, root):
                note(f"compile {filename}")
            case "open", (filename, "r" | "rb", *_) if _inside(filename, root) and str(filename).endswith(CODE):
                note(f"open {filename}")
            case ("pickle.find_class", (module, name)):
                note(f"pickle {module}.{name}")
            case _ if event in PROGRAMS:
                note(f"{event} {args[0]!s:.80}")

    codes, builtin = _targets()

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if not _watching:
            return
        if event == "c_call" and arg in builtin:
            note(f"call {builtin[arg]}")
            raise RuntimeError("a named target was called")
        if event == "call" and frame.f_code in codes:
            note(f"call {codes[frame.f_code]}")
            if codes[frame.f_code] != OURS:
                raise RuntimeError("a named target was called")

    global _profile
    _profile = profile
    sys.addaudithook(audit)


def watched(work: Callable[[], Any]) -> list[str]:
    """What happened, while a function ran, that should not have."""
    global _watching
    foreign.clear()
    for name in MODULES:
        sys.modules.pop(name, None)
    _watching = True
    sys.setprofile(_profile)  # anew, as one that raises is taken off
    try:
        work()
    finally:
        sys.setprofile(None)
        _watching = False
    loaded = [name for name in MODULES if name in sys.modules]
    return sorted({*foreign, *(f"loaded {name}" for name in loaded)})


def _inside(filename: Any, root: str) -> bool:
    if isinstance(filename, bytes):
        filename = filename.decode(errors="replace")
    return isinstance(filename, str) and filename[:1] not in ("", "<") and str(Path.cwd() / filename).startswith(root)


def _targets() -> tuple[dict[CodeType, str], dict[Any, str]]:
    """The functions that hostile files name, by their code, and built-in ones."""
    import pickle
    import subprocess
    import webbrowser

    import torch
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    python = {
        "subprocess:run": subprocess.run,
        "subprocess:Popen": subprocess.Popen.__init__,
        "webbrowser:open": webbrowser.open,
        "torch.hub:load": torch.hub.load,
        "torch:load": torch.load,
        "transformers:get_class_from_dynamic_module": get_class_from_dynamic_module,
    }
    builtin = {os.abort: "os:abort", os.system: "os:system", pickle.loads: "pickle:loads", pickle.load: "pickle:load"}
    return {function.__code__: name for name, function in python.items()}, dict(builtin)
