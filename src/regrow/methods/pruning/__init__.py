"""One-shot pruning: one file or folder per paper; each is a choice of scores, allocation and compensation."""
