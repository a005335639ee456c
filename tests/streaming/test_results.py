"""Results of blocks are what the blocks returned, as long as later blocks read them."""

import pytest
import torch

from regrow.core.errors import InputError
from regrow.streaming.weights import BlockResults


def test_a_result_that_is_changed_in_place_is_refused():
    results, hidden = BlockResults(), torch.ones(2, 3)
    hidden.add_(1)
    results.put(0, 0, (hidden, None))
    assert torch.equal(results.get(0, 0)[0], hidden)
    results.get(0, 0)[0][:1].mul_(2)
    with pytest.raises(InputError, match=r"block 1 is changed in place.*load the model in memory"):
        results.get(0, 0)
    results.drop(0, 0)
    results.get(0, 0)[0].add_(1)
    assert results.get(0, 0)[0].is_meta


def test_results_in_one_folder_do_not_meet(tmp_path):
    with BlockResults(tmp_path) as one, BlockResults(tmp_path) as other:
        for number, results in enumerate((one, other)):
            results.put(0, 0, torch.full((2,), float(number)))
        other.__exit__()
        assert torch.equal(one.get(0, 0), torch.zeros(2))
    assert not any(tmp_path.iterdir())
