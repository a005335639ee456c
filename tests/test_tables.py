"""What results show when they are printed or displayed in a notebook: the same figures, escaped, and not too many."""

from dataclasses import replace

import torch

import regrow
from hand import lm, mlp
from regrow.allocation.cost import Cost
from regrow.core.amounts import Measure
from regrow.core.axes import Mark
from regrow.core.change import Change
from regrow.core.plan import Plan
from regrow.core.tables import MAX_ROWS
from regrow.evaluation.scores import Evaluation


def test_a_unit_costs_what_the_network_costs_less_without_it() -> None:
    for _, axes in (lm(), mlp(5, 5)):
        parameters, macs = Cost(axes, Measure.PARAMETERS), Cost(axes, Measure.MACS)
        for row in axes.inventory():
            less = {row.key: row.size - 1}
            assert row.unit_params == parameters.total - parameters(less)
            assert row.unit_macs == macs.total - macs(less)


def test_printed_axes_are_the_table_of_show_and_short() -> None:
    _, axes = lm(blocks=3)
    text = str(axes)
    assert text.startswith("What can be cut\nmade by → read by") and text.endswith(axes.summary())
    assert all(str(row[0]) in text for table in axes.tables() for row in table.rows)
    frozen = {
        key: replace(axis, mark=Mark.FROZEN, reason=f"<b>{chr(97 + i)}</b>")
        for i, (key, axis) in enumerate(axes.axes.items())
    }
    html = replace(axes, axes=frozen)._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;a&lt;/b&gt;" in html
    first = next(iter(axes))
    many = {
        key: replace(first, key=key, slots=(replace(first.slots[0], name=key[:-2]),))
        for key in (f"{'m' * i}.w:0" for i in range(1, 91))
    }
    lines = str(replace(axes, axes={**axes.axes, **many})).splitlines()
    kinds = len(axes.tables()[0].rows) + len(many)
    assert len(lines) < MAX_ROWS + 6 and f"… and {kinds - MAX_ROWS} more" in lines


def test_results_have_tables_for_notebooks() -> None:
    plan = Plan({"<key>": Change(4, (0, 2), (), grow=1)}, origin={"method": "flap"})
    assert "<tr><td>&lt;key&gt;</td>" in plan._repr_html_() and ">3</td>" in plan._repr_html_()
    measured = Evaluation("<news>", "next-token", 2.0, 0.1, "accuracy", 0.5, 0.1, 1000)
    assert "&lt;news&gt;" in measured._repr_html_() and "7.389" in measured._repr_html_()
    net = torch.nn.Linear(4, 2)
    data = torch.randn(8, 4), torch.arange(8) % 2
    html = regrow.learn(net, [data], method="naive", epochs=1)._repr_html_()
    assert "after learning" in html and "average" in html
