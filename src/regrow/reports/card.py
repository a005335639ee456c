"""Model cards: the ``README.md`` of an exported folder, with the metadata that a hub reads; made of run folders alone.

What is not known is left out. Commands and settings stay in the run folder: they may have paths of this machine.
"""

import json
import re
from importlib import metadata
from pathlib import Path

from regrow.core.names import HUB
from regrow.reports.reading import read_runs
from regrow.reports.records import Run
from regrow.reports.summary import summarise
from regrow.store.atomic import write_text
from regrow.store.convert import read_json
from regrow.store.run_record import BEFORE, RUN

# A pattern of classes of transformers, or of builders of torchvision → the hub's name of what they do
_TASKS = {
    r".*(ForCausalLM|LMHeadModel)": "text-generation",
    r".*(ForObjectDetection|rcnn|retinanet|fcos|ssd)": "object-detection",
    r".*ForSemanticSegmentation|fcn|deeplab|lraspp": "image-segmentation",
    r"r3d|mc3|r2plus1d|s3d|mvit|swin3d": "video-classification",
    r".*ForImageClassification|(?!raft)[a-z]": "image-classification",
}
_LICENCE = re.compile(r"(LICEN[CS]E|COPYING|NOTICE|\w*TERMS)\b[^./]*(\.(txt|md|rst|html))?", re.IGNORECASE)
# Command → what its network is called
_CHANGED = {"prune": "pruned", "grow": "grown", "learn": "grown", "search": "searched"}


def write_card(folder: Path, source: str, name: str) -> None:
    """Write ``README.md``, and the base model's licence, into an exported folder.

    ``source``: the run folder or the model that was exported; empty: a network in memory, whose origin is ``name``.
    Raises ReportError if the record of a run is damaged.
    """
    from regrow.nets.packaged import PACKAGED

    runs = [run for path in _find_runs(Path(source)) for run in read_runs([path])] if source else []
    name = str(runs[0].file.settings.get("model") or runs[0].model) if runs else source or name
    parent = runs[0].file.parent if runs else None  # has files or a digest of weights if it was a folder
    on_hub = bool(source) and not runs
    if parent:
        on_hub = parent.name == Path(name).name and not (parent.files or parent.weights)
    base, licence, files = _find_base(name, is_local=bool(source) and Path(name).exists(), on_hub=on_hub)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    library, builder, load = _read_usage(folder)
    tags = list(dict.fromkeys(_CHANGED[run.file.verb] for run in runs if run.file.verb in _CHANGED))
    known = {
        "library_name": library,
        "pipeline_tag": next((task for names, task in _TASKS.items() if re.match(names, builder)), ""),
        "base_model": base,
        "base_model_relation": "finetune" if base and runs else "",  # the hub has no value for a change of shape
        "license": licence or ("other" if files else ""),
        "license_link": files[0].name if files and not licence else "",
        "tags": ["regrow", *tags],
    }
    start = f" It starts from {PACKAGED[name].note}." if name in PACKAGED else ""
    head = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items() if value]  # it is YAML
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {', '.join([_cell(Path(name).name), *tags])}",
        f"Made {f'from {base} ' if base else ''}with [regrow](https://github.com/regrow-ml/regrow).{start}",
        *map(_describe, runs),
        f"## How to load it\n\n```python\n{load}\n```",
        "## Provenance\n\n`shapes.json` has the digest of every tensor.\n",
    ]
    write_text(folder / "README.md", "\n\n".join(parts))


def _find_runs(folder: Path) -> list[Path]:
    """Return the folders of the runs that made a network, in order, as far as each has a copy of the one before it."""
    return [*_find_runs(folder / BEFORE), folder] if (folder / RUN).is_file() else []


def _find_base(name: str, *, is_local: bool, on_hub: bool) -> tuple[str, str, list[Path]]:
    """Return a model's id on the Hugging Face Hub, the hub's name of its licence (empty: unknown), and licence files.

    ``is_local``: whether the name is that of a file or folder; ``on_hub``: whether it may be one of the hub.
    """
    from regrow.nets.packaged import PACKAGED

    # A link could lead to any file of the user's, who then uploads the folder.
    files = [file for file in Path(name).glob("*") if not file.is_symlink()] if is_local else []
    base, licence = name if on_hub and not is_local and re.fullmatch(HUB, name) else "", ""
    if packaged := PACKAGED.get(name):
        installed = metadata.distributions(name=packaged.distribution)
        files = [Path(str(file.locate())) for package in installed for file in package.files or ()]
        base, licence = packaged.base
    return base, licence, sorted(file for file in files if _LICENCE.fullmatch(file.name) and file.is_file())


def _read_usage(folder: Path) -> tuple[str, str, str]:
    """Return the package that loads an exported folder, the class or builder of its network, and code that loads it."""
    if (config := read_json(folder / "config.json")) is None:
        load = "from load_regrow import load  # it lies beside this file\n\nmodel = load()"
        return "torchvision", read_json(folder / "network.json")["builder"], load
    name, code = config["architectures"][0], config.get("auto_map", {})
    name = next((auto for auto, path in code.items() if path.endswith(f".{name}")), name)
    trust = ", trust_remote_code=True" * bool(code)
    load = f'model = {name}.from_pretrained("FOLDER"{trust})  # or USER/NAME on the hub'
    if not (folder / "tokenizer_config.json").is_file():
        return "transformers", name, f"from transformers import {name}\n\n{load}"
    load += f'\ntokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})'
    return "transformers", name, f"from transformers import {name}, AutoTokenizer\n\n{load}"


def _describe(run: Run) -> str:
    """Return a section about a run: its result in a sentence, and a table of sizes, quality and widths."""
    summary = summarise(run)
    rows: list[tuple[str, ...]] = [(row.label, row.before, row.after, row.remark) for row in summary.figures]
    for kind in run.widths:
        if kind.before != kind.after:
            sides = ([row[side] for row in kind.rows] for side in (1, 2))
            extents = (" to ".join(dict.fromkeys((f"{min(sizes):,}", f"{max(sizes):,}"))) for sizes in sides)
            rows.append((f"Units of {kind.name}", *extents, f"layers: {len(kind.rows)}"))
    rows.append(("Date", "", run.file.finished or "", ", ".join(map(" ".join, run.file.versions.items()))))
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in [("", "before", "after", ""), ("---",) * 4, *rows]]
    text = _cell(" ".join([summary.sentence, *summary.details, *summary.alarms]))
    return "\n".join([f"## {run.file.verb.capitalize()}\n\n{text}\n", *lines])


def _cell(text: str) -> str:
    """Return text of a file that may be hostile on one line, without tags and ends of cells."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
