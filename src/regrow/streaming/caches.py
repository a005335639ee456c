"""Keep memory that libraries would keep for later within bounds, however many blocks a network has."""

import os

from regrow.process_memory import set_mmap_threshold

KERNELS = 32
"""How many compiled kernels oneDNN keeps: those of a block. It would keep 1024, and each width of a cut network has its
own."""


MAPPED = 2**22
"""From how many bytes on memory is mapped: freed, it goes back to the system."""


def limit_caches() -> None:
    """Let oneDNN keep few compiled kernels, and the C library no large pieces of memory.

    The first has no effect once a kernel was compiled, or where the user has set the variable.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    set_mmap_threshold(MAPPED)
