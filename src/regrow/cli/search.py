"""``regrow search``: a network of a given size, found in a space of many."""

from pathlib import Path
from typing import Any

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.report import RunPage
from regrow.cli.screen import number, say, table, working
from regrow.settings.words import parse_pairs

EPILOG = """\b
SPACE is cells:WIDTH-CELLS-NODES (a DARTS-like super-network: seven operations on every edge of every cell),
mobile:WIDTH-BLOCKS (inverted bottlenecks of six kinds and a skip, WIDTH in the first stage, BLOCKS in each),
bench201:WIDTH-N (NAS-Bench-201's, N cells per stage: one operation on each edge, the same in all cells), a small
network such as resnet:16-3, of which filters and weights are searched, or pkg.mod:fn, a function of your own code that
gives a network: its filters and weights, and the operations that it marks with regrow.Candidates.

\b
Examples
  regrow search cells:4-3-2 --data digits --target 0.2 --out RUN
  regrow search cells:8-6-3 --data cifar/ --target params=50k --stages 3 --epochs 30 --retrain 60 --out RUN
  regrow search mobile:8-2 --data cifar/ --target macs=2M --stride 1 --memory 1GiB --out RUN
  regrow search resnet:16-3 --data fashion/ --target macs=2M --out RUN
  regrow search mynets:tiny --data fashion/ --target 0.2 --out RUN
"""


@click.command(cls=Verb, resumed=("out",), epilog=EPILOG)
@click.argument("space")
@click.option(
    "--data", required=True, help="digits, or a folder: MNIST's four files, or train/CLASS/… and test/CLASS/…"
)
@click.option(
    "--target",
    required=True,
    help="params=50k (stored), nonzero=50k (masked weights left out), macs=3M (dense, of an image), bytes=200k (of the "
    "file), ms=20 (a batch passes, here), a share of the whole space (macs=20%), or of its parameters (0.2).",
)
@click.option("--method", default="mgas", show_default=True, help="What searches: see `regrow methods`.")
@click.option("--out", required=True, type=options.PATH, help="The run folder. The same command resumes.")
@click.option(
    "--stages", default=0, type=int, help="In how many stages it is searched; else three, or as many as it has parts."
)
@click.option(
    "--memory",
    default="",
    metavar="BYTES",
    help="What a stage may need, like 2GiB: cuts stages to fit, or computes parts twice.",
)
@click.option("--epochs", default=30, show_default=True, type=int, help="Passes over the training part in the search.")
@click.option("--retrain", default=30, show_default=True, type=int, help="Passes of the training after it; 0: none.")
@click.option("--inherit", is_flag=True, help="That training goes on from the weights the search left, not drawn ones.")
@click.option(
    "--cutout", default=0, type=int, help="In that training, cut a square of so many pixels out of each picture."
)
@click.option("--batch-size", default=96, show_default=True, type=int, help="Examples per step.")
@click.option("--lr", default=0.025, show_default=True, type=float, help="Learning rate of weights.")
@click.option("--weight-decay", default=3e-4, show_default=True, type=float)
@click.option("--train", default=0, type=int, help="Use at most so many training examples; 0: all.")
@click.option("--test", default=0, type=int, help="Test on at most so many; 0: all.")
@click.option("--validation", default=0.2, show_default=True, type=float, help="The share held out in the search.")
@click.option("--stride", default=2, show_default=True, type=int, help="Of the stem.")
@click.option("--set", "pairs", multiple=True, metavar="NAME=VALUE", help="A setting of the method.")
@click.option("--seed", default=0, show_default=True, type=int, help="Of weights, orders and everything drawn.")
def search(space: str, data: str, target: str, out: Path, pairs: Any, **given: Any) -> None:
    """Search SPACE for a network that fits the target, train it, and leave a folder with it and how it was found.

    The training examples are split into a part that is learned from and one that is only watched; the test set
    is read once, at the end.
    """
    from regrow.commands.search import Settings, run

    settings = Settings(space, data, target, method_settings=parse_pairs(pairs), **given)
    options.say_code(space)
    page = RunPage("network")
    with working() as progress:
        folder = run(settings, out, progress, write_page=page)
    _tell(folder)
    page.tell(folder.path)
    say(f"load it with regrow.load({str(folder.path)!r})")


def _tell(folder: Any) -> None:
    from regrow.reports import summarise
    from regrow.reports.search import alarms, unsearched

    found, tested, levels = map(folder.last, ("found", "test", "levels"))
    table(
        "What each level left out",
        ["level", "left out"],
        [[level, number(round(saved))] for level, saved in levels["saved"].items()],
        numbers=(1,),
    )
    after = " after training" if folder.run()["settings"]["retrain"] else ""
    say(
        f"{number(found['parameters'])} parameters ({number(found['nonzero'])} nonzero), "
        f"{number(found.get('macs'))} MACs of an image, {number(found.get('bytes'))} bytes; "
        f"validation {found['accuracy']:.3f} as the search left it; "
        f"test{after} {tested['accuracy']:.3f} on {tested['images']} images"
    )
    (told,) = summarise([folder.path])["runs"]
    for note in [*alarms(told), *filter(None, [unsearched(told)])]:
        say(f"note: {note}")
