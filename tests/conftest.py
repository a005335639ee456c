"""Set-up shared by all tests: the same threads and seed everywhere, no hub, no screen."""

import gc
import os

# Before torch is imported, and inherited by the processes that tests start: bit-equality needs equal threads, and more
# threads than cores make everything several times slower. A worker inherits what its controller, which counts no
# workers, has set: there it is set anew.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
_threads = str(max(1, (os.cpu_count() or 1) // max(1, _workers)))
if _workers:
    os.environ["OMP_NUM_THREADS"] = _threads
os.environ.setdefault("OMP_NUM_THREADS", _threads)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from tiers import (  # noqa: E402, F401
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)

# Machines in CI stall now and then: no deadlines; and a failure there must be one that can be had again.
settings.register_profile("regrow", deadline=None, derandomize="CI" in os.environ, print_blob=True)
settings.load_profile("regrow")


collect_ignore = ["on_device.py", "pretend.py"]
"""They register a device when imported, which torch allows once per process: test_devices.py starts one for them."""


def pytest_collection_finish() -> None:
    """Leave what collection made to itself: each full garbage collection would look at a million objects again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)
