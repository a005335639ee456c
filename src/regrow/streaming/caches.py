"""Keep memory that libraries would keep for later within bounds, however many blocks a network has."""

import ctypes
import os
from contextlib import suppress

KERNELS = 32
"""How many compiled kernels oneDNN keeps: those of a block. It would keep 1024, and each width of a cut network has its
own."""


_MMAP_THRESHOLD, MAPPED = -3, 2**22
"""The option of the C library, and from how many bytes on memory is mapped: freed, it goes back to the system."""


def limit_caches() -> None:
    """Let oneDNN keep few compiled kernels, and the C library no large pieces of memory.

    The first has no effect once a kernel was compiled, or where the user has set the variable.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    with suppress(OSError, AttributeError, TypeError):  # another C library than that of Linux
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, MAPPED)


def return_memory() -> None:
    """Give memory that was freed back to the system, where the C library would keep it for later."""
    with suppress(OSError, AttributeError, TypeError):  # another C library than that of Linux
        ctypes.CDLL(None).malloc_trim(0)
