"""What the pass over a source sees, against what stored activations say."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hand import conv, graph, lm, mlp, slot, stored, texts, vectors
from regrow.core.axes import Axis, Role
from regrow.core.scores import Moments, Need, Statistics, merge_statistics
from regrow.core.sources import Batch, Source
from regrow.evaluation.memory import MemoryCounterMode
from regrow.scoring import watch
from regrow.scoring.collect import CollectionOptions, collect
from regrow.scoring.gradients import add_gradients
from regrow.store.statistics import read_finished_shards, save_statistics

ACTIVATIONS = {Need.ACTIVATIONS}


def same(a: Moments, b: Moments, **bounds: float) -> None:
    assert a.count == b.count
    for field in ("total", "square"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), **bounds)


def direct(x: Tensor) -> Moments:
    return Moments(len(x) * x.shape[1], x.sum((0, 1)), x.square().sum((0, 1)))


def test_moments_equal_those_of_stored_activations() -> None:
    model, axes = lm()
    source = texts("a")
    (seen,) = collect(model, axes, [source], ACTIVATIONS)["a"]
    block = model.decoder.blocks[1]
    assert set(seen.moments) == {f"decoder.blocks.{i}.{m}.weight" for i in (0, 1) for m in ("o", "down")}
    same(seen.moments["decoder.blocks.1.o.weight"], direct(stored(model, block.o, source)), rtol=1e-5, atol=1e-5)
    same(seen.moments["decoder.blocks.1.down.weight"], direct(stored(model, block.down, source)), rtol=1e-5, atol=1e-5)
    assert seen.tokens == source.tokens == 84


def test_convolution_inputs_are_pixels_of_channels_and_groups_keep_theirs() -> None:
    for groups in (1, 2):
        model, axes = conv(groups=groups)
        model.train()
        torch.manual_seed(3)
        source = Source("p", [Batch((torch.randn(2, 3, 5, 5),))])
        (seen,) = collect(model, axes, [source], ACTIVATIONS)["p"]
        assert model[1].training and int(model[1].num_batches_tracked) == 0
        pixels = stored(model.eval(), model[3], source).flatten(2).transpose(1, 2)
        same(seen.moments["3.weight"], direct(pixels), rtol=1e-5, atol=1e-5)
        assert len(seen.moments["3.weight"].total) == 6 and seen.tokens == 2


def test_merging_halves_gives_the_whole_gradients_too() -> None:
    model, axes = lm()
    needs = {Need.ACTIVATIONS, Need.GRADIENTS}
    source = texts("a", batches=4)
    source = Source(
        "a", [*source.batches[:3], Batch((source.batches[3].args[0][:1],), labels=source.batches[3].labels[:1])]
    )
    (whole,) = collect(model, axes, [source], needs)["a"]
    parts = collect(model, axes, [source], needs, shards=2)["a"]
    both = merge_statistics(parts[:2])
    assert [part.tokens for part in parts] == [42, 28] and both.tokens == whole.tokens
    for name, moments in whole.moments.items():
        same(both.moments[name], moments, rtol=1e-6, atol=1e-6)
    assert whole.gradients.keys() == both.gradients.keys() and len(whole.gradients) == 14
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(both.gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradient_is_that_of_the_summed_loss_and_nothing_is_left_behind() -> None:
    model, axes = lm()
    source = texts("a", batches=1)
    labels = source.batches[0].labels.clone()
    labels[0, :3] = -100
    source = Source("a", [Batch(source.batches[0].args, labels=labels)])
    model.decoder.blocks[0].up.weight.requires_grad_(False)
    (seen,) = collect(model, axes, [source], {Need.GRADIENTS})["a"]
    assert not seen.moments and seen.tokens == 18
    assert all(p.grad is None for p in model.parameters())
    assert not model.decoder.blocks[0].up.weight.requires_grad and model.head.weight.requires_grad
    model.decoder.blocks[0].up.weight.requires_grad_(True)
    loss = F.cross_entropy(model(*source.batches[0].args)[0].flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    for name in ("decoder.blocks.0.up.weight", "decoder.blocks.1.k.weight"):
        torch.testing.assert_close(seen.gradients[name], model.get_parameter(name).grad, rtol=1e-4, atol=1e-5)


def test_sums_of_gradients_are_exact_and_one_gradient_is_in_memory_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(16)))
    model.register_parameter("unread", nn.Parameter(torch.ones(3)))
    model[0].weight.grad = torch.ones(64, 64)
    names = [name for name, _ in model.named_parameters()]
    batches = [Batch((torch.randn(2, 64),), labels=torch.tensor([1, 63])) for _ in range(2)]
    sums: dict[str, torch.Tensor] = {}
    with MemoryCounterMode(model.parameters()) as live:
        for batch in batches:
            add_gradients(model, batch, names, sums)
    each = 4 * 64 * 64
    assert live.peak - live.held < (16 + 4) * each
    assert [*sums] == names and torch.equal(sums["unread"], torch.zeros(3))
    assert torch.equal(model[0].weight.grad, torch.ones(64, 64)) and model[1].weight.grad is None
    whole = [
        torch.autograd.grad(F.cross_entropy(model(*one.args), one.labels), [*model[:].parameters()]) for one in batches
    ]
    for name, *parts in zip(names[1:], *whole, strict=True):
        assert torch.equal(sums[name], parts[0] * 2 + parts[1] * 2)


def test_the_head_does_not_run_unless_something_past_the_trunk_is_read() -> None:
    model, axes = lm()
    collect(model, axes, [texts("a")], ACTIVATIONS)
    assert model.head_ran == 0
    width = Axis(
        "decoder.embed.weight:1",
        8,
        (slot("decoder.embed.weight", 1, Role.PRODUCES), slot("head.weight", 1, Role.CONSUMES)),
    )
    (seen,) = collect(model, axes, [texts("a")], ACTIVATIONS, units=[width])["a"]
    assert model.head_ran == 4
    assert list(seen.moments) == ["decoder.embed.weight"], "a tied weight goes by its first name"
    same(seen.moments["decoder.embed.weight"], direct(stored(model, model.head, texts("a"))), rtol=1e-5, atol=1e-5)


def test_what_a_trunk_leaves_out_is_found_by_running_the_whole() -> None:
    class Odd(nn.Module):
        """Its seam is a submodule that does not use all of its own weights."""

        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
            self.base_model.forward = lambda x: self.base_model[0](x)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_model[1](self.base_model[0](x))

    model = Odd()
    ends = (slot("base_model.0.weight", 0, Role.PRODUCES), slot("base_model.1.weight", 1, Role.CONSUMES))
    axis = Axis("base_model.0.weight:0", 4, ends)
    (seen,) = collect(model, graph(model, [axis], {}), [vectors()], ACTIVATIONS)["v"]
    assert seen.moments["base_model.1.weight"].count == 10


@pytest.mark.parametrize("form", ["addmm", "matmul", "at", "transposed", "left", "mm"])
def test_every_way_to_multiply_is_seen(form: str) -> None:
    class Product(nn.Module):
        """x W with W ``[in, out]``, as GPT-2 has it, and other spellings."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(*(3, 4) if form in ("transposed", "left") else (4, 3)))

        def forward(self, x: Tensor) -> Tensor:
            match form:
                case "addmm":
                    return torch.addmm(torch.zeros(3), x.view(-1, 4), self.w).view(*x.shape[:-1], 3)
                case "mm":
                    return torch.mm(x.view(-1, 4), self.w)
                case "matmul":
                    return torch.matmul(x, self.w)
                case "at":
                    return x @ self.w
                case "transposed":
                    return x @ self.w.T
                case _:
                    return self.w @ x.transpose(1, 2)

    model = Product()
    dim = 1 if form in ("transposed", "left") else 0
    axis = Axis("w:x", 4, (slot("w", dim, Role.CONSUMES),))
    x = torch.randn(2, 5, 4)
    (seen,) = collect(model, graph(model, [axis], {}), [Source("s", [Batch((x,))])], ACTIVATIONS)["s"]
    same(seen.moments["w"], direct(x.double()), rtol=1e-5, atol=1e-5)


