"""Give back the resident memory of memory-mapped weights that a plan has replaced."""

import ctypes
import sys
from bisect import bisect_right
from collections.abc import Iterable
from mmap import PAGESIZE
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LEAST = 2**26
"""The fewest bytes for which it is worth asking."""
_MADV_PAGEOUT = 21


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Let Linux reclaim the pages of tensors in memory-mapped files; they are read again from there if they are used.

    A checkpoint stays mapped while any of its tensors is in use, and its pages count as memory of the process.

    Args:
        tensors: Tensors that are not expected to be read again; those in other memory are left alone.
    """
    large = [one for one in tensors if _is_plain(one) and one.nbytes >= 2 * PAGESIZE]
    if sys.platform != "linux" or sum(one.nbytes for one in large) < LEAST:
        return
    ranges = _mapped_ranges()
    starts = [start for start, _ in ranges]
    advise = ctypes.CDLL(None).madvise
    for one in large:
        begin, end = -(-one.data_ptr() // PAGESIZE) * PAGESIZE, (one.data_ptr() + one.nbytes) // PAGESIZE * PAGESIZE
        place = bisect_right(starts, begin) - 1
        if place >= 0 and end <= ranges[place][1]:  # advice: where the kernel does not know it, nothing happens
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)


def _is_plain(tensor: Tensor) -> bool:
    strided = tensor.layout is torch.strided and tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    return strided and tensor.is_contiguous()


def _mapped_ranges() -> list[tuple[int, int]]:
    """Return the address ranges of this process that files are mapped to, in ascending order."""
    try:
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return []
    files = [row[0].split("-") for row in rows if row[4] != "0"]
    return sorted((int(start, 16), int(stop, 16)) for start, stop in files)
