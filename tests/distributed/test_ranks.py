"""Who a process is among several, and what happens when one of them ends."""

import time
from pathlib import Path

import pytest

from distributed.processes import finish, start
from regrow.distributed import SINGLE, Ranks, read_ranks
from regrow.errors import InputError

EXCHANGE = """
import torch
from torch import nn
from regrow.distributed import read_ranks
from regrow.distributed import exchange
from regrow.distributed.group import connected

ranks = read_ranks()
with connected(ranks, print):
    assert exchange.broadcast_record(ranks, {"rank": ranks.rank}) == {"rank": 0}
    assert exchange.gather_rows(ranks, list(ranks.share("abcde"))) == list("abcde" if ranks.leads else "bd")
    assert exchange.everywhere(ranks, True) and not exchange.everywhere(ranks, ranks.leads)
    if ranks.leads:
        for number in range(3):
            record, tensors = exchange.receive(1)
            assert record == number and tensors[1].dtype == torch.bfloat16 and tensors[2].shape == (0, 2)
            assert tensors[0].tolist() == [number] * 3
    else:
        outbox = exchange.Outbox()
        for number in range(3):
            parts = torch.full((3,), float(number)).double(), torch.ones(2, 2).bfloat16(), torch.ones(0, 2)
            outbox.send(number, parts)
        outbox.flush()
    torch.manual_seed(ranks.rank)
    model = nn.BatchNorm1d(3)
    nn.init.normal_(model.weight)
    exchange.broadcast_model(ranks, model)
    torch.manual_seed(0)
    assert torch.equal(model.weight, nn.init.normal_(torch.empty(3)))
"""

KILLED = """
import os, signal, sys, time
from regrow.distributed import exchange, read_ranks, watch
from regrow.distributed.group import connected

watch.SILENCE = 3.0
ranks = read_ranks()

def lost(line):
    os.write(2, line.encode())
    os._exit(4)

with connected(ranks, lost):
    exchange.broadcast_record(ranks)
    if ranks.rank == int(sys.argv[1]):
        if sys.argv[2] == "raise":
            raise ValueError("the file is missing")
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[3] == "wait":
        exchange.receive(int(sys.argv[1]))
    time.sleep(60)
"""


def test_the_environment_says_which_rank_this_is():
    assert read_ranks({}) == read_ranks({"WORLD_SIZE": "1", "RANK": "0"}) == SINGLE
    assert read_ranks({"WORLD_SIZE": "3", "RANK": "2"}) == Ranks(2, 3)
    for wrong in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}):
        with pytest.raises(InputError, match="start them with torchrun"):
            read_ranks(wrong)


def test_shares_are_all_items_in_turn():
    assert [list(Ranks(rank, 2).share([1, 2, 3])) for rank in (0, 1)] == [[1, 3], [2]]
    assert SINGLE.share("abc") == "abc"


def test_records_and_tensors_arrive_in_order():
    assert [code for _, _, code in finish(start("-c", EXCHANGE))] == [0, 0]


@pytest.mark.parametrize(
    ("rank", "how", "other", "line"),
    [
        (1, "kill", "work", "rank 1 of 2 has ended, killed or out of memory"),
        (0, "kill", "wait", "rank 0 of 2 has ended, killed or out of memory"),
        (1, "raise", "wait", "rank 1 of 2 failed: the file is missing"),
    ],
)
def test_an_ended_rank_ends_the_others_with_its_name(rank, how, other, line):
    began = time.monotonic()
    results = finish(start("-c", KILLED, str(rank), how, other))
    _, errors, code = results[1 - rank]
    assert code == 4
    assert line in errors
    assert len(errors.splitlines()) == 1
    assert time.monotonic() - began < 40


def test_commands_for_one_process_refuse_several(monkeypatch, capsys):
    from regrow.cli import code_of

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert code_of(["history", str(Path(__file__).parent)]) == 2
    assert "history runs in one process, and this is rank 1 of 2" in capsys.readouterr().err
