"""Two life cycles, each with one ledger: prune, grow, learn and search one network, and go back to its first weights.

    python recipes/life_cycles.py smollm2 --work FOLDER
    python recipes/life_cycles.py resnet18 --work FOLDER --cifar PICTURES
    python recipes/life_cycles.py smollm2 --work FOLDER --size train=8 --size recovery=512 --out FILE       # smaller
    python recipes/life_cycles.py --show

Each stage is one command line of ``regrow``, which is printed and recorded, run in FOLDER; a stage that is finished is
not run again, and a stopped one goes on. After each: parameters, multiply–accumulates, and scores on test data by
``regrow evaluate``. After the last: the runs that ``regrow show`` lists; a replay of the ledger on a network without
weights, whose tensors must have the shapes and types of the last network's; ``regrow undo`` until the start, whose
tensors must be those of the first network, bit for bit; and ``regrow export``, which reads its file back.

PICTURES has CIFAR-10 as ``train/CLASS/…`` and ``test/CLASS/…``; FOLDER gets two folders of links, ``first`` (airplane
to deer) and ``second`` (dog to truck), with all ten classes as folders, so that class numbers agree.
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Row, arguments, finished, last_line, rows, table, timed, today

from regrow import nets, trace
from regrow.evaluation.measure import dense
from regrow.jobs.models import ModelSpec, load_model
from regrow.jobs.parents import read_stages
from regrow.store.ledger import Ledger, replay
from regrow.store.run_folder import RunFolder

OUT = Path(__file__).parent / "results" / "life_cycles.jsonl"


@dataclass(frozen=True)
class Cycle:
    """A network and the commands that it goes through.

    Args:
        model: The name of the network.
        loading: Options of the commands that load it by name.
        unit: What multiply–accumulates are counted of.
        score: The key of a score in the output of ``regrow evaluate``.
        sources: The sources that are scored.
        sizes: Name of a number in the commands → its value in the committed run.
        stages: The commands; ``{last}`` is the folder of the one before, ``{parameters[1-prune]}`` a size reached.
        export: The options of the export.
    """

    model: str
    loading: str
    unit: str
    score: str
    sources: tuple[str, ...]
    sizes: Mapping[str, float]
    stages: Mapping[str, str]
    export: str


CYCLES = {
    "smollm2": Cycle(
        "smollm2-135m",
        "--dtype float32",
        "256 tokens",
        "bits_per_byte",
        ("news", "code", "manual", "talk"),
        {"calibration": 1024, "recovery": 2048, "train": 32, "test": 4, "epochs": 1, "lr": 1e-4, "scored": 1024},
        {
            "1-prune": "prune {model} --dtype float32 --method flap --keep 0.7 --source news --source code "
            "--tokens {calibration} --eval-tokens 1024",
            "2-recover": "recover {last} --by distil --tokens {recovery}",
            "3-grow": "grow {last} --mlp +25%",
            "4-learn": "learn manual talk --model {last} --method naive --optimizer adamw --lr {lr} --batch-size 4 "
            "--epochs {epochs} --train {train} --test {test} --seq-len 256",
            "5-prune": "prune {last} --method flap --target params={parameters[1-prune]} --source news --source code "
            "--source manual --source talk --tokens {calibration} --eval-tokens 1024",
        },
        "--to transformers --out exported",
    ),
    "resnet18": Cycle(
        "resnet18",
        "--input 1x3x32x32",
        "an image",
        "accuracy",
        ("first=first/test", "second=second/test"),
        {"train": 8000, "test": 1000, "epochs": 5, "calibration": 4000, "finetune": 2, "scored": 2500}
        | {"search": 4, "retrain": 3, "new": 2, "memory": 2000},
        {
            "1-learn": "learn first --model {model} --input 1x3x32x32 --method naive --lr 0.02 --epochs {epochs} "
            "--train {train} --test {test}",
            "2-prune": "prune {last} --method llm_pruner --target macs=50% --source first=first/train "
            "--tokens {calibration} --eval-tokens 1000 --finetune {finetune}",
            "3-search": "search {last} --data first --target macs=80% --epochs {search} --retrain {retrain} "
            "--train {train} --test {test}",
            "4-grow": "grow {last} --channels +25%",
            "5-learn": "learn first second --model {last} --method replay --set memory={memory} --set "
            "asymmetric_loss=true --scenario class --lr 0.02 --epochs {new} --train {train} --test {test}",
        },
        "--to onnx --out exported.onnx",
    ),
}


def run(words: list[str], work: Path, log: str) -> dict[str, float]:
    """Run a command of ``regrow``, with its output in a file; return its seconds, all attempts together."""
    print("regrow", *words, flush=True)
    done = timed([sys.executable, "-m", "regrow", *words], work)
    with (work / f"{log}.log").open("a") as file:
        file.write(done.text)
    times = work / f"{log}.seconds.json"
    before = json.loads(times.read_text()) if times.is_file() else {}
    taken = {"seconds": done.seconds, "cpu_seconds": done.cpu}
    seconds = {name: round(before.get(name, 0) + value, 1) for name, value in taken.items()}
    times.write_text(json.dumps(seconds))
    if done.code:
        raise SystemExit(f"exit code {done.code}: {last_line(done.text)}")
    return seconds


def link_halves(cifar: Path, work: Path) -> None:
    """Make the folders ``first`` and ``second`` of links to the class folders of CIFAR-10."""
    classes = sorted(path.name for path in (cifar / "train").iterdir() if path.is_dir())
    for name, kept in (("first", classes[: len(classes) // 2]), ("second", classes[len(classes) // 2 :])):
        for half in ("train", "test"):
            (work / name / half).mkdir(parents=True, exist_ok=True)
            for label in classes:
                place = work / name / half / label
                if label not in kept:
                    place.mkdir(exist_ok=True)
                elif not place.is_symlink():
                    place.symlink_to(cifar.resolve() / half / label, target_is_directory=True)


def measure(cycle: Cycle, model: str, work: Path, sizes: Mapping[str, float]) -> Row:
    """Return the size and the scores of a network: a run folder in the work folder, or a name."""
    file = work / f"{model}.json"
    if not file.is_file():
        sources = [word for source in cycle.sources for word in ("--source", source)]
        loading = cycle.loading.split() if model == cycle.model else []
        scored = ["--eval-tokens", f"{sizes['scored']:g}"]
        run(["evaluate", model, *loading, *sources, *scored, "--json", file.name], work, f"evaluate-{model}")
    measured = json.loads(file.read_text())
    if "dense" not in measured:
        loaded = load_model(spec_of(cycle, model, work))
        inputs = torch.zeros(1, 256, dtype=torch.long) if loaded.tokenizer is not None else loaded.example.args[0][:1]
        measured["dense"] = dense(loaded.model, inputs)
        file.write_text(json.dumps(measured))
    size = measured["dense"]
    scores = {score["source"]: score[cycle.score] for score in (*measured["perplexity"], *measured["accuracy"])}
    errors = {score["source"]: score["error"] for score in (*measured["perplexity"], *measured["accuracy"])}
    return {"parameters": size["parameters"], "macs": size["macs"], "scores": scores, "errors": errors}


def spec_of(cycle: Cycle, model: str, work: Path) -> ModelSpec:
    """Return how a network is loaded: a run folder in the work folder, or the first one by its name."""
    if model != cycle.model:
        return ModelSpec(str(work / model))
    shape = cycle.loading.removeprefix("--input ") if "--input" in cycle.loading else ""
    return ModelSpec(model, "float32", input=shape)


def stages(cycle: Cycle, name: str, work: Path, sizes: Mapping[str, float]) -> Iterator[Row]:
    """Run the stages that are not finished, and yield a row for each, after one for the first network."""
    shared = {"cycle": name, "unit": cycle.unit, "score": cycle.score, "sizes": dict(sizes)}
    first = measure(cycle, cycle.model, work, sizes)
    yield {**shared, "stage": "0-start", "command": "", **first}
    last, reached = cycle.model, {}
    for stage, template in cycle.stages.items():
        shown = {key: f"{value:g}" for key, value in sizes.items()}
        command = template.format(model=cycle.model, last=last, parameters=reached, **shown)
        words = [*command.split(), "--out", stage]
        if not finished(work / stage):
            run(words, work, stage)
        times = json.loads((work / f"{stage}.seconds.json").read_text())
        row = measure(cycle, stage, work, sizes)
        reached[stage], last = row["parameters"], stage
        yield {**shared, "stage": stage, "command": f"regrow {' '.join(words)}", **row, **times}


def check(cycle: Cycle, name: str, work: Path) -> Row:
    """Return what history, replay, undo and export of the last run give."""
    last = [*cycle.stages][-1]
    for left in ("undone", "exported", "export.log", "history.log"):
        shutil.rmtree(work / left) if (work / left).is_dir() else (work / left).unlink(missing_ok=True)
    run(["show", last], work, "history")
    known = read_stages(work / last)
    result: Row = {
        "cycle": name,
        "stage": "checks",
        "history": [{key: stage.record.get(key) for key in ("name", "verb", "changed")} for stage in known],
        "snapshots": sum(stage.snapshot is not None for stage in known),
    }
    plans = Ledger(work / last / "ledger.json").plans()
    result["replay"] = {"plans": len(plans), **compare_replay(cycle, work, last, plans)}
    result["undo"] = compare_undone(cycle, work, last, len(known))
    run(["export", last, *cycle.export.split()], work, "export")
    exported = (work / "export.log").read_text().splitlines()
    result["exported"] = [text.removeprefix("checked: ") for text in exported if text.startswith("checked: ")]
    result["verify"] = {
        stage: {key: row[key] for key in ("ok", "max_abs_diff", "bound", "dtype")}
        for stage, template in cycle.stages.items()
        for row in RunFolder.open(work / stage).metrics()
        if row["what"] == "verify" and not template.startswith("recover")  # which has the row of its pruning
    }
    return result


def compare_replay(cycle: Cycle, work: Path, last: str, plans: Any) -> Row:
    """Replay a ledger on the first architecture without weights, and compare each tensor with the last network's."""
    ours = load_model(spec_of(cycle, last, work)).model.state_dict()
    start = load_model(spec_of(cycle, cycle.model, work))
    with torch.device("meta"):
        empty = nets.build(start.origin)
    args = [value.to("meta") for value in start.example.args]
    options = {
        key: value.to("meta") if torch.is_tensor(value) else value for key, value in start.example.kwargs.items()
    }
    again, _ = replay(empty, trace(empty, *args, **options), plans)
    theirs = again.state_dict()
    pairs = {key: (value, theirs.get(key)) for key, value in ours.items()}
    differ = [key for key, (a, b) in pairs.items() if b is None or a.shape != b.shape or a.dtype != b.dtype]
    return {"tensors": len(ours), "differ": differ + sorted(theirs.keys() - ours.keys())}


