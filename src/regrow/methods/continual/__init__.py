"""Continual learning: one file per paper, a choice of hooks of the training loop."""
