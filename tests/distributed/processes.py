"""Start several processes of one script or command, as torchrun does, and wait for them."""

import os
import socket
import subprocess
import sys


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(*words, size=2, cwd=None, port=None, **environment):
    """Start ``python WORDS`` in each of ``size`` processes."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(size)}
    base = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **where, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    return [
        subprocess.Popen([sys.executable, *words], env={**base, "RANK": str(rank)}, **pipes) for rank in range(size)
    ]


def finish(processes, timeout=120):
    """(exit code, output, errors) of each process; all of them end here."""
    try:
        return [(*one.communicate(timeout=timeout), one.returncode) for one in processes]
    finally:
        for one in processes:
            one.kill()
