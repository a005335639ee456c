"""Files on disk: atomic writes, validated records, and model folders for networks of any shape."""

from regrow.store.errors import StoreError
from regrow.store.models import CARRIED, load, read_shapes, save, write_model
from regrow.store.shapes import SHAPES

__all__ = ["CARRIED", "SHAPES", "StoreError", "load", "read_shapes", "save", "write_model"]
