"""One process writes in a folder at a time; the lock ends with the process."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from regrow.store import StoreError, save
from regrow.store.atomic import lock
from regrow.store.run_folder import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from regrow.store.atomic import lock
held = lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that writes in ``tmp_path / "out"``."""
    (tmp_path / "out").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_refused_and_a_killed_one_gives_the_folder_free(holder, tmp_path):
    out = tmp_path / "out"
    for write in (
        lambda: RunFolder.create(out, verb="prune", settings={}),
        lambda: RunFolder.check(out, {"verb": "prune", "settings": {}}),
        lambda: RunFolder.reopen(out),
        lambda: save(nn.Linear(2, 2), out),
    ):
        with pytest.raises(StoreError, match="written by another process; wait") as caught:
            write()
        assert "\n" not in str(caught.value) and not list(out.iterdir())
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunFolder.create(out, verb="prune", settings={}) as folder:
        folder.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "no lock file"


def test_a_lock_leaves_nothing_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        with lock(tmp_path), pytest.raises(StoreError, match="being written"):
            lock(tmp_path)
        assert not list(tmp_path.iterdir())


def test_what_a_living_process_has_not_finished_stays(tmp_path):
    code = """
import sys, time
from pathlib import Path
from regrow.store.atomic import atomic_write
with atomic_write(Path(sys.argv[1])) as temporary:
    print(temporary.parent, flush=True)
    time.sleep(60)
"""
    from regrow.store.atomic import write_text

    path = tmp_path / "page.html"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        stage = process.stdout.readline().strip()
        write_text(path, "another")
        assert {one.name for one in tmp_path.iterdir()} == {"page.html", Path(stage).name}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    write_text(path, "the next")
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]
