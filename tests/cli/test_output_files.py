"""Output files that the user names: what is written to, followed and refused, and that no input or result is lost."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from regrow.store.atomic import JSON, PAGES, check_output
from regrow.store.errors import StoreError

SIZE = ("evaluate", "toys:classifier", "--json")
PRUNE = ("prune", "toys:classifier", "--method", "magnitude", "--keep", "0.6", "--source", "digits")
FEW = ("--tokens", "64", "--eval-tokens", "64")


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(result, *words) -> None:
    code, _, err = result
    assert code == 2 and len(err.strip().splitlines()) == 1 and "; " in err, err
    assert all(word in " ".join(err.split()) for word in words), err


def test_a_link_is_followed_and_stays(regrow, tmp_path):
    (tmp_path / "results").mkdir()
    for target, link in (("results/old.json", "link.json"), ("results/new.json", "dangling.json")):
        Path(link).symlink_to(target)
    Path("results/old.json").write_text("old")
    for link in ("link.json", "dangling.json"):
        assert regrow(*SIZE, link)[0] == 0
        assert Path(link).is_symlink() and json.loads(Path(link).read_text())["model"] == "toys:classifier"
    assert sorted(path.name for path in Path("results").iterdir()) == ["new.json", "old.json"]


def test_a_fifo_is_refused(regrow):
    os.mkfifo("fifo")
    code, _, err = regrow(*SIZE, "fifo")
    assert code == 2 and "fifo is no regular file" in err


def test_what_may_be_replaced(tmp_path):
    for name in ("a.json", "A.JSON", "toys.py", "data", "page.html"):
        (tmp_path / name).write_text("old")
    (tmp_path / "latest.json").symlink_to("toys.py")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name in ("a.json", "A.JSON", "new", "new.txt"):
        assert check_output(tmp_path / name, JSON) == (tmp_path / name).resolve()
    for name in ("toys.py", "data", "page.html", "latest.json"):
        with pytest.raises(StoreError, match=r"exists and is not a \.json file; name a new file"):
            check_output(tmp_path / name, JSON)
    with pytest.raises(StoreError, match="is no regular file but a folder"):
        check_output(tmp_path, JSON)
    with pytest.raises(StoreError, match="symbolic links"):
        check_output(tmp_path / "loop.json", JSON)
    (tmp_path / "same.json").hardlink_to(tmp_path / "a.json")
    with pytest.raises(StoreError, match="is an input of this command"):
        check_output(tmp_path / "same.json", JSON, ["toys:classifier", tmp_path / "a.json"])
    for name in ("run.json", "shapes.json", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        for file in (name, "axes.json", "report.html", "other.html"):
            (folder / file).write_text("{}")
        for file, kinds in ((name, JSON), ("axes.json", JSON), ("other.html", PAGES)):
            with pytest.raises(StoreError, match="is part of a run folder or model folder"):
                check_output(folder / file, kinds)
        assert check_output(folder / "report.html", PAGES) and check_output(folder / "new.json", JSON)


def test_no_command_overwrites_a_run_or_its_input(regrow, tmp_path):
    for name in ("run", "run2"):
        assert regrow(*PRUNE, *FEW, "--out", name)[0] == 0
    Path("toys_of_mine.py").write_text("from toys import classifier\n")
    Path("items.json").write_text("[]\n")
    before = digests(tmp_path)
    for file in ("model.safetensors", "run.json", "ledger.json", "metrics.jsonl"):
        refused(regrow("report", "run", "--out", f"run/{file}"), f"run/{file}", "name a new file")
        refused(regrow("report", "run", "run2", "--out", f"run/{file}"), f"run/{file}", "name a new file")
        refused(regrow(*PRUNE, *FEW, "--dry-run", f"run/{file}"), f"run/{file}", "name a new file")
        words = ("evaluate", "run", "--code", "toys:classifier", "--json", f"run/{file}")
        refused(regrow(*words), f"run/{file}", "name a new file")
    refused(regrow(*SIZE, "run/shapes.json"), "run/shapes.json")
    refused(regrow("evaluate", "toys_of_mine:classifier", "--json", "toys_of_mine.py"), "toys_of_mine.py")
    refused(regrow("evaluate", "run", "--choices", "items.json", "--json", "items.json"), "an input of this command")
    assert digests(tmp_path) == before
    for out in ("run/report.html", "run/new.html", "page.html", "page.html"):
        assert regrow("report", "run", "--out", out)[0] == 0
        assert "</html>" in Path(out).read_text()


def test_gguf_does_not_overwrite_what_it_exports(regrow, tmp_path, capfd):
    pytest.importorskip("gguf", reason="needs regrow[llm]")
    from transformers import LlamaConfig, LlamaForCausalLM

    from regrow.exporters.gguf import write

    few = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **few))
    model.save_pretrained("llama")
    capfd.readouterr()
    before = digests(tmp_path)
    words = ("export", "llama", "--to", "gguf", "--out")
    refused(regrow(*words, "llama/model.safetensors"), "llama/model.safetensors", "name a new file")
    with pytest.raises(StoreError, match="name a new file"):
        write(model, "llama/model.safetensors")
    os.mkfifo("fifo.gguf")
    refused(regrow(*words, "fifo.gguf"), "give a regular file")
    assert digests(tmp_path) == before
    Path("link.gguf").symlink_to("net.gguf")
    for _ in range(2):
        write(model, "link.gguf")
        assert Path("link.gguf").is_symlink() and Path("net.gguf").read_bytes()[:4] == b"GGUF"
