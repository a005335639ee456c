"""Networks: load pretrained models by name, and build architectures again from plain data."""

from regrow.nets.attention import replace_attention
from regrow.nets.load import build, example_for, load
from regrow.nets.loaded import Loaded, ModelError, Origin

__all__ = ["Loaded", "ModelError", "Origin", "build", "example_for", "load", "replace_attention"]
