"""Measure unit importance: one forward (and backward) pass per source → statistics → scores per unit."""
