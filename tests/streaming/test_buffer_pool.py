"""The memory of released tensors is used again, and no tensor that is in use changes."""

from regrow.streaming.checkpoint import BufferPool


def test_a_released_buffer_is_used_again_and_one_in_use_is_not() -> None:
    pool = BufferPool()
    first, second = pool.allocate(1000), pool.allocate(1000)
    view, place = first[10:20], second.data_ptr()
    first.fill_(1)
    del first, second
    third, fourth = pool.allocate(900), pool.allocate(1000)
    assert third.data_ptr() == place and len(third) == 900  # the other one is still read through a view
    third.fill_(2), fourth.fill_(3)
    assert view.tolist() == [1] * 10


def test_free_buffers_give_way_to_those_of_another_size() -> None:
    pool = BufferPool()
    held = [pool.allocate(1000) for _ in range(3)]
    del held
    assert sum(map(len, pool.free)) == 3000
    other = pool.allocate(1500)
    assert sum(map(len, pool.free)) + len(other) <= 3000
    pool.clear()
    assert not pool.free
    del other
    assert [len(one) for one in pool.free] == [1500]
