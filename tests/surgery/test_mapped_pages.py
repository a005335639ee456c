"""Pages of replaced weights are given back, and nothing else changes."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from regrow.core.process_memory import LEAST_MAPPED_BYTES, release_pages


def resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has this advice")
def test_pages_of_a_mapped_tensor_are_given_back_and_read_again(tmp_path: Path) -> None:
    save_file(
        {"a": torch.arange(LEAST_MAPPED_BYTES // 4, dtype=torch.int32), "b": torch.ones(3)}, tmp_path / "w.safetensors"
    )
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        one = file.get_slice("a")[:]
    last = int(one.sum())
    before = resident_bytes()
    release_pages([one, torch.ones(2), torch.ones(LEAST_MAPPED_BYTES // 4)])
    assert resident_bytes() < before - LEAST_MAPPED_BYTES // 2
    assert int(one.sum()) == last


def test_other_memory_is_left_alone() -> None:
    one = torch.ones(LEAST_MAPPED_BYTES // 2)
    release_pages([one, torch.empty(3, device="meta"), one[::2], torch.ones(3).to_sparse()])
    assert bool((one == 1).all())