def test_padding_does_not_count() -> None:
    model, axes = lm()
    ids = torch.randint(0, 11, (2, 6))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    padded = Source("a", [Batch((ids,), {"attention_mask": mask})])
    apart = Source("a", [Batch((ids[:1],)), Batch((ids[1:, :4],))])
    (one,), (two,) = (collect(model, axes, [source], ACTIVATIONS)["a"] for source in (padded, apart))
    for name in one.moments:
        same(one.moments[name], two.moments[name], rtol=1e-5, atol=1e-5)
    assert one.moments["decoder.blocks.0.o.weight"].count == 10


def test_a_killed_pass_goes_on_where_it_stopped() -> None:
    model, axes = lm()
    sources = [texts("a"), texts("b", seed=5)]
    whole = collect(model, axes, sources, ACTIVATIONS, shards=2)
    done: dict[tuple[str, int], Statistics] = {}

    def kill(finished: int, total: int, what: str) -> None:
        assert total == 8
        if finished == 7:
            raise KeyboardInterrupt

    def keep(name: str, shard: int, statistics: Statistics) -> None:
        done[name, shard] = statistics

    model.train()
    with pytest.raises(KeyboardInterrupt):
        collect(model, axes, sources, ACTIVATIONS, shards=2, options=CollectionOptions(on_done=keep, progress=kill))
    assert model.training and set(done) == {("a", 0), ("a", 1), ("b", 0)}
    finished: list[int] = []
    run = CollectionOptions(done=done, progress=lambda i, total, what: finished.append(i))
    again = collect(model, axes, sources, ACTIVATIONS, shards=2, options=run)
    assert finished[-1] == 8 and len(finished) < 8
    for name in whole:
        for a, b in zip(whole[name], again[name], strict=True):
            for weight in a.moments:
                assert torch.equal(a.moments[weight].total, b.moments[weight].total)
                assert torch.equal(a.moments[weight].square, b.moments[weight].square)


