"""What can be refused is refused before torch is imported, with the words of the library."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from regrow.core import names
from regrow.core.names import DOMAINS, PACKAGED, find_model_problem, torchvision_names
from regrow.methods import TABLES, MethodText
from regrow.nets import packaged

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"
PRUNE = "prune resnet18 --keep 0.5"
REFUSED = {
    "--help": "",
    "prune --help": "",
    "prune --help-all": "",
    "methods": "",
    "methods flap": "",
    "methods mgas": "",
    "prun": "No such command",
    f"{PRUNE} --oot new": "No such option '--oot'",
    f"{PRUNE}": "--out names the folder",
    f"{PRUNE} --method flop --out new": "did you mean 'flap'?",
    f"{PRUNE} --set no_such=1 --out new": "none is named; name it, such as --method flap",
    f"{PRUNE} --method flap --set no_such=1 --out new": "flap has no setting 'no_such'; it has",
    f"{PRUNE} --source mine=nowhere --out new": "nowhere does not exist",
    f"{PRUNE} --source nws --out new": "did you mean 'news'?",
    f"{PRUNE} --device cudda --out new": "there is no device 'cudda'",
    f"{PRUNE} --out full": "full exists and is not empty",
    f"{PRUNE} --out full/file": "is a file",
    f"{PRUNE} --out full/file/new": "full/file",
    f"{PRUNE} --dry-run none/plan.json": "there is no folder",
    "prune resnet18 --target params=130% --out new": "at most 100%",
    "prune resnet81 --keep 0.5 --out new": "did you mean 'resnet18'?",
    "prune w.pth --keep 0.5 --out new": "a pickle can run code",
    "show none": "no model 'none'",
    "evaluate resnet18 --json full/file": "is not a .json file",
    "chat smollm2-135m none": "no model 'none'",
    "grow resnet18 --out new": "nothing grows",
    "recover none --by refit --out new": "none is not a run folder",
    "recover run --by refti --out new": "did you mean 'refit'?",
    "learn split:none/:5 --out new": "no data 'none/'",
    "learn digits --method sparse --out new": "did you mean 'sparsegrow'?",
    "search cells:4-2-1 --data digits --target half --out new": "a target is like",
    "search cells:4-2-1 --data digits --target params=20% --set no_such=1 --out new": "mgas has no setting",
    "search cells:4-2-1 --data none --target params=20% --out new": "no data 'none'",
    "apply plan.json none --out new": "no model 'none'",
    "export run --to onx --out new": "there is no format 'onx'",
    "report none run": "none is not a run folder",
    "learn --config none --out new": "none is not a run folder",
    "learn --config run --out new": "holds a run of 'prune'",
    "methods flop": "did you mean 'flap'?",
}
ALL = """
import json, sys
from regrow.cli import run_command
lines = json.load(sys.stdin)
told = []
for line in lines:
    sys.stderr.write("\\0")
    code = run_command(line.split())
    told.append([code, "torch" in sys.modules])
sys.stderr.write("\\0" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Line → exit code, whether torch was imported by then, and what was printed: all in one process without torch."""
    here = tmp_path_factory.mktemp("here")
    (here / "full").mkdir()
    (here / "full" / "file").write_text("something else")
    (here / "run").symlink_to(RUN)
    words = [sys.executable, "-c", ALL]
    done = subprocess.run(
        words, cwd=here, input=json.dumps(list(REFUSED)), capture_output=True, text=True, timeout=60, check=True
    )
    _, *texts, told = done.stderr.split("\0")
    assert sorted(path.name for path in here.iterdir()) == ["full", "run"], "nothing is left behind"
    return {line: (*row, text) for line, row, text in zip(REFUSED, json.loads(told), texts, strict=True)}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_wrong_with_the_words_is_refused_without_torch(answers, line):
    code, torch, text = answers[line]
    assert code == (2 if REFUSED[line] else 0) and not torch, text
    assert REFUSED[line] in " ".join(text.split()) and text.count("\n") <= 1


def test_names_known_without_torch_are_those_of_the_library():
    for table in TABLES.values():
        for name, entry in table.items():
            read = MethodText(entry.about, entry.citation, entry.settings.__doc__, entry.defaults(()))
            assert replace(table.describe(name), about="") == replace(read, about="")
            assert table.describe(name).about == entry.about.strip()
    from torchvision.models import list_models

    assert set(torchvision_names()) == {name for name in list_models() if not name.startswith("quantized_")}
    assert tuple(packaged.PACKAGED) == PACKAGED
    from regrow.data import TEXT_DOMAINS

    assert tuple(TEXT_DOMAINS) == DOMAINS


def test_a_name_that_torchvision_may_have_says_how_to_install_it(monkeypatch):
    torchvision_names.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(names, "find_spec", lambda name: None)
        assert "torchvision: pip install 'pillow>=10' 'torchvision>=0.24'" in find_model_problem("resnet18")
        assert "did you mean 'smollm2-135m'?" in find_model_problem("smolm2-135m")
        assert find_model_problem("torchvision:resnet18") == ""  # loading it says what it needs
    torchvision_names.cache_clear()
    assert find_model_problem("resnet18") == "" and "did you mean 'resnet18'?" in find_model_problem("resnet1")
