"""Whether the folder of a pruning run holds its result, is to be run or resumed, or belongs to something else."""

from pathlib import Path

from regrow.settings.declaration import record_settings
from regrow.settings.prune import Settings
from regrow.store.replacing import settle
from regrow.store.run_record import RUN, is_resumable, read_run, run_identity


def is_finished(settings: Settings, folder: Path) -> bool:
    """Whether a folder holds the finished pruning run of these settings; ``False`` if it is to be run or resumed.

    Args:
        settings: The settings of the run.
        folder: Its folder; it need not exist.

    Raises:
        StoreError: If the folder holds something else, such as a run with other settings.
    """
    settle(folder)
    wanted = run_identity("prune", record_settings(settings), None)
    if (folder / RUN).is_file():
        data = read_run(folder)
        if data.get("finished") and data["verb"] == "prune" and data["settings"] == wanted["settings"]:
            return True
    is_resumable(folder, wanted)
    return False
