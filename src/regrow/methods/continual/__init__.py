"""Continual learning: one file or folder per paper; each method is a set of hooks of the training loop."""
