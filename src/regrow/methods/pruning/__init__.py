"""One-shot pruning: one file per paper, a choice of scores, allocation and compensation."""
