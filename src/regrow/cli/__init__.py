"""The command line; torch and other large packages are imported once a command runs."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def main() -> None:
    """Run the command line with the process's arguments, and exit the process with its exit code."""
    open_closed_streams()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)  # until the modules of the command are imported
    code = INTERRUPTED
    try:
        code = run_command(sys.argv[1:])
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command is over, and has said so
    except KeyboardInterrupt:
        sys.stderr.write("regrow: stopped\n")
    try:
        sys.stdout.flush()
    except OSError:  # what cannot be written is dropped, or Python would report it once more as it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """End the process at Ctrl-C (a signal handler): for imports, which may swallow an exception."""
    os.write(2, b"regrow: stopped; nothing was written\n")
    os._exit(INTERRUPTED)


def run_command(words: list[str]) -> int:
    """Import the commands, run one, and return its exit code; ``words``: the command line without ``regrow``."""
    from regrow.cli import app

    return app.run_command(words)


def open_closed_streams() -> None:
    """Replace each closed standard stream by the null device, for the life of the process.

    A closed descriptor would be taken by the next file that is opened, and messages of compiled code would land there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115, PTH123 (open as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
