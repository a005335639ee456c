"""The memory of this process as the system counts it, and the freed memory that the C library keeps."""

import ctypes
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from mmap import PAGESIZE
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # numbers of parameters in malloc.h
_MADV_PAGEOUT = 21
# The fewest bytes of memory-mapped tensors for which it is worth asking to reclaim their pages
LEAST_MAPPED_BYTES = 2**26


def read_resident() -> int:
    """Return the bytes of resident memory that this process has now; 0 if the system does not say."""
    return _read_status("VmRSS") or 0


def read_peak() -> int | None:
    """Return the peak resident memory of this process in bytes, since :func:`reset_peak`; ``None``: unknown."""
    return _read_status("VmHWM")


def reset_peak() -> bool:
    """Set the peak of this process's resident memory to what it holds now; return whether the system can do that."""
    try:  # Linux: writing 5 resets the high-water mark
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def return_memory() -> bool:
    """Give freed memory that the C library keeps back to the system; return whether the library can do that."""
    return _call_c_library("malloc_trim", 0)


def set_mmap_threshold(size_bytes: int, kept_bytes: int = 0) -> None:
    """Let allocations of ``size_bytes`` or more go back to the system once they are freed, where the C library can.

    ``kept_bytes``: how many freed bytes of smaller ones it keeps at the end of the heap; 0: this setting stays.
    """
    _call_c_library("mallopt", _MMAP_THRESHOLD, size_bytes)
    if kept_bytes:
        _call_c_library("mallopt", _TRIM_THRESHOLD, kept_bytes)


@contextmanager
def keep_memory() -> Iterator[None]:
    """Context manager in which the C library keeps freed memory, for steps that make and free gigabytes of arrays."""
    _call_c_library("mallopt", _MMAP_MAX, 0)
    _call_c_library("mallopt", _TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _call_c_library("mallopt", _MMAP_MAX, 65536)
        _call_c_library("mallopt", _TRIM_THRESHOLD, 2**25)
        return_memory()


def share_cores() -> None:
    """Let torch's threads sleep while they wait, not spin, and start no more than the control group's quota allows.

    It has an effect before torch is loaded; environment variables of the user's stay.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with suppress(OSError, ValueError):  # no control group, or no quota ("max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split())
        if quota < period * (os.cpu_count() or 1):
            os.environ.setdefault("OMP_NUM_THREADS", str(max(1, quota // period)))


def limit_arenas() -> None:
    """Let threads reuse memory that others have freed, for the rest of the process (malloc with a single arena).

    It has an effect before the process has many threads.
    """
    _call_c_library("mallopt", _ARENA_MAX, 1)


def release_pages(tensors: "Iterable[Tensor]") -> None:
    """Let Linux reclaim the pages of tensors in memory-mapped files, from which they are read again when used.

    Tensors elsewhere are left alone; of less than ``LEAST_MAPPED_BYTES`` in all, so are these.
    A checkpoint stays mapped while any of its tensors is in use, and its pages count as memory of the process.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    plain = (x for x in tensors if x.layout is torch.strided and x.device.type == "cpu" and x.is_contiguous())
    large = [x for x in plain if not isinstance(x, FakeTensor) and x.nbytes >= 2 * PAGESIZE]
    if sys.platform != "linux" or sum(x.nbytes for x in large) < LEAST_MAPPED_BYTES:
        return
    try:
        rows = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    except OSError:
        return
    files = [row[0].split("-") for row in rows if row[4] != "0"]
    ranges = sorted((int(start, 16), int(stop, 16)) for start, stop in files)
    for tensor in large:
        begin = -(-tensor.data_ptr() // PAGESIZE) * PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // PAGESIZE * PAGESIZE
        last = bisect_right(ranges, begin, key=lambda mapped: mapped[0]) - 1
        if last >= 0 and end <= ranges[last][1]:  # advice: where the kernel does not know it, nothing happens
            _call_c_library("madvise", ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_PAGEOUT)


def _call_c_library(function: str, *arguments: object) -> bool:
    """Call a function of the C library and return True, whatever it returns; False where it has none of that name."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _read_status(field: str) -> int | None:
    """Return a field of this process's status file in bytes (``VmRSS``, ``VmHWM``); ``None`` if there is none."""
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(dict(line.split(":", 1) for line in lines if ":" in line)[field].split()[0]) * 1024
    return None
