"""The fixtures of the command line's tests."""

from cli.conftest import regrow, tiny_language_model

__all__ = ["regrow", "tiny_language_model"]
