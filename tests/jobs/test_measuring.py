"""What jobs measure of networks before and after a cut."""

import pytest
import torch
from torch import Tensor, nn

import regrow
from regrow.jobs.measuring import log_speed


class Seen(nn.Module):
    """A layer that notes the dtype in which it computes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer, self.seen = nn.Linear(4, width), nn.Linear(width, 4), set[torch.dtype]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        self.seen.add(hidden.dtype)
        return self.outer(hidden)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_both_networks_are_timed_in_the_precision_of_the_run(precision: str) -> None:
    before, after, rows = Seen(8), Seen(4), []
    record = type("Record", (), {"log": lambda self, what, row, **values: rows.append((what, row | values))})()
    axes = regrow.trace(before, torch.ones(2, 4))
    before.seen.clear()
    log_speed(record, before, after, axes, 0, precision)
    assert before.seen == after.seen == {getattr(torch, precision)}
    ((what, row),) = rows
    assert what == "latency" and row["whole"] > 0 and row["found"] > 0 and row["tokens"] == 0
