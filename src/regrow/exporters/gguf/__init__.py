"""Export to GGUF: a file for llama.cpp and the tools built on it."""

from regrow.exporters.gguf.writer import write

__all__ = ["write"]