def compare_undone(cycle: Cycle, work: Path, last: str, many: int) -> Row:
    """Undo the last run until the start, in a folder of its own, and compare each tensor with the first network's."""
    run(["undo", last, "--out", "undone"], work, "undo")
    for _ in range(many - 1):
        run(["undo", "undone"], work, "undo")
    first, back = (load_model(spec_of(cycle, name, work)).model.state_dict() for name in (cycle.model, "undone"))
    same = [key for key, value in first.items() if key in back and value.dtype == back[key].dtype]
    equal = sum(torch.equal(*(state[key].reshape(-1).view(torch.uint8) for state in (first, back))) for key in same)
    largest = max((first[key].double() - back[key].double()).abs().max().item() for key in same)
    counts = {"tensors": len(first), "same_type": len(same), "equal_bits": equal}
    return {**counts, "others": len(back.keys() - first.keys()), "largest": largest}


def show(path: Path) -> Iterator[str]:
    """Yield the tables in Markdown."""
    for name, cycle in CYCLES.items():
        mine = [row for row in rows(path) if row["cycle"] == name]
        stages = [row for row in mine if row["stage"] != "checks"]
        if not mine:
            continue
        bits = cycle.score == "bits_per_byte"
        sources = [f"{source}, {'bits per byte' if bits else '%'}" for source in mine[0]["scores"]]
        columns = ["stage", "parameters", f"MACs of {cycle.unit}", *sources, "CPU seconds"]
        yield from table(columns, (show_stage(row, bits) for row in stages))
        yield from ("", "```", *(row["command"] for row in stages if row["command"]), "```", "")
        yield from (text for row in mine if row["stage"] == "checks" for text in show_checks(row))
        yield ""


