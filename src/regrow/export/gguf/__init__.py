"""GGUF: a file for llama.cpp and what is built on it."""

from regrow.export.gguf.writer import write

__all__ = ["write"]