def test_half_precision_is_summed_in_float32() -> None:
    model, axes = mlp(width=6)
    model = model.to(torch.bfloat16)
    source = Source("v", [Batch((torch.randn(4096, 4, dtype=torch.bfloat16) + 1,))])
    (seen,) = collect(model, axes, [source], ACTIVATIONS)["v"]
    x = stored(model, model[2], source)[:, None]
    same(seen.moments["2.weight"], direct(x), rtol=1e-5, atol=1e-4)


def test_bad_inputs_are_named() -> None:
    model, axes = lm()
    model.decoder.blocks[0].v.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"decoder.blocks.0.o.weight.*NaN.*'a'"):
        collect(model, axes, [texts("a")], ACTIVATIONS)
    model, axes = lm()
    with pytest.raises(ValueError, match="'a' has 4 batches and cannot be split into 5"):
        collect(model, axes, [texts("a")], ACTIVATIONS, shards=5)
    with pytest.raises(ValueError, match="two sources are called 'a'"):
        collect(model, axes, [texts("a"), texts("a")], ACTIVATIONS)
    with pytest.raises(ValueError, match="labels"):
        collect(model, axes, [Source("a", [Batch((torch.zeros(1, 2, dtype=torch.long),))])], {Need.GRADIENTS})
    assert collect(model, axes, [texts("a")], {Need.WEIGHTS}) == {}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(1, 512, 1536), (2, 37, 9216), (1, 512, 576)])
def test_sums_of_a_part_of_the_channels_at_a_time_are_those_of_all_at_once(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], threads: int
) -> None:
    rows, mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)), torch.arange(shape[1]).ge(5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [
            watch._sum_moments(rows.to(dtype), 2, mask.expand(shape[:2])) for dtype in (torch.bfloat16, torch.float32)
        ]
        monkeypatch.setattr(watch, "_strip_width", lambda rows, channels: rows.shape[channels])
        whole = [
            watch._sum_moments(rows.to(dtype), 2, mask.expand(shape[:2])) for dtype in (torch.bfloat16, torch.float32)
        ]
    finally:
        torch.set_num_threads(before)
    for one, other in zip(parts, whole, strict=True):
        assert torch.equal(one.total, other.total) and torch.equal(one.square, other.square)


def test_gradients_of_shards_are_added() -> None:
    parts = [Statistics("a", 1, {}, {"w": torch.full((2,), float(i))}, {}) for i in (1, 2, 4)]
    assert merge_statistics(parts).gradients["w"].tolist() == [7, 7]
    assert parts[0].gradients["w"].tolist() == [1, 1]


def test_a_finished_shard_is_taken_over_for_its_own_fingerprint_alone(tmp_path: Path) -> None:
    save_statistics(tmp_path, "a", 0, Statistics("a", 3, {}, {"w": torch.ones(2)}, {}), key="these settings")
    assert [*read_finished_shards(tmp_path, {"a": "these settings"})] == [("a", 0)]
    assert read_finished_shards(tmp_path, {"a": "other settings"}) == {}
