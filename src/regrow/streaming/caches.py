"""Keep memory that libraries would keep for later within bounds, however many blocks a network has."""

import os

from regrow.process_memory import set_mmap_threshold

KERNELS = 32
"""How many compiled kernels oneDNN keeps: those of a block. It would keep 1024, and each width of a cut network has its
own."""


MAPPED, KEPT = 2**25, 2**26
"""From how many bytes on memory is mapped: freed, it goes back to the system, as weights do. The C library keeps that
many bytes of smaller pieces, as of activations: it would give them back after every operation, and fresh memory costs
several times what most operations do. Between blocks it gives back all."""


def limit_caches() -> None:
    """Let oneDNN keep few compiled kernels, and the C library no more than some freed memory.

    The first has no effect once a kernel was compiled, or where the user has set the variable.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))
    set_mmap_threshold(MAPPED, KEPT)
