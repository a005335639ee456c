"""The page that compares searches: the network that each found, and its size."""

from regrow.reports import quantities as q
from regrow.reports.fronts import leaders
from regrow.reports.records import SearchLine, Summary, search_of
from regrow.reports.search import RECONSTRUCTED


def are_search_runs(summary: Summary) -> bool:
    """Whether every run of a summary is a search.

    Args:
        summary: A summary of runs.
    """
    return all(run["search"] for run in summary["runs"])


def headline(summary: Summary) -> str:
    """Return one sentence on how many searches of which space are compared.

    Args:
        summary: A summary of searches.
    """
    spaces = sorted({run["model"] for run in summary["runs"]})
    of = spaces[0] if len(spaces) == 1 else f"{len(spaces)} spaces"
    return f"{len(summary['runs'])} searches of {of}."


def details(summary: Summary) -> list[str]:
    """Return sentences on the origin of the methods, and on which network has the highest test accuracy.

    Args:
        summary: A summary of searches.
    """
    lines: list[str] = []
    methods = {run["method"] for run in summary["runs"]}
    lines += [note for method, note in RECONSTRUCTED.items() if method in methods]
    known = [(v, run) for run in summary["runs"] if (v := search_of(run)["test"]["accuracy"]) is not None]
    if len(known) > 1 and not alarms(summary):
        most, best = max(known, key=lambda one: one[0])
        lines.append(f"{best['label']} has the highest test accuracy: {q.percent(most)}.")
    return lines


def alarms(summary: Summary) -> list[str]:
    """Return a warning if the accuracies of the runs cannot be compared.

    Args:
        summary: A summary of searches.
    """
    names = ("data", "train", "test", "validation")
    data = {tuple(pair["value"] for pair in run["settings"] if pair["name"] in names) for run in summary["runs"]}
    return ["The searches used different data: their accuracies cannot be compared."] if len(data) > 1 else []


def table(summary: Summary) -> list[SearchLine]:
    """Return the rows of the comparison table: accuracy, size and time of each search.

    Args:
        summary: A summary of several searches.

    Returns:
        One row per run: ``label``, ``target``, ``test``, ``best`` (no run with as few nonzero parameters tests
        better), ``validation``, ``parameters``, ``nonzero`` and ``seconds``.
    """
    runs = summary["runs"]
    found = [search_of(run) for run in runs]
    leads = leaders([one["test"]["nonzero"] for one in found], [one["test"]["accuracy"] for one in found])
    return [
        {
            "label": run["label"],
            "target": one["target"],
            "test": one["test"]["accuracy"],
            "best": lead,
            "validation": one["found"]["accuracy"],
            "parameters": one["test"]["parameters"],
            "nonzero": one["test"]["nonzero"],
            "seconds": sum(row["seconds"] for row in run["seconds"]) if run["seconds"] else None,
        }
        for run, one, lead in zip(runs, found, leads, strict=True)
    ]
