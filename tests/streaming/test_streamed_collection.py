"""Streamed = in memory: the same sums of the inputs of every weight, bit for bit, with one block in memory."""

import pytest
import torch

from regrow import nets
from regrow.core.scores import Need
from regrow.scoring.collect import CollectionOptions, collect
from regrow.streaming.opening import open_network
from regrow.tracing import trace


@pytest.mark.parametrize("on_disk", [False, True])
def test_streamed_sums_are_those_of_the_whole_network(folder, sources, on_disk, tmp_path):
    loaded = nets.load(str(folder))
    axes = trace(loaded.model, *loaded.example.args, **loaded.example.kwargs)
    opened = open_network(str(folder))
    assert [axis.key for axis in opened.axes] == [axis.key for axis in axes]
    network = opened.network(tmp_path if on_disk else None)
    assert len(network.blocks) == 3
    options = {"needs": {Need.ACTIVATIONS}, "shards": 3, "units": [*axes]}
    whole = collect(loaded.model, axes, sources, **options)
    streamed = collect(opened.loaded.model, opened.axes, sources, run=CollectionOptions(visits=network), **options)
    assert not any(tmp_path.iterdir())
    for name, shards in whole.items():
        for one, other in zip(shards, streamed[name], strict=True):
            assert one.tokens == other.tokens
            assert list(one.moments) == list(other.moments)
            for weight, sums in one.moments.items():
                for part in ("count", "total", "square"):
                    assert torch.equal(*(torch.as_tensor(getattr(m, part)) for m in (sums, other.moments[weight])))


def test_streamed_outputs_are_those_of_the_whole_network(folder, sources):
    loaded, network = nets.load(str(folder)), open_network(str(folder)).network()
    batches = [batch for source in sources for batch in source]
    with torch.no_grad():
        for batch, output in zip(batches, network.outputs(batches), strict=True):
            assert torch.equal(output.logits, loaded.model(*batch.args, **batch.kwargs).logits)
    read = network.outputs(batches)
    next(read)
    assert torch.is_grad_enabled()
    del read
    with torch.no_grad(), network.on_demand() as model:
        assert torch.equal(model(*batches[0].args).logits, loaded.model(*batches[0].args).logits)
