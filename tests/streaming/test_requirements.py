"""Memory is predicted from shapes, and the amount that a message names is enough."""

import re

import pytest

from regrow.core.amounts import parse_bytes
from regrow.core.errors import ResourceError
from regrow.streaming import requirements
from regrow.streaming.opening import open_network
from regrow.streaming.requirements import plan_memory


def test_the_amount_that_is_named_is_enough_for_a_process_that_has_more(folder, monkeypatch):
    network = open_network(str(folder)).network()
    monkeypatch.setattr(requirements, "WHOLE_COPIES", 1e9)
    for resident in (123_456_789, 987_654_321, 5_678_901_234):
        monkeypatch.setattr(requirements, "read_resident", lambda resident=resident: resident)
        with pytest.raises(ResourceError) as refused:
            plan_memory(network, 1, windows=2, tokens=8).check()
        limit = parse_bytes(re.search(r"--memory (\S+)", str(refused.value))[1])
        monkeypatch.setattr(requirements, "read_resident", lambda resident=resident: int(1.02 * resident))
        assert plan_memory(network, limit, windows=2, tokens=8).least <= limit
