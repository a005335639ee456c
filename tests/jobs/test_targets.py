"""Targets are met by what is stored and computed: counted on the network itself, not by what priced it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import regrow
from regrow import nets
from regrow.api.prune import prune
from regrow.core.amounts import Target
from regrow.core.axes import Example
from regrow.core.budget import Budget
from regrow.core.sources import Batch, Source
from regrow.data.vision import find_common_side
from regrow.evaluation import dense, macs, size
from regrow.jobs import search as searching
from regrow.jobs.recording import Invocation
from regrow.jobs.search import Settings, search_named
from regrow.jobs.search_inputs import parse_target, read_search_data
from regrow.settings.search import parse_search_target
from regrow.store import save
from regrow.store.run_folder import RunFolder
from regrow.tracing import trace

TINY: dict[str, Any] = {"train": 120, "test": 60, "batch_size": 48, "epochs": 2, "retrain": 0, "stride": 1, "stages": 1}
QUICK = {"warm": 0, "every": 1}
FIELD = {"params": "parameters"}


def row(folder: RunFolder, what: str) -> dict[str, Any]:
    """The last row of a kind."""
    return [one for one in folder.metrics() if one["what"] == what][-1]


@pytest.mark.parametrize(
    ("space", "measure", "share", "levels", "seed"),
    [
        ("cells:4-2-1", "params", 30, None, 0),
        ("cells:4-2-1", "macs", 30, None, 1),
        ("cells:4-2-1", "bytes", 40, None, 2),
        ("cells:4-2-1", "nonzero", 20, None, 3),
        ("cells:4-2-1", "macs", 45, ("operations",), 4),
        ("cells:4-2-1", "bytes", 60, ("operations",), 5),
        ("mobile:4-1", "macs", 40, None, 6),
        ("resnet:4-2", "macs", 30, None, 8),
        ("resnet:4-2", "bytes", 40, ("filters",), 9),
        ("resnet:4-2", "nonzero", 40, None, 10),
    ],
)
def test_no_target_of_a_search_is_exceeded(
    space: str, measure: str, share: int, levels: tuple[str, ...] | None, seed: int, tmp_path: Path
) -> None:
    """Counted on the found network as dense kernels run it, and by the size of its file."""
    own = QUICK | ({"levels": levels} if levels else {})
    settings = Settings(space, "digits", f"{measure}={share}%", method_settings=own, seed=seed, **TINY)
    folder = search_named(settings, Invocation(tmp_path / "run"))
    levels_row, net = row(folder, "levels"), regrow.load(folder.path / "found")
    counted = dense(net, read_search_data(settings).test.inputs[:1])
    assert levels_row["measure"] == measure
    assert counted[FIELD.get(measure, measure)] <= levels_row["asked"]
    told = row(folder, "found")
    assert {name: told[name] for name in counted} == counted
    if measure == "nonzero":
        assert counted["nonzero"] <= levels_row["size"] <= levels_row["asked"]
        assert counted["nonzero"] < counted["parameters"]
    else:
        assert levels_row["saved"]["weights"] == 0 and levels_row["size"] == counted[FIELD.get(measure, measure)]
        assert counted["nonzero"] > 0.98 * counted["parameters"], "no weights are masked where that pays nothing"
    file = folder.path / "found" / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size == counted["bytes"] + header


def test_a_target_in_macs_counts_masked_weights_like_others(tmp_path: Path) -> None:
    """At first 0.1 M bought 0.3 M: what was masked cost nothing, and the kernels computed it all the same."""
    folder = search_named(
        Settings("cells:4-2-1", "digits", "macs=20k", method_settings=QUICK, **TINY), Invocation(tmp_path / "run")
    )
    net = regrow.load(folder.path)
    assert dense(net, torch.zeros(1, 1, 8, 8))["macs"] == macs(trace(net, torch.zeros(3, 1, 8, 8))) <= 20_000
    with pytest.raises(ValueError, match="take a target in nonzero"):
        wrong = QUICK | {"levels": ("filters", "weights")}
        search_named(
            Settings("cells:4-2-1", "digits", "macs=20k", method_settings=wrong, **TINY), Invocation(tmp_path / "other")
        )


def test_a_share_is_of_stored_parameters_or_of_what_it_names() -> None:
    parts = read_search_data(Settings("cells:4-2-1", "digits", "params=20%", **TINY))
    model, _, _ = searching.build_space(Settings("cells:4-2-1", "digits", "params=20%", **TINY), parts.search)
    one, two = (trace(model, parts.search.train.inputs[:n]) for n in (1, 2))
    counted = dense(model, parts.search.train.inputs[:2])
    for text, name in (
        ("params=25%", "parameters"),
        ("nonzero=25%", "parameters"),
        ("macs=25%", "macs"),
        ("bytes=25%", "bytes"),
    ):
        measure, most = parse_target(text, one)
        assert (measure, most) == parse_target(text, two) and measure == parse_search_target(text).measure
        assert most == counted[name] / 4 or name == "macs"  # which counts classifiers of earlier stages too


class Attending(nn.Module):
    """A network whose first dimension is the batch, with products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three numbers per row."""
        x = self.first(x)
        return self.last(self.hidden(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def convolutional() -> nn.Module:
    """A network for images of 8 × 8."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize(("make", "shape"), [(convolutional, (1, 8, 8)), (Attending, (5, 8))])
