"""Settings are checked before anything is loaded or written; what is refused leaves nothing behind."""

import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from cli.conftest import Run
from regrow import load
from regrow.cli.checks import check_run_folder
from regrow.core.errors import InputError, ResourceError
from regrow.nets.devices import choose_device
from regrow.nets.files import check_config, check_regular_files, check_safetensors
from regrow.nets.vision import small
from regrow.settings import evaluate, learn, prune, recover, search
from regrow.settings.declaration import check_settings
from regrow.store.errors import StoreError

LEARN = ("learn", "digits", "--method", "naive", "--model", "mlp:4", "--out", "a/run")
PRUNE = ("prune", "toys:classifier", "--method", "magnitude", "--keep", "0.8", "--out", "a/run")
SEARCH = ("search", "cells:4-1-1", "--data", "digits", "--target", "params=50%", "--out", "a/run")
REFUSED = {
    "learn at an infinite rate": ((*LEARN, "--lr", "inf"), "--lr must be at least 0 and below 1,000, got inf", 2),
    "learn at no rate": ((*LEARN, "--lr", "nan"), "--lr must be", 2),
    "learn backwards": ((*LEARN, "--epochs", "-1"), "--epochs must be 1 to 1,000,000, got -1", 2),
    "learn with a huge net": ((*LEARN[:5], "mlp:65536-65536-65536", *LEARN[6:]), "of memory, and", 4),
    "prune on no device": ((*PRUNE, "--device", "cuda:77"), "is not available; this machine has cpu", 4),
    "prune on nonsense": ((*PRUNE, "--device", "nonsense"), "there is no device 'nonsense'", 2),
    "prune images in bfloat16": (
        (*PRUNE, "--dtype", "bfloat16", "--source", "digits"),
        "channels in float32, and the model takes inputs of shape",
        2,
    ),
    "prune into multiples of 0": ((*PRUNE, "--round", "0"), "--round must be 1 to", 2),
    "search at a rate of nothing": ((*SEARCH, "--lr", "nan"), "--lr must be between", 2),
    "recover nothing": (
        ("recover", "none", "--by", "refit", "--tokens", "0", "--out", "a/run"),
        "--tokens must be 1",
        2,
    ),
    "evaluate within nothing": (
        ("evaluate", "toys:classifier", "--memory", "foo"),
        "--memory: an amount of bytes is",
        2,
    ),
    "prune within nonsense": ((*PRUNE, "--memory", "4Gb!"), "--memory: an amount of bytes is", 2),
    "no items": (("evaluate", "toys:classifier", "--items", "0"), "--items must be 1 to", 2),
    "images of a network of numbers": (("evaluate", "toys:stepping", "--source", "digits"), "shape [2, 8]", 2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line_and_leaves_no_folder(regrow: Run, name: str) -> None:
    words, says, expected = REFUSED[name]
    if name == "learn with a huge net":
        words = tuple(words)
    code, _, err = regrow(*words)
    assert code == expected and says in err and "Traceback" not in err, err
    assert not Path("a").exists()


def test_mistyped_settings_of_a_run_folder_are_refused(regrow: Run) -> None:
    Path("run").mkdir()
    base = asdict(prune.Settings("resnet18", method="magnitude"))
    for name, value in (("keep", "much"), ("sources", "digits"), ("sources", [1]), ("tokens", 0.5), ("proof", "no"),
                        ("model", 3), ("seed", -1), ("target", ["x"]), ("device", "x"), ("dtype", "x")):  # fmt: skip
        told = {"format": "regrow-run/2", "verb": "prune", "command": "", "defaults": {}, "versions": {}, "started": ""}
        told["settings"] = json.loads(json.dumps(base | {name: value}))
        Path("run/run.json").write_text(json.dumps(told))
        code, _, err = regrow("recover", "run", "--by", "refit", "--out", "out")
        assert code == 2 and "Traceback" not in err and err.count("regrow: ") == 1, (name, value, err)
        assert not Path("out").exists()


def test_every_default_is_in_its_range() -> None:
    for settings in (
        prune.Settings("x"),
        recover.Settings("run", "refit"),
        learn.Settings(("digits",)),
        search.Settings("cells:4-1-1", "digits", "params=50%"),
        evaluate.Settings("x"),
    ):
        check_settings(settings)


def test_a_learned_network_is_evaluated_on_the_images_it_takes(regrow: Run) -> None:
    assert regrow(*LEARN, "--epochs", "1", "--train", "40", "--test", "20")[0] == 0
    code, out, err = regrow("evaluate", "a/run", "--source", "digits", "--eval-tokens", "20")
    assert code == 0 and "digits: accuracy" in out, err


def test_images_of_one_pixel_are_learned(regrow: Run) -> None:
    Path("dots").mkdir()
    for name, many in (("train", 8), ("t10k", 4)):
        images = struct.pack(">BBBBIII", 0, 0, 8, 3, many, 1, 1) + bytes(range(0, 20 * many, 20))
        Path("dots", f"{name}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, many) + bytes(i % 2 for i in range(many))
        Path("dots", f"{name}-labels-idx1-ubyte").write_bytes(labels)
    words = ("learn", "dots", "--method", "sparsegrow", "--model", "mlp:4", "--epochs", "1", "--batch-size", "8")
    code, _, err = regrow(*words, "--out", "run")
    assert code == 0, err
    assert load("run")[1].in_features == 1


def test_a_source_may_be_named_like_markup(regrow: Run) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (8, 8), 60 * i).save(Path("photos", name, f"{i}.png"))
    code, out, err = regrow("evaluate", "toys:classifier", "--source", "[/x]\x1b[31m=photos")
    assert code == 0 and "[/x]\\x1b[31m: accuracy" in out and "\x1b" not in out + err, err


def test_devices_are_checked_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:x", ""):
        with pytest.raises(InputError, match="there is no device"):
            choose_device(name)
    with pytest.raises(ResourceError, match=r"is not available; this machine has cpu"):
        choose_device("cuda:99")
    with pytest.raises(ResourceError):
        choose_device("meta")


def test_widths_are_compared_with_the_memory_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.core.limits.available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"mlp:64 needs .* of memory, and .* are free; take a smaller network"):
        small("mlp:64", (1, 8, 8), 10)


CONFIGS = {
    "[]": "not an object",
    '{"num_hidden_layers": 100000}': "num_hidden_layers = 100,000, at most 1,024",
    '{"text_config": {"hidden_size": 99999999999}}': "hidden_size",
    '{"a": ' * 200 + "1" + "}" * 200: "nested deeper",
    '{"vocab_size": 1' + "0" * 5000 + "}": "not JSON",
}


@pytest.mark.parametrize("text", CONFIGS, ids=range(len(CONFIGS)))
def test_configurations_beyond_the_limits_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=CONFIGS[text]):
        check_config(tmp_path / "config.json", "x")


def test_weights_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"is no regular file .*; give a regular file"):
        check_safetensors(tmp_path / "model.safetensors")


def test_a_folder_with_a_pipe_for_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer_config.json")
    with pytest.raises(InputError, match=r"tokenizer_config\.json is no regular file"):
        check_regular_files(tmp_path)


def test_what_a_killed_replacement_leaves_is_deleted_by_a_command_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "model").touch()
    (tmp_path / ".net.01234567.old").mkdir()
    with pytest.raises(StoreError, match="not empty"):
        check_run_folder(tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
