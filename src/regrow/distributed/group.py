"""The connection of the processes that share a run."""

import os
import re
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from regrow.core.errors import ResourceError
from regrow.distributed import ProcessRank, choose_backend

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

INTERVAL = 1.0
"""Seconds between two signs of life."""
SILENCE = 18.0
"""Seconds without a sign of life after which a rank counts as ended."""
START = 300.0
"""Seconds that a rank may take to give its first sign of life."""
NOTICE = 4.0
"""Seconds between SIGTERM and the end, in which it is found out which rank ended before."""

RESUME = "the same command resumes the run"


@dataclass
class Watch:
    """Watches the other ranks from a thread of its own."""

    ranks: ProcessRank
    store: "Store"
    lost: Callable[[str], None]
    closing: threading.Event = field(default_factory=threading.Event)
    terminated: float = 0.0
    """When SIGTERM came; 0: not yet."""

    def run(self, wake: int) -> None:
        """Give signs of life and look for those of the others, until ``closing`` is set or a rank has ended."""
        try:
            self._run(wake)
        except Exception as error:
            if not self.closing.is_set():
                self.lost(f"{self.ranks} cannot watch the others ({type(error).__name__}: {error}); {RESUME}")

    def _run(self, wake: int) -> None:
        now, beats = time.monotonic(), 0
        seen = {rank: (b"", now) for rank in range(self.ranks.size) if rank != self.ranks.rank}
        while not self.closing.is_set():
            beats += 1
            try:
                self.store.set(f"beat/{self.ranks.rank}", str(beats))
                if self.store.check(["failed"]):
                    self.store.set(f"known/{self.ranks.rank}", "")
                    line = self.store.get("failed").decode()
                else:
                    line = self._silence(seen)
            except RuntimeError:
                agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                keeper = "torchrun" if agent else f"rank 0 of {self.ranks.size}"
                line = f"{keeper} has ended, killed or out of memory; {RESUME}"
                if self.closing.wait(INTERVAL):
                    return
            if line and not self.closing.is_set():
                self.lost(line)
                return
            ready, _, _ = select.select([wake], [], [], INTERVAL)
            if ready and signal.SIGTERM in os.read(wake, 64) and not self.terminated:
                self.terminated = time.monotonic()

    def report(self, line: str) -> None:
        """Tell the other ranks why this one ends, and wait until they know, or a few seconds."""
        self.closing.set()
        others = [f"known/{rank}" for rank in range(self.ranks.size) if rank != self.ranks.rank]
        with suppress(RuntimeError):
            if self.store.check(["failed"]):
                return
            self.store.set("failed", line)
            for _ in range(int(NOTICE / 0.1)):
                if self.store.check(others):
                    return
                time.sleep(0.1)

    def _silence(self, seen: dict[int, tuple[bytes, float]]) -> str:
        """Return a line about a rank that gave no sign of life for too long; empty if all did."""
        now = time.monotonic()
        ended = self.terminated and now - self.terminated > NOTICE
        for rank, (last, since) in seen.items():
            value = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            if value != last:
                seen[rank] = value, now
            elif now - since > (NOTICE - INTERVAL if ended else SILENCE if last else START):
                return f"rank {rank} of {self.ranks.size} has ended, killed or out of memory; {RESUME}"
        return f"{self.ranks} was stopped by SIGTERM; {RESUME}" if ended else ""


@contextmanager
def watching(ranks: ProcessRank, store: "Store", lost: Callable[[str], None]) -> Iterator[Watch]:
    """Watch the other ranks inside the ``with`` block.

    SIGTERM, by which torchrun ends all ranks once one has failed, ends the process through ``lost``, with the reason.
    """
    watch = Watch(ranks, store, lost)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    before, handler = signal.set_wakeup_fd(woken, warn_on_full_buffer=False), signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    thread = threading.Thread(target=watch.run, args=(wake,), name="regrow-watch", daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.closing.set()
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        thread.join(2 * INTERVAL)


MEETING = timedelta(minutes=5)
"""How long the processes wait for one another at the start."""
WORK = timedelta(days=7)
"""How long a rank waits for another one; ranks that have ended are noticed by ``watch``."""
_BROKEN = re.compile(r"\[[^\]]*\bgloo/[^\]]*\]|Connection (closed|reset) by peer|Broken pipe")
"""What gloo says, which raises RuntimeError, of a broken connection: its source file, or the system's words."""


@contextmanager
def connected(
    ranks: ProcessRank, lost: Callable[[str], None], describe: Callable[[BaseException], str] = str
) -> Iterator[None]:
    """Connect the processes that torchrun has started, inside the ``with`` block; they leave it together."""
    store = _meet(ranks)
    with watching(ranks, store.clone(), lost) as watch:
        try:
            backend = choose_backend(torch.cuda.device_count(), dist.is_nccl_available())
            dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size, timeout=WORK)
            yield
            dist.barrier()
        except BaseException as error:
            _leave(ranks, watch, error, describe)
            raise
    dist.destroy_process_group()


def _meet(ranks: ProcessRank) -> Any:
    try:
        return next(rendezvous("env://", ranks.rank, ranks.size, timeout=MEETING))[0]
    except (RuntimeError, ValueError, OSError) as error:
        raise ResourceError(
            f"{ranks} cannot reach the others ({' '.join(str(error).split())[:120]}); start {ranks.size} processes "
            "with torchrun, or with the same MASTER_ADDR and MASTER_PORT"
        ) from error


def _is_broken(error: BaseException) -> bool:
    """Whether an error says that the connection to another rank broke."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_BROKEN.search(str(error))))


def _leave(ranks: ProcessRank, watch: Watch, error: BaseException, describe: Callable[[BaseException], str]) -> None:
    """Tell the other ranks about an error; wait for ``watch`` to say which rank ended, if the connection broke."""
    if _is_broken(error):
        time.sleep(SILENCE + 4)  # until ``watch`` ends the process
        line = f"{ranks} lost the connection to another rank ({' '.join(str(error).split())[:120]}); {RESUME}"
        watch.report(line)
        raise ResourceError(line) from error
    stopped = isinstance(error, KeyboardInterrupt)
    watch.report(f"{ranks} was stopped by Ctrl-C" if stopped else f"{ranks} failed: {describe(error)}")
