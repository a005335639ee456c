"""Settings files are checked before use, name no code, and give way to the command line."""

from dataclasses import asdict
from pathlib import Path

import pytest

from regrow.core.errors import InputError
from regrow.settings import evaluate, learn, prune, recover, search
from regrow.settings.declaration import options_of
from regrow.settings.words import (
    MAX_BYTES,
    build_settings,
    command_line,
    format_settings,
    left_out,
    read_settings,
)

RUNS = [
    prune.Settings("smollm2-135m", keep=0.9, sources=("news", "mail=a b/"), proof=False, round_to=8, seed=2**62),
    prune.Settings("m", method="gprune", method_settings={"base": "flap", "gamma": 0.1}, target="kv_cache=50M@4096"),
    prune.Settings("m", regular=True, marks=("neutral", "folded"), only=("*.mlp.*",), dtype="float16"),
    learn.Settings(("split:digits:5", "größer/\x7f\n"), method_settings={"levels": [1, 2], "named": True}, lr=1e-5),
    search.Settings("cells:4-3-2", "digits", "macs=20%", memory="2GiB", inherit=True, validation=0.25),
    evaluate.Settings("m", choices=("a.jsonl",), speed=True),
]


@pytest.mark.parametrize("settings", RUNS, ids=lambda one: type(one).__module__[16:])
def test_settings_are_read_as_they_are_written(settings, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(format_settings(settings), encoding="utf-8")
    again = build_settings(type(settings), {}, read_settings(path, type(settings)))
    assert asdict(again) == asdict(settings)


def test_what_names_code_and_the_folder_of_a_run_stay_out(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    pruning = prune.Settings("mynets:tiny", method="flap", keep=0.5)
    path.write_text(format_settings(pruning))
    assert "mynets" not in path.read_text() and left_out(pruning) == ["mynets:tiny"]
    assert build_settings(prune.Settings, {"model": "mynets:tiny"}, read_settings(path, prune.Settings)) == pruning
    recovery = recover.Settings("runs/a", "refit", tokens=64)
    assert left_out(recovery) == ["runs/a"] and "runs/a" not in format_settings(recovery)


REFUSED = {
    "unknown name": ("a.toml", "epoch = 3", "'epoch' is no setting of `regrow learn`; did you mean epochs?"),
    "nothing near": ("a.toml", "zzzzzz = 3", "see `regrow learn --help`"),
    "another type": ("a.toml", 'epochs = "3"', "epochs must be a whole number, got '3'"),
    "out of range": ("a.toml", "lr = inf", "lr must be between 0 and 1,000, got inf"),
    "too many digits": ("a.toml", "seed = " + "9" * 400, "seed must be 0 to 9,223,372,036,854,775,807, got 999"),
    "no choice": ("a.toml", 'scenario = "tusk"', "scenario must be one of domain, class, task, got 'tusk'"),
    "code as model": ("a.toml", 'model = "os:getcwd"', "only the command line names code"),
    "code as method": ("a.toml", 'method = "os:getcwd"', "only the command line names code"),
    "an output": ("a.toml", 'out = "b"', "out is given on the command line only"),
    "another file": ("a.toml", 'config = "b.toml"', "config is given on the command line only"),
    "twice": ("a.toml", "seed = 1\nseed = 2", "is not TOML"),
    "nested beyond measure": ("a.toml", "seed = " + "[" * 5000, "is not TOML"),
    "a date": ("a.toml", "set = {since = 2000-01-01}", "holds what JSON cannot"),
    "damaged": ("a.toml", "seed = ", "is not TOML"),
    "another format": ("a.json", "{}", "a settings file is TOML (.toml)"),
    "too long": ("a.toml", "#" * (MAX_BYTES + 1), "at most 1,048,576 are read"),
    "no text": ("a.toml", b"\xff\xfe\x00", "not text in UTF-8"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    file, text, says = REFUSED[name]
    path = tmp_path / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read_settings(path, learn.Settings, elsewhere=("--out", "--config"))
    assert says in str(caught.value) and "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_name_of_code_is_refused_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    kinds = (prune.Settings, recover.Settings, learn.Settings, search.Settings, evaluate.Settings)
    named = [(kind, field) for kind in kinds for field in options_of(kind) if field.setting.code]
    assert {f"{kind.__module__[16:]} {field.key}" for kind, field in named} == {
        "prune model", "prune method", "recover by", "learn model", "learn method", "search space",
        "search method", "evaluate model",
    }  # fmt: skip
    for kind, field in named:
        path.write_text(f'{field.key} = "os:getcwd"')
        with pytest.raises(InputError, match="only the command line names code"):
            read_settings(path, kind)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_settings(tmp_path / "a.toml", learn.Settings)
    (tmp_path / "b.toml").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        read_settings(tmp_path / "b.toml", learn.Settings)


def test_names_are_those_of_options(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(
        'keep = "80%"\nround = 8\neval-tokens = 64\nno-verify = true\nsource = "news"\n'
        'set = {base = "flap", gamma = 1}\n'
    )
    assert read_settings(path, prune.Settings) == {
        "keep": 0.8,
        "round_to": 8,
        "eval_tokens": 64,
        "proof": False,
        "sources": ("news",),
        "method_settings": {"base": "flap", "gamma": 1},
    }


def test_a_size_is_recorded_in_one_way(tmp_path: Path) -> None:
    target = prune.Settings("m", target="params=70%")
    assert prune.Settings("m", smaller=0.3) == prune.Settings("m", keep=0.7, measure="params") == target
    assert (target.keep, target.measure, target.smaller) == (None, "params", None)
    assert command_line(target) == "regrow prune m --method flap --target params=70%"
    assert search.Settings("cells:4-2-1", "digits", smaller=0.8).target == "params=20%"
    path = tmp_path / "a.toml"
    for text, means in (
        ('smaller = "30%"', target),
        (format_settings(target), target),
        ('keep = 0.7\nmeasure = "params"', target),
        ('keep = 0.7\nmeasure = "macs"', prune.Settings("m", keep=0.7, measure="macs")),
    ):
        path.write_text(text)
        assert build_settings(prune.Settings, {"model": "m"}, read_settings(path, prune.Settings)) == means
    with pytest.raises(InputError, match="--smaller must be between 0 and 1, got 30; for example --smaller 30%"):
        prune.Settings("m", smaller=30)
    with pytest.raises(InputError, match="--target: a target is written like"):
        search.Settings("cells:4-2-1", "digits", "half")


def test_the_command_line_counts() -> None:
    file = {"model": "m", "keep": 0.5, "method_settings": {"a": 1, "b": 2}, "seed": 3}
    built = build_settings(prune.Settings, {"target": "bytes=2M", "method_settings": {"b": 4}}, file)
    assert built == prune.Settings("m", target="bytes=2M", method_settings={"a": 1, "b": 4}, seed=3)
    with pytest.raises(InputError, match=r"say how much stays, by one of --keep 0\.8, --target .* or --smaller 30%"):
        build_settings(prune.Settings, {"model": "m"}, {"keep": 0.5, "target": "bytes=2M"})
    with pytest.raises(InputError, match="MODEL is missing; for example `regrow prune smollm2-135m"):
        build_settings(prune.Settings, {"keep": 0.5}, {})
