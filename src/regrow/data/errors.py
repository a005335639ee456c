"""Errors of reading text or image sources."""


class SourceError(ValueError):
    """Raised if a source cannot be read or is too small; one line with the value and the remedy."""


class MissingError(SourceError):
    """Raised if a source does not exist."""
