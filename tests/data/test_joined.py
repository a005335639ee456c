"""Joined batches hold the same examples in the same shards, and measure the same."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

import pytest
import torch

from hand import lm, texts
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source
from regrow.data.batch_streams import BatchStream, join_batches, join_sources
from regrow.scoring.collect import collect


@pytest.mark.parametrize(("windows", "most", "shards"), [(7, 3, 2), (16, 4, 4), (5, 8, 3), (6, 1, 2)])
def test_each_shard_keeps_its_examples(windows: int, most: int, shards: int) -> None:
    one = Source("s", [Batch((torch.full((1, 3), i),), {"use_cache": False}) for i in range(windows)], "origin")
    joined = join_batches(one, most, shards)
    for shard in range(shards):
        rows = torch.cat([batch.args[0] for batch in joined.batches[shard::shards]])
        assert rows[:, 0].tolist() == list(range(shard, windows, shards))
    assert max(len(batch.args[0]) for batch in joined) <= most
    assert (joined.name, joined.origin) == (one.name, one.origin)


def test_batches_of_other_shapes_are_not_joined() -> None:
    shapes = [(1, 3), (1, 3), (1, 4), (2, 4), (5, 4)]
    rows = [Batch((torch.zeros(shape),), {}, torch.zeros(shape)) for shape in shapes]
    assert [tuple(batch.args[0].shape) for batch in join_batches(Source("s", rows), 4)] == [(2, 3), (3, 4), (5, 4)]
    positions = [Batch((torch.zeros(n, 3),), {"position_ids": torch.arange(3)[None]}) for n in (2, 2, 1)]
    assert len(join_batches(Source("s", positions), 8)) == 3, "position ids of all examples are not per example"
    other = [Batch((torch.zeros(1, 3),), {"use_cache": flag}) for flag in (True, False)]
    assert len(join_batches(Source("s", other), 4)) == 2


def test_the_statistics_are_those_of_single_windows() -> None:
    model, axes = lm()
    source = texts("a")
    single = Source("a", [Batch((row[None],), batch.kwargs) for batch in source for row in batch.args[0]])
    measured = partial(collect, model, axes, needs={Need.ACTIVATIONS}, shards=2)
    for one, other in zip(measured([single])["a"], measured([join_batches(single, 3, 2)])["a"], strict=True):
        assert one.tokens == other.tokens
        for name, moments in one.moments.items():
            joined = other.moments[name]
            assert moments.count == joined.count
            torch.testing.assert_close(moments.total, joined.total, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(moments.square, joined.square, rtol=1e-4, atol=1e-4)


def test_batches_of_a_loader_are_read_as_they_come_and_those_in_memory_are_joined() -> None:
    read: list[int] = []

    class Loader:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[torch.Tensor]:
            for i in range(3):
                read.append(i)
                yield torch.full((1, 2), i)

    held = Source("held", [Batch((torch.zeros(1, 2),)) for _ in range(3)])
    chain = join_sources([held, Source("loader", BatchStream(Loader(), "loader"))], 2)
    assert not read and len(chain) == 5
    assert [len(batch.args[0]) for batch in islice(chain, 3)] == [2, 1, 1]
    assert read == [0], "no further than was asked for"
    assert int(chain[-1].args[0][0, 0]) == 2 and len(chain[1:3]) == 2
    with pytest.raises(IndexError):
        chain[5]
