"""Measurements have keys: a run killed anywhere has, once it went on, the rows of one that was not, in order."""

import math

from regrow.store.metrics import Metrics

ROWS = [
    ({"what": "size", "model": "dense", "bytes": 4}, None),
    ({"what": "perplexity", "model": "dense", "source": "news", "ppl": 9.0}, None),
    ({"what": "perplexity", "model": "dense", "source": "code", "ppl": math.inf}, None),
    ({"what": "perplexity", "model": "pruned", "source": "news", "ppl": 9.0}, None),
    ({"what": "paired", "source": "news", "delta_nll": 0.1}, None),
    ({"what": "recovery", "by": "refit"}, None),
    ({"what": "perplexity", "model": "recovered", "source": "news", "ppl": 8.0}, None),
    ({"what": "paired", "source": "news", "delta_nll": 0.1, "of": ["pruned", "recovered"]}, None),
    ({"what": "paired", "source": "news", "delta_nll": 0.1, "of": ["dense", "recovered"]}, None),
    ({"what": "recovery", "by": "lora", "round": 2}, None),
    ({"what": "perplexity", "model": "recovered", "source": "news", "ppl": 7.0, "round": 2}, None),
    *[({"what": "growth", "task": 0, "grown": {"a": 2}}, i) for i in range(3)],  # alike, and yet three
    ({"what": "task", "task": 0, "name": "a"}, None),
    ({"what": "task", "task": 1, "name": "a"}, None),
    ({"what": "matrix", "tasks": ["a"]}, None),
    ({"what": "matrix", "tasks": ["a", "a"]}, None),
]


def added(path, rows):
    log = Metrics(path)
    for row, number in rows:
        log.add(row, number)
    return path.read_bytes()


def test_replaying_adds_nothing_wherever_the_run_was_killed(tmp_path):
    whole = added(tmp_path / "whole", ROWS)
    assert whole.count(b"\n") == len(ROWS)
    for killed in range(len(ROWS) + 1):
        path = tmp_path / "killed"
        path.unlink(missing_ok=True)
        path.touch()
        added(path, ROWS[:killed])
        assert added(path, ROWS) == whole


def test_kinds_that_nobody_listed_are_always_added(tmp_path):
    log = Metrics(tmp_path / "m")
    for _ in range(2):
        log.add({"what": "note", "text": "a"})
    assert [row["text"] for row in log.rows()] == ["a", "a"]
