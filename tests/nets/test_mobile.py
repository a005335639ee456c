"""Networks of inverted bottlenecks: the whole space, what is left of it, and descriptions that are none."""

import copy
import json

import pytest
import torch

from regrow import Plan, apply, trace
from regrow.allocation.commits import cell_of, kind_of
from regrow.core.candidates import Prefix, candidate_paths
from regrow.jobs.spaces import rebuild_network
from regrow.nets.load import build
from regrow.nets.loaded import ModelError, Origin
from regrow.nets.mobile import Mobile, check_description, describe_result, supernet_config, thin_config
from regrow.tracing.branches import find_placeholders
from zoo import randomise

FEW = ("mb3e3", "mb7e6", "skip")
CONFIG = supernet_config((3, 16, 16), 5, width=4, blocks=2, heads=(3,), operations=FEW)
FIRST = {name: value for name, value in CONFIG.items() if name != "blocks"} | {
    "blocks": CONFIG["blocks"][:2],
    "heads": [1],
}
"""The first stage alone."""


def test_the_paper_s_space_is_the_default():
    config = supernet_config((3, 224, 224), 1000)
    assert config["stem"] == [32, 16] and config["mix"] == 1280 and len(config["blocks"]) == 21
    assert [plan["width"] for plan in config["blocks"]] == [w for w in (24, 40, 80, 96, 192) for _ in range(4)] + [320]
    assert [i for i, plan in enumerate(config["blocks"]) if plan["stride"] == 2] == [0, 4, 8, 16]
    assert [len(plan["ops"]) for plan in config["blocks"]] == [6, 7, 7, 7] * 5 + [6]
    assert config["blocks"][0]["ops"][3:5] == [["mb3e6", 96], ["mb5e6", 96]]


def test_the_classifier_of_a_stage_is_one_answer_of_the_whole():
    net = randomise(Mobile(CONFIG))
    x = torch.randn(2, 3, 16, 16)
    first, last = net(x)
    assert first.shape == last.shape == (2, 5)
    assert torch.equal(net.logits_at(x, 3), first)
    assert torch.equal(net.logits_at(x, 10), last)


def test_a_stage_runs_what_lies_within_it_and_nothing_else():
    net = Mobile(CONFIG)
    net.logits_at(torch.randn(2, 3, 16, 16), 3).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is not None) == net.uses_parameter(name, 3), name


def test_a_block_is_what_it_reads_and_what_bottlenecks_make_of_it():
    net = randomise(Mobile(FIRST))
    block, x = net.get_submodule("blocks.1"), torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        sums = block.scale[0] * block.ops["mb3e3"](x) + block.scale[1] * block.ops["mb7e6"](x) + block.scale[2] * x
        assert torch.allclose(block(x, x), sums, rtol=0, atol=1e-6)
    assert list(net.get_submodule("blocks.0").ops) == ["mb3e3", "mb7e6"]  # it halves the picture: nothing to skip


def test_what_is_left_is_described_and_built_again_alike():
    """Operations and filters go; bottlenecks of a block go on different widths inside, and a block may be skipped."""
    net = randomise(Mobile(FIRST)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    axes = trace(net, x)
    keep = {}
    for axis in axes.units():
        if axis.size > 4:
            keep[axis.key] = list(range(0, axis.size, 2))
    drop = ["blocks.0.ops.mb3e3", "blocks.1.ops.mb3e3", "blocks.1.ops.mb7e6"]
    keep = {k: v for k, v in keep.items() if not any(axes[k].slots[0].name.startswith(path) for path in drop)}
    small, _ = apply(net, axes, Plan.dropping(axes, drop, keep))
    config = describe_result(small, FIRST, find_placeholders(small).keys())
    assert [[name for name, _ in plan["ops"]] for plan in config["blocks"]] == [["mb7e6"], ["skip"]]
    assert config["blocks"][0]["ops"][0][1] == 12 and config["mix"] == FIRST["mix"] // 2
    again = rebuild_network(json.loads(json.dumps(config)), small)
    assert torch.equal(again.double()(x), small(x))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in small.parameters())  # scales of the gone


def test_without_its_skip_a_block_may_be_of_another_width():
    net = randomise(Mobile(FIRST)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    axes = trace(net, x)
    small, _ = apply(net, axes, Plan.dropping(axes, ["blocks.1.ops.skip"]))
    wide = next(a for a in trace(small, x).units() if any(s.name == "blocks.0.ops.mb3e3.6.weight" for s in a.slots))
    assert not any(slot.name == "blocks.1.ops.mb3e3.6.weight" for slot in wide.slots)


def test_operations_that_come_back_are_drawn_by_block():
    path = candidate_paths(Mobile(CONFIG))["blocks.3"][0]
    assert (cell_of(path), kind_of(path)) == ("blocks.3", "mb3e3")


def test_earlier_blocks_are_thinned_evenly_and_the_prefix_runs():
    small = thin_config(CONFIG, 4, 0.4)
    many = [len(plan["ops"]) for plan in CONFIG["blocks"][:4]], [len(plan["ops"]) for plan in small["blocks"][:4]]
    assert sum(many[1]) == 4 and all(n == 1 for n in many[1]) and sum(many[0]) == 10
    assert small["blocks"][4:] == CONFIG["blocks"][4:] and thin_config(CONFIG, 4, 1.0) == CONFIG
    net = Prefix(Mobile({**small, "heads": [*CONFIG["heads"], 6]}), 6)
    assert net(torch.randn(2, 3, 16, 16)).shape == (2, 5) and sorted(map(int, net.net.heads)) == [3, 6, 10]


def test_an_origin_builds_it():
    again = build(Origin("mobile", "mobile", json.loads(json.dumps(CONFIG))))
    assert again.state_dict().keys() == Mobile(CONFIG).state_dict().keys()


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *way, last = path
    place = config
    for step in way:
        place = place[step]
    place[last] = value
    return config


@pytest.mark.parametrize(
    "config",
    [
        changed(["stem"], [8]),
        changed(["stem"], [8, -3]),
        changed(["mix"], 10**9),
        changed(["classes"], "ten"),
        changed(["blocks"], []),
        changed(["blocks", 0, "ops"], []),
        changed(["blocks", 0, "ops", 0], ["exec", 4]),
        changed(["blocks", 0, "ops", 0], ["mb7e6", 4]),
        changed(["blocks", 0, "ops", 0], ["skip", 4]),
        changed(["blocks", 0, "ops", 0], ["mb3e3", True]),
        changed(["blocks", 0, "stride"], 3),
        changed(["blocks", 1, "width"], 5),
        changed(["heads"], [3]),
        changed(["heads"], [17]),
        {"shape": [3, 16, 16]},
    ],
)
def test_what_is_no_description_is_refused(config):
    with pytest.raises(ModelError):
        check_description(config)
