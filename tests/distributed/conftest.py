"""The fixtures of the command line's tests."""

from cli.conftest import no_figures, regrow, run_once, tiny_language_model

__all__ = ["no_figures", "regrow", "run_once", "tiny_language_model"]
