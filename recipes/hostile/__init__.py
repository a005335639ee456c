"""Folders whose files name code, and what watches whether any command imports or calls it."""
