"""What can be wrong with text or images that someone names."""


class SourceError(ValueError):
    """A source that cannot be read or is too small; the message is one line, names the value and the remedy."""


class MissingError(SourceError):
    """A source that is not there."""
