"""Run a function in a child process that stops before and after every file operation: ptrace with a seccomp filter.

The kernel reports each system call that changes files, whoever makes it: Python, the C and Rust code of libraries, a
call through ctypes. :func:`run` forks, so that a process that has imported torch once runs hundreds of children.
"""

import ctypes
import errno
import os
import platform
import re
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEFORE, AFTER = "before", "after"

Act = Callable[["Operation", str, int], Any]
"""(operation, ``before`` or ``after``, process) → whether the process is killed now; before, an ``OSError`` instead has
the call fail with its number, without effect."""

# Name → (number on x86-64, on aarch64, arguments that are paths, as (folder argument or None, path argument)). A folder
# argument of None means the working directory; a path argument of None means that the file descriptor is the file.
_CALLS: dict[str, tuple[int | None, int | None, list[tuple[int | None, int | None]]]] = {
    "open": (2, None, [(None, 0)]),
    "creat": (85, None, [(None, 0)]),
    "openat": (257, 56, [(0, 1)]),
    "rename": (82, None, [(None, 0), (None, 1)]),
    "renameat": (264, 38, [(0, 1), (2, 3)]),
    "renameat2": (316, 276, [(0, 1), (2, 3)]),
    "unlink": (87, None, [(None, 0)]),
    "unlinkat": (263, 35, [(0, 1)]),
    "mkdir": (83, None, [(None, 0)]),
    "mkdirat": (258, 34, [(0, 1)]),
    "rmdir": (84, None, [(None, 0)]),
    "link": (86, None, [(None, 0), (None, 1)]),
    "linkat": (265, 37, [(0, 1), (2, 3)]),
    "symlink": (88, None, [(None, 1)]),
    "symlinkat": (266, 36, [(1, 2)]),
    "truncate": (76, None, [(None, 0)]),
    "ftruncate": (77, 46, [(0, None)]),
    "write": (1, 64, [(0, None)]),
    "pwrite64": (18, 68, [(0, None)]),
    "writev": (20, 66, [(0, None)]),
    "pwritev": (296, 70, [(0, None)]),
    "copy_file_range": (326, 285, [(2, None)]),
    "sendfile": (40, 71, [(0, None)]),
    "fallocate": (285, 47, [(0, None)]),
}
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine())
_NAMES = {call[_COLUMN]: name for name, call in _CALLS.items() if _COLUMN is not None and call[_COLUMN] is not None}
_FLAGS = {"open": 1, "openat": 2}
"""Which argument of the calls that open says for what; only those for writing stop."""
_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_WRITES = ("write", "pwrite64", "writev", "pwritev", "copy_file_range", "sendfile", "fallocate")

_TRACEME, _CONT, _SYSCALL, _SETOPTIONS, _GETEVENTMSG, _CALL_INFO = 0, 7, 24, 0x4200, 0x4201, 0x420E
_OPTIONS = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000  # system calls, children, threads, exec, seccomp; end with us
_SECCOMP_EVENT, _SYSCALL_STOP, _ALL = 7, signal.SIGTRAP | 0x80, 0x40000000
_GETREGSET, _SETREGSET, _GENERAL, _CALL_NUMBER = 0x4204, 0x4205, 1, 0x404
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


@dataclass(frozen=True)
class Operation:
    """A system call that changes files.

    Args:
        index: Which one of the run, from 0.
        name: ``open``, ``rename``, ``exchange``, ``unlink``, ``mkdir``, ``rmdir``, ``link``, ``truncate`` or ``write``.
        paths: What it is about, relative to the watched folder; what is random in names is ``*``.
    """

    index: int
    name: str
    paths: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {' → '.join(self.paths)}"


@dataclass
class Outcome:
    """How a child ended.

    Args:
        code: Its exit code, or minus the number of the signal that ended it.
        text: What it wrote to its output and error streams.
        seconds: How long it took.
        operations: What it did to files in the watched folder.
    """

    code: int = 0
    text: str = ""
    seconds: float = 0.0
    operations: list[Operation] = field(default_factory=list)

    @property
    def last(self) -> str:
        """The last line that it wrote."""
        return ([line for line in self.text.splitlines() if line.strip()] or [""])[-1]


