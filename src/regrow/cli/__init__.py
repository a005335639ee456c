"""The command line: one module per command; torch and other large packages are imported once a command runs."""

import os
import signal
import sys
from types import FrameType

from regrow.cli.streams import prepare_streams

INTERRUPTED = 130


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
    """Handle Ctrl-C while modules are imported: end the process, since a half-imported module may swallow an exception.

    Args:
        number: The number of the signal.
        frame: The interrupted stack frame.
    """
    os.write(2, b"regrow: stopped; nothing was written\n")
    os._exit(INTERRUPTED)


def code_of(words: list[str]) -> int:
    """Run one command and return its exit code.

    Args:
        words: The command line, without the program's name.
    """
    from regrow.cli import app

    return app.code_of(words)