def show_stage(row: Row, bits: bool) -> list[str]:
    """Return the line of a stage."""
    scores = [f"{score:.3f}" if bits else f"{100 * score:.1f}" for score in row["scores"].values()]
    macs = f"{row['macs'] / 1e9:.2f} G" if row["macs"] > 1e9 else f"{row['macs'] / 1e6:.2f} M"
    return [row["stage"], f"{row['parameters'] / 1e6:.2f} M", macs, *scores, f"{row.get('cpu_seconds', 0):.0f}"]


def show_checks(row: Row) -> Iterator[str]:
    """Yield what was checked after the last stage, as a list in Markdown."""
    runs = row["history"]
    names = ", ".join(f"{run['name']} ({run['changed']})" for run in runs)
    yield f"* `regrow show`: {names}; {row['snapshots']} of {len(runs)} have the model before them"
    again, back = row["replay"], row["undo"]
    yield (
        f"* replay of {again['plans']} plans on a network on the device meta: {again['tensors']} tensors, "
        f"{len(again['differ'])} of another shape or type than the last network's"
    )
    yield (
        f"* `regrow undo` to the start: {back['tensors']} tensors as in the first network and {back['others']} others, "
        f"{back['same_type']} of the same type, {back['equal_bits']} equal bit for bit, largest difference "
        f"{back['largest']:g}"
    )
    for stage, check in row["verify"].items():
        least, most = (f"{check[key]:.1e}" for key in ("max_abs_diff", "bound"))
        yield f"* verified in {stage}, before and after: largest difference {least} in {check['dtype']} (bound {most})"
    yield f"* `regrow export`, read back: {', '.join(row['exported'])}"


