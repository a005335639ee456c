"""README and the pages of docs: short sentences, links that lead somewhere, commands whose options exist."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from regrow.cli.app import regrow, run_command

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("prose_counts", ROOT / "benchmarks" / "prose_counts.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prose_counts", module)
    spec.loader.exec_module(module)
    return module


def test_pages_are_short_and_no_sentence_has_more_than_30_words(counts: ModuleType) -> None:
    assert not [line for path in PAGES for line in counts.checked(counts.count(path))]


def test_a_long_sentence_and_a_long_front_page_are_found(
    counts: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counts, "ROOT", tmp_path)
    page = tmp_path / "README.md"
    code, right, wrong = "word " * 40, "word " * 30, "word " * 31
    page.write_text(f"# Title\n\n```\n{code}\n```\n\n* {right}\n* {wrong}\n| a | b |\n")
    assert [line.partition(" words")[0] for line in counts.checked(counts.count(page))] == ["README.md: 31"]
    page.write_text("Short.\n" * 111)
    assert "111 lines" in "".join(counts.checked(counts.count(page)))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text("utf-8"))):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not link.startswith("http") and not (target.exists() and (not anchor or anchor in anchors(target))):
            lost.append(link)
    assert not lost


def test_every_page_of_docs_is_linked_from_a_front_page() -> None:
    site = ROOT / "docs" / "index.md"
    front = (ROOT / "README.md").read_text("utf-8") + (site.read_text("utf-8") if site.exists() else "")
    generated = ("index.md", "api.md")  # of the site
    pages = [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in generated]
    assert not [page for page in pages if f"({page}" not in front and f"(docs/{page}" not in front]


def test_commands_on_pages_have_only_options_that_exist() -> None:
    seen = 0
    for page in PAGES:
        text = "\n".join(BLOCK.findall(page.read_text("utf-8"))).replace("\\\n", " ")
        for line in re.findall(r"^regrow (.*)$", text, re.MULTILINE):
            name, *words = shlex.split(line, comments=True)
            command = regrow.commands[name]
            command.make_parser(click.Context(command)).parse_args(words)  # raises where an option is not there
            seen += 1
    assert seen > 30


TIME = re.compile(r"\b(seconds?|minutes?|hours?|days?)\b")
UNMARKED = "without a time take less than half a minute"


def test_commands_on_pages_are_marked_with_their_time() -> None:
    untimed = []
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text("utf-8")
        lines = "\n".join(BLOCK.findall(text)).replace("\\\n", " ").splitlines()
        if UNMARKED not in " ".join(text.split()):
            untimed += [line for line in lines if re.match("(torchrun .*)?regrow ", line) and not TIME.search(line)]
    assert not untimed


def test_the_learning_commands_of_the_front_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^regrow (learn .*?)(?: *#.*)?$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    for line in [*lines, "report grown laplace"]:
        assert run_command(line.split()) == 0, line
    assert "8 tasks" in capsys.readouterr().out and len(lines) == 3


def test_the_python_of_the_front_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 4
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
    head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 4))
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), *head)
    names = {"model": model, "train_loader": loader, "test_loader": loader, "images": images}
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    exec(code, names)
    assert (tmp_path / "runs" / "pruned" / "report.html").is_file() and model[0].out_channels < 16
    assert (tmp_path / "small" / "shapes.json").is_file()
