"""Who a process is among several, and what happens when one of them ends."""

import time
from pathlib import Path

import pytest
import torch

from distributed.processes import finish, free_port, start
from regrow.core.errors import InputError, ResourceError
from regrow.distributed import SINGLE, ProcessRank, choose_rank_device, read_ranks
from regrow.nets.devices import choose_device

RUN = Path(__file__).parents[1] / "fixtures" / "runs" / "prune"

EXCHANGE = """
import os, sys
import torch
from torch import nn
from regrow.distributed import read_ranks
from regrow.distributed import parallel
from regrow.distributed.parallel import connected

ranks = read_ranks()
with connected(ranks):
    assert parallel.broadcast_record(ranks, {"rank": ranks.rank}) == {"rank": 0}
    assert parallel.gather_rows(ranks, list(ranks.share("abcde"))) == list("abcde")
    assert parallel.everywhere(ranks, True) and not parallel.everywhere(ranks, ranks.leads)
    if ranks.leads:
        for number in range(3):
            record, tensors = parallel.receive(1)
            assert record == number and tensors[1].dtype == torch.bfloat16 and tensors[2].shape == (0, 2)
            assert tensors[0].tolist() == [number] * 3
    else:
        for number in range(3):
            parts = torch.full((3,), float(number)).double(), torch.ones(2, 2).bfloat16(), torch.ones(0, 2)
            parallel.send(number, parts)
    tensors = [torch.full((3,), float(ranks.rank)), torch.full((2,), ranks.rank).bfloat16()]
    parallel.broadcast_tensors(ranks, tensors)
    assert not any(tensor.any() for tensor in tensors)
"""

DIFFERENT = """
os.environ["MASTER_PORT"] = sys.argv[1]  # the same processes meet for the second time
from regrow.jobs.inputs import SourceHalves
from regrow.jobs.inputs import check_same_inputs, check_same_settings, check_same_tasks
from regrow.distributed.parallel import Parallel
from regrow.core.errors import InputError
from regrow.settings.prune import Settings
from regrow.core.sources import Batch, Source
from regrow.core.tasks import Examples, Task

def refuse(function, *inputs):
    try:
        function(ranks, *inputs)
    except InputError as error:
        return str(error)

def network(seed):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)

def changed(entry, value):
    model = nn.Linear(100, 100)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    with torch.no_grad():
        model.weight.view(-1)[entry] = value
    return model

def source(value):
    return SourceHalves((Source("mail", [Batch((torch.full((2,), value),))]),), ())

def task(train, test):
    parts = (Examples(torch.full((2, 3), float(value)), torch.tensor([0, 1])) for value in (train, test))
    return Task("letters", *parts, (0, 1))

ranks = read_ranks()
with connected(ranks):
    rank = ranks.rank
    assert refuse(check_same_inputs, [network(0)], source(1)) is None
    assert "different weights; seed the function" in refuse(check_same_inputs, [network(rank)], source(1))
    for model in (changed(9000, 1e-9 * rank), changed(9000 + rank, 1.0)):
        assert "different weights" in refuse(check_same_inputs, [model], source(1))
    assert "different data for mail; copy" in refuse(check_same_inputs, [network(0)], source(rank))
    halves = SourceHalves(source(rank).calibration, source(1).calibration)
    assert "different data for mail; copy" in refuse(check_same_inputs, [network(0)], halves)
    assert refuse(check_same_tasks, network(0), [task(1, 1)]) is None
    for tasks in ([task(rank, 1)], [task(1, rank)], [task(rank, 1), task(1, 1)]):
        assert "different data for letters; copy" in refuse(check_same_tasks, network(0), tasks)
    assert refuse(check_same_settings, Settings(f"model{rank}", keep=0.5)) is None
    assert "different settings" in refuse(check_same_settings, Settings("model", keep=0.5 + 0.1 * rank))
    one, other, neither = (nn.Parameter(torch.ones(2)) for _ in range(3))
    (one if ranks.leads else other).grad = torch.full((2,), 2.0)
    parallel = Parallel(ranks)
    assert parallel.reduce([one, other, neither], 1.5) == 3
    assert one.grad.tolist() == other.grad.tolist() == [2, 2] and neither.grad is None
"""

KILLED = """
import os, signal, sys
from regrow.core.errors import ResourceError
from regrow.distributed import parallel, read_ranks

ranks = read_ranks()
try:
    with parallel.connected(ranks):
        parallel.broadcast_record(ranks)
        if ranks.rank == int(sys.argv[1]):
            if sys.argv[2] == "raise":
                raise ValueError("the file is missing")
            os.kill(os.getpid(), signal.SIGKILL)
        parallel.receive(int(sys.argv[1]))
except ResourceError as error:
    sys.exit(f"{error}")
"""


