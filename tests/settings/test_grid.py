"""The file of a grid: its cells, their names, and what is refused."""

from pathlib import Path

import pytest

from regrow.errors import InputError
from regrow.settings.grid import Settings, read_grid

GRID = """
base: {tokens: 64, only: mlp, set: {compensate: false}}
grid:
  model: [smollm2-135m, models/a]
  keep: [0.8, 50%]
  source: [[news, code], mail=letters/]
  set: [{}, {minimum: 2}]
"""


def written(folder: Path, text: str) -> Path:
    (folder / "grid.yaml").write_text(text)
    return folder / "grid.yaml"


def test_cells_are_the_product_of_the_lists(tmp_path: Path) -> None:
    cells = read_grid(written(tmp_path, GRID))
    assert len(cells) == 16 == len({cell.name for cell in cells})
    first, last = cells[0], cells[-1]
    assert first.settings.model == "smollm2-135m" and first.settings.sources == ("news", "code")
    assert first.settings.only == ("mlp",) and first.settings.tokens == 64 and first.settings.keep == 0.8
    assert first.settings.method_settings == {"compensate": False}
    assert (
        last.settings.model == "models/a" and last.settings.keep == 0.5 and last.settings.sources == ("mail=letters/",)
    )
    assert last.settings.method_settings == {"compensate": False, "minimum": 2}
    assert last.values == {"model": "models/a", "keep": "50%", "source": "mail=letters/", "set": {"minimum": 2}}
    assert all("/" not in cell.name and len(cell.name) < 256 for cell in cells)


def test_a_cell_is_called_the_same_in_a_larger_grid(tmp_path: Path) -> None:
    small = read_grid(written(tmp_path, "grid: {model: [models/a], keep: [0.8]}"))
    large = read_grid(written(tmp_path, "grid: {model: [models/b, other/a, models/a], keep: [0.5, 0.8]}"))
    assert {cell.name for cell in small} < {cell.name for cell in large} and len(large) == 6


def test_a_share_in_the_grid_replaces_that_of_the_base(tmp_path: Path) -> None:
    text = "base: {model: m, keep: 0.8}\ngrid: {target: [params=70%, macs=50%]}"
    assert [cell.settings.keep for cell in read_grid(written(tmp_path, text))] == [None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {keep: [0.8]}", "MODEL is missing"),
        ("keep: [0.8]", "'keep' is neither base nor grid"),
        ("base: {model: m}", "base and grid hold names"),
        ("base: {model: m}\ngrid: {keep: 0.8}", "put one value under base"),
        ("base: {model: m}\ngrid: {keep: []}", "put one value under base"),
        ("base: {model: m}\ngrid: {keep: [0.8, 0.8]}", "the cell keep=0.8 twice"),
        ("base: {model: m}\ngrid: {keep: [0.8, 1.2]}", "keep must be above 0"),
        ("base: {model: m}\ngrid: {kep: [0.8]}", "did you mean keep?"),
        ("base: {model: m, seed: 1}\ngrid: {seed: [1]}", "seed is given in base and in grid"),
        ("base: {model: m, out: x}\ngrid: {seed: [1]}", "on the command line only"),
        ("base: {keep: 0.5}\ngrid: {model: [m, 'nets:tiny']}", "only the command line names code"),
        ("base: {model: m}\ngrid: {method: ['nets:mine']}", "only the command line names code"),
        ("base: {model: m}\ngrid: {seed: [*a]}", "grid.yaml"),
        (f"base: {{model: m}}\ngrid: {{seed: {list(range(101))}, tokens: {list(range(1, 101))}}}", "10,100 cells"),
    ],
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_grid(written(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_command_line_names_code_and_not_a_second_model(tmp_path: Path) -> None:
    (cell,) = read_grid(written(tmp_path, "grid: {keep: [0.5]}"), "nets:tiny")
    assert cell.settings.model == "nets:tiny"
    with pytest.raises(InputError, match="leave one out"):
        read_grid(written(tmp_path, "grid: {model: [m]}"), "nets:tiny")
    with pytest.raises(InputError, match="add --on ray"):
        Settings("grid.yaml", address="auto")
