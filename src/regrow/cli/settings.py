"""``regrow settings``: write the settings of a run to a file, to repeat it or to vary them."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from regrow.cli import options
from regrow.cli.boundary import Verb
from regrow.cli.screen import say
from regrow.settings import grow, learn, prune, recover, search
from regrow.settings.file import TOML, YAML, format_settings, left_out

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

KINDS: dict[str, type["DataclassInstance"]] = {
    "prune": prune.Settings,
    "grow": grow.Settings,
    "recover": recover.Settings,
    "learn": learn.Settings,
    "search": search.Settings,
}
EPILOG = """\b
Examples
  regrow settings RUN --out recipe.toml
  regrow learn --config recipe.toml --seed 1 --out RUN2
"""


@click.command(cls=Verb, needs="regrow.store.run_record", epilog=EPILOG)
@click.argument("run", type=options.PATH)
@click.option("--out", type=options.PATH, help="The file to write, .toml or .yaml; default: print as TOML.")
def settings(run: Path, out: Path | None) -> None:
    """Write the settings of RUN to a file for --config. Names of your own code are left out."""
    from regrow.store.atomic import check_output, write_output
    from regrow.store.run_record import convert_settings

    if out:
        check_output(out, (*TOML, *YAML), streams=True)
    command, given = _recorded(run)
    if command not in KINDS:
        raise click.UsageError(f"{run} holds a run of {command!r}; give one of {', '.join(KINDS)}")
    known: DataclassInstance = convert_settings(given, KINDS[command])
    text = format_settings(known, (out and out.suffix.lower()) or TOML[0])
    if out is None:
        say(text.rstrip("\n"), lines=True)
        return
    write_output(out, text, (*TOML, *YAML))
    say(f"settings written to {out}")
    say(f"use them with `{shlex.join(['regrow', command, *left_out(known), '--config', str(out), '--out', 'RUN'])}`")


def _recorded(run: Path) -> tuple[str, dict[str, object]]:
    from regrow.store.replacing import settle
    from regrow.store.run_record import read_run, unfinished_folder

    settle(run)
    data = read_run(unfinished_folder(run) or run)
    return data["verb"], data["settings"]
