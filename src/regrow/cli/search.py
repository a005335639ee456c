"""``regrow search``: search a space of networks for one of a given size."""

from pathlib import Path
from typing import TYPE_CHECKING

from regrow.cli import options
from regrow.cli.flags import Given
from regrow.cli.runs import recorded_run, run_command
from regrow.cli.screen import number, say, table
from regrow.settings.search import Settings

if TYPE_CHECKING:
    from regrow.store.run_folder import RunFolder

EPILOG = """\b
Examples
  regrow search cells:4-3-2 --data digits --target 0.2 --out RUN
  regrow search cells:8-6-3 --data cifar/ --target params=50k --stages 3 --epochs 30 --retrain 60 --out RUN
  regrow search mobile:8-2 --data cifar/ --target macs=2M --stride 1 --memory 1GiB --out RUN
  regrow search resnet:16-3 --data fashion/ --target macs=2M --out RUN
  regrow search RUN --data cifar/ --target macs=50% --epochs 10 --retrain 10 --out RUN2
  regrow search mynets:tiny --data fashion/ --target 0.2 --out RUN
  torchrun --no-python --nproc-per-node 2 regrow search cells:8-6-3 --data cifar/ --target params=50k --out RUN
  regrow search smollm2-135m --data news --target 0.9 --epochs 3 --retrain 0 --batch-size 2 --out RUN
"""


@run_command(Settings, EPILOG, distributed=True)
@options.code
@options.track
def search(given: Given[Settings], code: str, track: str, out: Path) -> None:
    """Search SPACE for a network within the target size and train it; writes a folder with the network and a report.

    A part of the training examples is held out for validation; the test set is used once, at the end.
    """
    settings = given.build()
    options.say_code(settings.space, code, settings.method)
    from regrow.jobs.search import run

    with recorded_run("network", _tell, out, code=code, track=track) as invocation:
        run(settings, invocation)
    say(f"load it with regrow.load({str(out)!r})")


def _tell(folder: "RunFolder") -> None:
    from regrow.reports.search import alarms, explain_unsearched
    from regrow.reports.summary import read_summary

    found, tested, levels = map(folder.last, ("found", "test", "levels"))
    table(
        "Size removed on each level",
        ["level", "removed"],
        [[level, number(round(saved))] for level, saved in levels["saved"].items()],
        numbers=(1,),
    )
    after = " after training" if folder.run()["settings"]["retrain"] else ""
    say(
        f"{number(found['parameters'])} parameters ({number(found['nonzero'])} nonzero), "
        f"{number(found.get('macs'))} MACs per example, {number(found.get('bytes'))} bytes; "
        f"validation accuracy {found['accuracy']:.3f} after the search; "
        f"test accuracy{after} {tested['accuracy']:.3f} on {tested['images']} examples"
    )
    (run,) = read_summary([folder.path]).runs
    for note in [*alarms(run), *filter(None, [explain_unsearched(run)])]:
        say(f"note: {note}")
