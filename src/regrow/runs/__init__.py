"""Runs: folders that hold what was done, and models that can be built again."""

from regrow.runs.atomic import StoreError
from regrow.runs.store import load, save

__all__ = ["StoreError", "load", "save"]
