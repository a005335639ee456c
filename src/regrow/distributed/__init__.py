"""Several processes on one run: torchrun or accelerate starts them, rank 0 leads and writes, all share the work.

``ranks`` says who this process is and needs no torch; ``group`` connects the processes, ``exchange`` passes records and
tensors between them, ``watch`` notices a rank that has ended.
"""

from regrow.distributed.ranks import SINGLE, ProcessRank, read_ranks

__all__ = ["SINGLE", "ProcessRank", "read_ranks"]