def run(
    work: Callable[[], Any],
    folder: Path,
    text: Path,
    *,
    root: Path | None = None,
    act: Act | None = None,
    exchange: bool = True,
    interrupt: float = 0.0,
    limit: float = 300.0,
) -> Outcome:
    """Run a function in a child process and wait for its end.

    Args:
        work: What to do; a ``SystemExit`` it raises sets the exit code.
        folder: Its working directory.
        text: Where its output streams go.
        root: The folder whose file operations are watched; ``None``: none are.
        act: Called before and after each of them.
        exchange: Whether two names can be exchanged; if not, the kernel says what it says where a file system cannot.
        interrupt: Seconds of processor time after which it gets SIGINT, as from Ctrl-C; 0: it gets none.
        limit: Seconds after which it is ended, with code −14.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    start, outcome = time.monotonic(), Outcome()
    child = os.fork()
    if not child:
        signal.setitimer(signal.ITIMER_REAL, limit)
        _child(work, folder, text, root is not None, exchange, interrupt)
    if root is None:
        _, status = os.waitpid(child, 0)
    else:
        status = _watch(child, root.resolve(), act or (lambda *_: False), outcome)
    outcome.code = os.waitstatus_to_exitcode(status)
    outcome.seconds = time.monotonic() - start
    outcome.text = text.read_text(errors="replace")
    return outcome


def usable() -> str:
    """Why children cannot be watched here; empty if they can."""
    if sys.platform != "linux" or _COLUMN is None:
        return "watching file operations needs Linux on x86-64 or aarch64"
    return ""


def _child(work: Callable[[], Any], folder: Path, text: Path, watched: bool, exchange: bool, interrupt: float) -> None:
    """The life of the child; does not return."""
    code = 70
    try:
        handle = os.open(text, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for one, place in ((nothing, 0), (handle, 1), (handle, 2)):
            os.dup2(one, place)
        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if interrupt:
            signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
            signal.setitimer(signal.ITIMER_VIRTUAL, interrupt)
        if watched:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
        if watched or not exchange:
            _filter(watched, exchange)
        code = _code_of(work)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _code_of(work: Callable[[], Any]) -> int:
    try:
        work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _filter(watched: bool, exchange: bool) -> None:
    """Have the kernel stop this process at the calls of ``_CALLS``, and at no others; or refuse an exchange."""
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    trace, allow, invalid = 0x7FF00000, 0x7FFF0000, 0x00050000 | errno.EINVAL
    program: list[tuple[int, int, int, int]] = [(load, 0, 0, 0)]
    for number, name in sorted(_NAMES.items()):
        steps = [(give, 0, 0, trace if watched else allow)]
        if name in _FLAGS:
            steps = [(load, 0, 0, 16 + 8 * _FLAGS[name]), (any_of, 0, 1, _FOR_WRITING), *steps, (give, 0, 0, allow)]
        if name == "renameat2" and not exchange:
            steps = [(load, 0, 0, 16 + 8 * 4), (any_of, 0, 1, 2), (give, 0, 0, invalid), *steps]
        program += [(equal, 0, len(steps), number), *steps]
    program.append((give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    if _libc.prctl(38, 1, 0, 0, 0) or _libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0):
        raise OSError(ctypes.get_errno(), "no seccomp filter can be set")


def _watch(child: int, root: Path, act: Act, outcome: Outcome) -> int:
    """Follow a child that asked to be traced; returns its wait status."""
    os.waitpid(child, _ALL)
    _libc.ptrace(_SETOPTIONS, child, None, _OPTIONS)
    _libc.ptrace(_CONT, child, None, None)
    known, inside = {child}, dict[int, Operation]()
    while True:
        task, status = os.waitpid(-1, _ALL)
        if not os.WIFSTOPPED(status):
            if task == child:
                return status
            continue
        what, event, request, passed = os.WSTOPSIG(status), status >> 16, _CONT, 0
        if event == _SECCOMP_EVENT:
            operation = _operation(task, root, len(outcome.operations))
            if operation is not None:
                outcome.operations.append(operation)
                inside[task] = operation
                told = act(operation, BEFORE, child)
                if isinstance(told, OSError):
                    _refuse(task, told.errno)
                elif told:
                    os.kill(child, signal.SIGKILL)
                request = _SYSCALL
        elif what == _SYSCALL_STOP:
            if (operation := inside.get(task)) is not None and _at_exit(task):
                del inside[task]
                if act(operation, AFTER, child):
                    os.kill(child, signal.SIGKILL)
            elif operation is not None:
                request = _SYSCALL
        elif task not in known and what == signal.SIGSTOP:
            known.add(task)
        elif not event and what != signal.SIGTRAP:
            passed = what
        _libc.ptrace(request, task, None, passed)


def _info(task: int) -> bytes:
    buffer = ctypes.create_string_buffer(88)
    _libc.ptrace(_CALL_INFO, task, 88, ctypes.addressof(buffer))
    return buffer.raw


def _refuse(task: int, number: int) -> None:
    """Have the call that a task is about to make fail, without effect."""

    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    def registers(request: int, kind: int, buffer: Any) -> None:
        vector = Vector(ctypes.addressof(buffer), ctypes.sizeof(buffer))
        _libc.ptrace(request, task, ctypes.c_void_p(kind), ctypes.addressof(vector))

    given, no_call = (ctypes.c_uint64 * (27 if _COLUMN == 0 else 34))(), ctypes.c_int(-1)
    registers(_GETREGSET, _GENERAL, given)
    if _COLUMN == 0:
        given[15] = ctypes.c_uint64(-1).value  # the number of the call
        given[10] = ctypes.c_uint64(-number).value  # its result
    else:
        registers(_SETREGSET, _CALL_NUMBER, no_call)
        given[0] = ctypes.c_uint64(-number).value
    registers(_SETREGSET, _GENERAL, given)


def _at_exit(task: int) -> bool:
    return _info(task)[0] == 2


def _operation(task: int, root: Path, index: int) -> Operation | None:
    """The call that a task is about to make; ``None`` if it is about nothing in the watched folder."""
    number, *arguments = struct.unpack_from("<Q6Q", _info(task), 24)
    call = _NAMES.get(number)
    if call is None:
        return None
    paths = [_path(task, arguments, at, name) for at, name in _CALLS[call][2]]
    if not any(path.is_relative_to(root) for path in paths):
        return None
    name = "write" if call in _WRITES else re.sub(r"(at2?|64)$", "", call)
    if name == "rename" and call == "renameat2" and arguments[4] & 2:
        name = "exchange"
    if call == "unlinkat" and arguments[2] & 0x200:
        name = "rmdir"
    shown = (str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths)
    return Operation(index, {"ftruncate": "truncate", "creat": "open"}.get(name, name), tuple(map(steady, shown)))


def steady(path: str) -> str:
    """A path with ``*`` for what differs from run to run: hexadecimal words, and random ones of temporary names.

    >>> steady("run/.model.0f3a9c2e.partial/a"), steady(".report.html.k2x9_ab1")
    ('run/.model.*.partial/a', '.report.html.*')
    """
    path = re.sub(r"(?<=[.-])[0-9a-f]{8,}(?=[./-]|$)", "*", path)
    path = re.sub(r"((?:^|/)\.tmp)[A-Za-z0-9]{6}(?=$|/)", r"\1*", path)
    return re.sub(r"((?:^|/)\.[^/]*\.)[a-z0-9_]{8}(?=$|/)", r"\1*", path)


def _path(task: int, arguments: list[int], folder: int | None, name: int | None) -> Path:
    if name is None:
        return _opened(task, arguments[folder or 0])
    path = Path(os.fsdecode(_text(task, arguments[name])))
    if path.is_absolute():
        return path
    at = None if folder is None else ctypes.c_int(arguments[folder] & 0xFFFFFFFF).value
    return (Path(f"/proc/{task}/cwd").readlink() if at in (None, -100) else _opened(task, at)) / path


def _opened(task: int, handle: int) -> Path:
    try:
        return Path(f"/proc/{task}/fd/{handle}").readlink()
    except OSError:
        return Path("/dev/null")


def _text(task: int, address: int) -> bytes:
    """The string at an address of a task."""
    found = b""
    with Path(f"/proc/{task}/mem").open("rb", buffering=0) as memory:
        while b"\0" not in found and len(found) < 8192:
            memory.seek(address + len(found))
            found += memory.read(4096 - (address + len(found)) % 4096)
    return found.partition(b"\0")[0]