def test_the_environment_says_which_rank_this_is():
    assert read_ranks({}) == read_ranks({"WORLD_SIZE": "1", "RANK": "0"}) == SINGLE
    assert read_ranks({"WORLD_SIZE": "3", "RANK": "2"}) == ProcessRank(2, 3, local=2)
    assert read_ranks({"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "0"}) == ProcessRank(2, 4, local=0)
    for wrong in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "two", "RANK": "0"}):
        with pytest.raises(InputError, match="start them with torchrun"):
            read_ranks(wrong)


@pytest.mark.parametrize(
    ("name", "ranks", "gpus", "result"),
    [
        ("cuda", SINGLE, 1, "cuda"),
        ("cuda:1", SINGLE, 2, "cuda:1"),
        ("cpu", ProcessRank(1, 2, local=1), 2, "cpu"),
        ("auto", ProcessRank(1, 2, local=1), 0, "cpu"),
        ("auto", ProcessRank(1, 2, local=1), 2, "cuda:1"),
        ("cuda", ProcessRank(3, 4, local=1), 2, "cuda:1"),
        ("cuda:1", ProcessRank(3, 4, local=1), 2, "cuda:1"),
        ("cuda:1", ProcessRank(2, 4, local=0), 2, "use cpu, or cuda: rank 2 of 4 gets cuda:0"),
        ("mps", ProcessRank(1, 2, local=1), 0, "use cpu, or cuda"),
        ("cuda", ProcessRank(1, 2, local=1), 1, "rank 1 of 2 needs cuda:1, and this machine has 1 GPUs"),
    ],
)
def test_each_of_several_processes_gets_a_gpu_of_its_own(name, ranks, gpus, result):
    if " " in result:
        with pytest.raises((InputError, ResourceError), match=result):
            choose_rank_device(name, ranks, gpus, {})
    else:
        assert choose_rank_device(name, ranks, gpus, {}) == result


def test_a_process_that_sees_one_gpu_takes_it():
    ranks = ProcessRank(1, 2, local=1)
    assert choose_rank_device("cuda", ranks, 1, {"CUDA_VISIBLE_DEVICES": "3"}) == "cuda:0"
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        with pytest.raises(ResourceError, match="needs cuda:1"):
            choose_rank_device("cuda", ranks, 1, visible)


def test_a_device_is_chosen_by_rank_only_where_a_run_is_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(choose_device(name)) for name in ("cuda:0", "auto", "cpu")] == ["cuda:0", "cuda", "cpu"]
    assert str(choose_device("auto", ProcessRank(1, 2, local=1))) == "cuda:1"


def test_shares_are_all_items_in_turn():
    assert [list(ProcessRank(rank, 2).share([1, 2, 3])) for rank in (0, 1)] == [[1, 3], [2]]
    assert SINGLE.share("abc") == "abc"


def test_records_arrive_in_order_different_inputs_are_refused_and_missing_gradients_stay_missing():
    results = finish(start("-c", EXCHANGE + DIFFERENT, str(free_port())))
    assert [code for _, _, code in results] == [0, 0], results


@pytest.mark.parametrize(("rank", "how"), [(1, "kill"), (0, "kill"), (1, "raise")])
def test_an_ended_rank_ends_those_that_wait_for_it(rank, how):
    began = time.monotonic()
    results = finish(start("-c", KILLED, str(rank), how))
    _, errors, code = results[1 - rank]
    assert code == 1
    assert f"rank {1 - rank} of 2 lost the connection to another rank, which has ended; the same command" in errors
    assert len(errors.splitlines()) == 1
    assert time.monotonic() - began < 40


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("prune", str(RUN), "--keep", "0.5", "--device", "cuda"),
            "--device cuda is for a single process; leave it out",
        ),
        (("recover", str(RUN), "--by", "refit"), "--by refit runs in one process, unlike lora and distil"),
        (("recover", str(RUN), "--by", "my.own:recovery"), "--by my.own:recovery runs in one process"),
        (("recover", str(RUN), "--by", "distil", "--memory", "4GiB"), "--memory predicts a recovery in one process"),
    ],
)
def test_options_for_one_process_are_refused_in_several(monkeypatch, tmp_path, capsys, words, line):
    from regrow.cli import run_command

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert run_command([*words, "--out", str(tmp_path / "out")]) == 2
    assert line in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_only_a_broken_connection_counts_as_one():
    import torch.distributed as dist

    from regrow.distributed.parallel import is_broken

    assert is_broken(RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer"))
    assert is_broken(dist.DistNetworkError("socket"))
    assert not is_broken(RuntimeError("the kernel timed out; Socket 3"))


def test_commands_for_one_process_refuse_several(monkeypatch, capsys):
    from regrow.cli import run_command

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run_command(["undo", str(Path(__file__).parent)]) == 2
    assert "undo runs in one process, and this is rank 1 of 2" in capsys.readouterr().err
