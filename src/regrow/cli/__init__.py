"""The command line; torch and other large packages are imported once a command runs.

Standard streams never fail: closed ones, and pipes whose reader has exited, drop what is written.
"""

import io
import os
import signal
import sys
from types import FrameType
from typing import Any

INTERRUPTED = 130
_STREAMS = (("stdin", "r", ""), ("stdout", "w", "standard output"), ("stderr", "w", "standard error"))
"""Name in ``sys``, mode, and the name in error messages."""


def main() -> None:
    """Run the command line with the process's arguments, and exit with its exit code."""
    prepare_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)  # until the modules of the command are imported
    code = INTERRUPTED
    try:
        code = code_of(sys.argv[1:])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is over, and has said so
    except KeyboardInterrupt:
        sys.stderr.write("regrow: stopped\n")
    sys.exit(code)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C while modules are imported, which may swallow an exception: end the process."""
    os.write(2, b"regrow: stopped; nothing was written\n")
    os._exit(INTERRUPTED)


def code_of(words: list[str]) -> int:
    """Run one command, given without the program's name, and return its exit code."""
    from regrow.cli import app

    return app.code_of(words)


class _Output(io.FileIO):
    """Standard output or error that drops what can no longer be written; ``label`` names it in error messages."""

    def __init__(self, descriptor: int, label: str) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.label = label
        self.dropping = False

    def write(self, data: Any, /) -> int:
        """Write bytes; after a failure, which is raised unless a pipe was closed, all output is dropped."""
        if not self.dropping:
            try:
                return super().write(data)
            except BrokenPipeError:
                self.dropping = True
            except OSError as error:
                self.dropping = True
                raise OSError(error.errno, error.strerror, self.label) from None
        return memoryview(data).nbytes


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
            wrapped = io.TextIOWrapper(
                io.BufferedWriter(_Output(stream.fileno(), label)),
                encoding=stream.encoding,
                errors=stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, wrapped)
