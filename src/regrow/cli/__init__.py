"""The command line: one module per verb. Torch and all else that is large are imported once a command runs."""

import os
import signal
import sys
from types import FrameType

from regrow.cli.streams import prepare_streams

INTERRUPTED = 130


def main() -> None:
    """Run the command line."""
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
    """End the process at Ctrl-C while modules are imported: a module that is half imported may swallow an exception."""
    os.write(2, b"regrow: stopped; nothing was written\n")
    os._exit(INTERRUPTED)


def code_of(words: list[str]) -> int:
    """Run one command and give back its exit code.

    Args:
        words: The command line, without the program's name.
    """
    from regrow.cli import app

    return app.code_of(words)
