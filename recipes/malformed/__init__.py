"""Inputs that are damaged."""

import crashes  # noqa: F401 one thread, no network, and where toys.py is
