"""What is on the disk: files that are there whole or not at all, records that are checked, and model folders."""

from regrow.store.errors import StoreError
from regrow.store.models import CARRIED, load, read_shapes, save, write_model
from regrow.store.shapes import SHAPES

__all__ = ["CARRIED", "SHAPES", "StoreError", "load", "read_shapes", "save", "write_model"]