def main() -> None:
    """Run a cycle, or show the tables."""
    args = arguments(__doc__, OUT, {"cycle*": ()}, work=Path, cifar=Path, size=[])
    if args.show:
        print("\n".join(show(args.out)))
        return
    (name,) = args.cycle or [""]
    if name not in CYCLES or not args.work or (name == "resnet18" and not args.cifar):
        raise SystemExit("give a cycle, --work FOLDER, and for resnet18 --cifar PICTURES; or --show")
    cycle, work = CYCLES[name], args.work.resolve()
    other = {size: float(number) for size, _, number in (word.partition("=") for word in args.size)}
    if unknown := other.keys() - cycle.sizes.keys():
        raise SystemExit(f"{name} has no size {', '.join(unknown)}; it has {', '.join(cycle.sizes)}")
    work.mkdir(parents=True, exist_ok=True)
    if args.cifar:
        link_halves(args.cifar, work)
    known = [row for row in rows(args.out) if row["cycle"] != name]

    def write(row: Row) -> None:
        known.append(row | {"date": today()})
        print(json.dumps(known[-1]), flush=True)
        args.out.write_text("".join(json.dumps(row) + "\n" for row in known))

    for row in stages(cycle, name, work, {**cycle.sizes, **other}):
        write(row)
    write(check(cycle, name, work))


if __name__ == "__main__":
    main()
