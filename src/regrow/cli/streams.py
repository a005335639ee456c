"""Standard streams that never fail: closed streams and pipes whose reader has exited drop what is written."""

import io
import os
import sys
from typing import Any

__all__ = ["prepare_streams"]


class _Output(io.FileIO):
    """Standard output or error that drops what can no longer be written.

    Args:
        descriptor: The descriptor of the stream.
        name: The name in error messages.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.label = name
        self.dropping = False

    def write(self, data: Any, /) -> int:
        """Write bytes; after a failure all output is dropped, so that the work and the exit go on.

        Raises:
            OSError: The first time, if writing fails for another reason than a closed pipe.
        """
        if not self.dropping:
            try:
                return super().write(data)
            except BrokenPipeError:
                self.dropping = True
            except OSError as error:
                self.dropping = True
                raise OSError(error.errno, error.strerror, self.label) from None
        return memoryview(data).nbytes


_STREAMS = (("stdin", "r", ""), ("stdout", "w", "standard output"), ("stderr", "w", "standard error"))
"""Name in ``sys``, mode, and the name in error messages."""


def prepare_streams() -> None:
    """Open closed standard streams on the null device, and let pipes and files drop what cannot be written.

    A closed descriptor would be taken by the next file that is opened, and messages of compiled code would land there.
    """
    for name, mode, label in _STREAMS:
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123 (open as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif label and type(stream) is io.TextIOWrapper and not stream.isatty():  # else a caller has put it there
            setattr(sys, name, _wrapped(stream, label))


def _wrapped(stream: io.TextIOWrapper, label: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), label)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