def test_macs_are_of_one_example_whatever_the_batch(make: Any, shape: tuple[int, ...]) -> None:
    """At first those of the traced batch were counted, so a target cut as many times too deep as it has examples."""
    plans, counts = [], []
    for batch in (1, 64):
        torch.manual_seed(0)
        net, x = make(), torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0))
        counts.append(macs(trace(net, x)))
        source = Source("noise", [Batch((x,), labels=torch.zeros(batch, dtype=torch.long))])
        most = f"macs={0.8 * counts[0]:.0f}"
        small, plan = prune(net, [source], method="magnitude", target=most, settings={"compensate": False})
        plans.append({key: change.keep for key, change in plan.changes.items()})
        assert 0.7 * counts[0] < macs(trace(small, x[:1])) <= 0.8 * counts[0]
    assert counts[0] == counts[1] and plans[0] == plans[1]


@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_no_target_of_pruning_is_exceeded(unit: str, share: float) -> None:
    net, x = convolutional(), torch.randn(4, 1, 8, 8)
    name = FIELD.get(unit, unit)
    most = int(share * dense(net, x)[name])
    source = Source("noise", [Batch((x,))])
    small, _ = prune(net, [source], method="flap", target=f"{unit}={most}")
    assert 0.8 * most < dense(small, x)[name] <= most


def test_nonzero_is_nothing_to_prune_to() -> None:
    with pytest.raises(ValueError, match="use params"):
        Budget(target=Target.parse("nonzero=50k"))


def test_bytes_are_those_of_the_file_in_its_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).to(dtype)
        file = save(net, tmp_path / f"{dtype}") / "model.safetensors"
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header == size(net, dtype=dtype)["bytes"]


def test_an_input_is_given_or_that_of_the_source_or_a_guess_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """At first a network for 8 × 8 images was traced at 224 × 224 without a word: 784 times its MACs."""
    (tmp_path / "own_cnn.py").write_text(
        "import torch\nfrom torch import nn\n\ndef net():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    right = dense(convolutional(), torch.zeros(1, 1, 8, 8))["macs"]
    x = torch.zeros(2, 1, 8, 8)
    for given in ({"pixels": 8}, {"example": (1, 1, 8, 8)}, {"example": Example((x,))}):
        loaded = nets.load("own_cnn:net", **given)
        assert macs(trace(loaded.model, *loaded.example.args)) == right and not loaded.guessed
    assert not caplog.records
    loaded = nets.load("own_cnn:net")
    assert macs(trace(loaded.model, *loaded.example.args)) > 700 * right and loaded.guessed
    assert caplog.messages == [
        "example input: 1x1x224x224 (guessed; set it with --input 1x3x32x32 or example=, or give an image source)"
    ]
    with pytest.raises(nets.ModelError, match="does not take an input of 1x3x8x8"):
        nets.load("own_cnn:net", example=(1, 3, 8, 8))


def test_the_side_of_the_images_of_a_folder(tmp_path: Path) -> None:
    from PIL import Image

    for i, (w, h) in enumerate(((8, 8), (8, 8), (8, 6))):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((h, w), np.uint8)).save(tmp_path / "a" / f"{i}.png")
        assert find_common_side(tmp_path) == (8 if i < 2 else 0)
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    assert find_common_side(tmp_path) == 0 == find_common_side(tmp_path / "b")
