"""Sensitivity, modules and the switch: what they say of ranks whose noise and shifts are known."""

import pytest
import torch

from hand import lm, texts
from regrow.core.axes import Axis
from regrow.core.scores import Need, Scores, merge_statistics
from regrow.methods.pruning.gprune.modules import (
    LEAST,
    Modules,
    compute_reliability,
    partition,
    rank_in_modules,
)
from regrow.scoring.collect import collect
from regrow.scoring.metrics import peak_to_peak, wifv
from regrow.scoring.spaces import make_ranking_spaces, percentile, rank_units, sensitivity, spectrum
from regrow.scoring.weights import weights_of

PARTITIONS = ("thresholds", "random", "layer")
SWITCHES = ("unreliable", "blend", "even", "never", "always", "reversed")
N, M, S = 400, 4, 4
AXES = [Axis("a", N, ()), Axis("b", N, ()), *(Axis(f"g{i}", 3, ()) for i in range(12))]
AMONG = make_ranking_spaces(AXES)


def drawn(noise: float, shift: float, seed: int = 0) -> dict[str, tuple[Scores, list[Scores]]]:
    """Scores on M sources: a common value, a part of the source, and noise of the shard."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda n: torch.randn(n, generator=g, dtype=torch.float64)  # noqa: E731
    common = {axis.key: rand(axis.size) for axis in AXES}
    found = {}
    for m in range(M):
        own = {axis.key: common[axis.key] + shift * rand(axis.size) for axis in AXES}
        shards = [{key: value + noise * rand(len(value)) for key, value in own.items()} for _ in range(S)]
        whole = {key: torch.stack([shard[key] for shard in shards]).mean(0) for key in own}
        found[f"s{m}"] = (Scores(whole, "toy"), [Scores(shard, "toy") for shard in shards])
    return found


def test_equal_values_share_a_rank_and_monotone_maps_change_none() -> None:
    values = torch.tensor([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert percentile(values).tolist() == [[0.75, 0.125, 0.75, 0.375], [0.5] * 4]
    assert torch.equal(percentile(values[0]), percentile(values[0].exp() * 7))


def test_identical_sources_are_not_sensitive() -> None:
    one = next(iter(drawn(0.3, 0.0).values()))
    found = rank_units({"x": one, "y": one, "z": one}, AMONG)
    assert all(bool((value == 0).all()) for value in sensitivity(found).values())


def test_sensitivity_ignores_a_monotone_map_of_one_source_and_follows_a_permutation() -> None:
    scores = drawn(0.3, 0.5)
    before = sensitivity(rank_units(scores, AMONG))
    whole, shards = scores["s1"]
    up = lambda s: Scores({key: (2 * value).exp() for key, value in s.values.items()}, "toy")  # noqa: E731
    assert all(
        torch.equal(before[key], value)
        for key, value in sensitivity(rank_units({**scores, "s1": (up(whole), [up(s) for s in shards])}, AMONG)).items()
    )
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    moved = lambda s: Scores({**s.values, "a": s.values["a"][order]}, "toy")  # noqa: E731
    after = sensitivity(rank_units({k: (moved(w), [moved(s) for s in p]) for k, (w, p) in scores.items()}, AMONG))
    assert torch.equal(after["a"], before["a"][order]) and torch.equal(after["b"], before["b"])


def test_noise_alone_is_told_from_sensitivity() -> None:
    noise = {row["space"]: row for row in spectrum(rank_units(drawn(0.5, 0.0), AMONG), AMONG)}
    real = {row["space"]: row for row in spectrum(rank_units(drawn(0.2, 0.6), AMONG), AMONG)}
    for key in ("a", "b"):
        assert 0.02 < noise[key]["significant"] < 0.09 and abs(noise[key]["exceeds"] - noise[key]["exceeds_null"]) < 0.1
        assert abs(noise[key]["spearman_shards"] - noise[key]["spearman_within"]) < 0.03
        assert real[key]["significant"] > 0.6 and real[key]["share"] > 0.5
        assert real[key]["spearman_within"] > real[key]["spearman_shards"] + 0.15
    assert len(noise) == 3 and noise["12 × "]["units"] == 36, "small axes of a kind are ranked together"


@pytest.mark.parametrize("how", PARTITIONS)
def test_every_unit_is_in_one_module_and_none_is_tiny(how: str) -> None:
    scores = drawn(0.3, 0.5)
    found = rank_units(scores, AMONG)
    among = make_ranking_spaces(AXES, parts=4)
    base = scores["s0"][0].values
    modules = partition(how, among, base, sensitivity(found), seed=1)
    assert {key: len(value) for key, value in modules.labels.items()} == {axis.key: axis.size for axis in AXES}
    counts = torch.bincount(torch.cat(list(modules.labels.values())), minlength=len(modules))
    assert int(counts.min()) >= (3 if how == "layer" else LEAST) and len(counts) == len(modules.spaces)
    again = partition(how, among, base, sensitivity(found), seed=1)
    assert all(torch.equal(again.labels[key], value) for key, value in modules.labels.items())
    for number, space in enumerate(modules.spaces):
        where = {key for key, labels in modules.labels.items() if bool((labels == number).any())}
        assert where <= set(among[space].keys)
    if how == "layer":
        assert modules.names == tuple(axis.key for axis in AXES)


def test_modules_are_split_by_sensitivity_and_score_and_random_ones_have_the_same_sizes() -> None:
    scores = drawn(0.3, 0.5)
    found, base = rank_units(scores, AMONG), scores["s0"][0].values
    spread, among = sensitivity(found), make_ranking_spaces(AXES, parts=4)
    alike = partition("thresholds", among, base, spread)
    a = alike.labels["a"]
    robust, sensitive = ((spread["a"][a == i]) for i in (0, 2))
    assert float(robust.max()) <= float(sensitive.min())
    assert float(base["a"][a == 0].max()) <= float(base["a"][a == 1].min())
    assert alike.names[:4] == ("a robust weak", "a robust strong", "a sensitive weak", "a sensitive strong")
    random = partition("random", among, base, spread, seed=2).labels["a"]
    assert torch.equal(torch.bincount(random), torch.bincount(a))
    assert 0.15 < float((random == a).double().mean()) < 0.4


def test_what_is_switched() -> None:
    scores = drawn(0.3, 0.5)
    found, base = rank_units(scores, AMONG), scores["s0"][0].values
    spread, among = sensitivity(found), make_ranking_spaces(AXES, parts=4)
    modules = partition("thresholds", among, base, spread)
    trust = {how: compute_reliability(how, among, modules, base, spread).trust for how in SWITCHES}
    small = torch.tensor([among[i].pooled for i in modules.spaces])
    assert all(bool((value[small] == 1).all()) for value in trust.values()), "small axes are not judged"
    big, names = ~small, modules.names
    assert bool((trust["never"] == 1).all()) and bool((trust["always"][big] == 0).all())
    sizes = torch.bincount(torch.cat(list(modules.labels.values())))
    for how in ("unreliable", "reversed"):
        assert 0 < float(sizes[(trust[how] == 0)].sum()) <= 0.25 * float(sizes[big].sum())
    assert {names[i].split(" ", 1)[1] for i in range(len(names)) if trust["unreliable"][i] == 0} == {"sensitive weak"}
    assert not bool(((trust["unreliable"] == 0) & (trust["reversed"] == 0)).any())
    assert bool(((trust["blend"] >= 0) & (trust["blend"] <= 1)).all())
    assert float(trust["even"][big].std()) < 1e-12
    assert float((sizes * trust["even"]).sum()) == pytest.approx(float((sizes * trust["blend"]).sum()))


def test_a_switched_module_ignores_the_calibration_and_others_keep_the_base_order() -> None:
    scores = drawn(0.3, 0.5)
    found, among = rank_units(scores, AMONG), make_ranking_spaces(AXES, parts=4)
    base, other = scores["s0"][0].values, scores["s3"][0].values
    modules = partition("thresholds", among, base, sensitivity(found))
    instead = {key: torch.rand(len(value), dtype=torch.float64) for key, value in base.items()}
    trust = torch.ones(len(modules), dtype=torch.float64)
    trust[2] = 0
    one, two = (rank_in_modules(modules, trust, given, instead) for given in (base, other))
    mine, rest = modules.labels["a"] == 2, modules.labels["a"] == 1
    assert torch.equal(one["a"][mine], two["a"][mine])
    assert torch.equal(torch.argsort(one["a"][mine]), torch.argsort(instead["a"][mine]))
    assert torch.equal(torch.argsort(one["a"][rest]), torch.argsort(base["a"][rest]))
    assert sorted(one["a"][mine].tolist()) == [(i + 0.5) / int(mine.sum()) for i in range(int(mine.sum()))]


def test_the_peak_to_peak_is_that_of_the_rows_of_a_unit() -> None:
    model, axes = lm()
    weights, units = weights_of(model), axes.units()
    peaks = peak_to_peak(weights, axes, units=units)
    gate, up = (weights[f"decoder.blocks.0.{name}.weight"].double() for name in ("gate", "up"))
    key = "decoder.blocks.0.gate.weight:0"
    spans = sum(w.amax(1) + w.amin(1).abs() for w in (gate, up))
    assert torch.allclose(peaks[key], spans)


def test_ranks_of_real_statistics_have_the_shapes_they_should() -> None:
    model, axes = lm()
    found = collect(model, axes, [texts("x"), texts("y", seed=3)], {Need.ACTIVATIONS}, shards=2)
    score = lambda s: wifv(weights_of(model), axes, s, units=axes.units())  # noqa: E731
    by = {name: (score(merge_statistics(shards[:2])), [score(one) for one in shards]) for name, shards in found.items()}
    got = rank_units(by, make_ranking_spaces(axes.units()))
    for axis in axes.units():
        assert got.whole[axis.key].shape == (2, axis.size) and got.shards[axis.key].shape == (2, 2, axis.size)


def test_modules_keep_their_numbers_where_another_partition_has_the_same() -> None:
    scores = drawn(0.3, 0.5)
    among, base = make_ranking_spaces(AXES, parts=4), scores["s0"][0].values
    found = rank_units(scores, AMONG)
    fine, coarse = (partition(how, among, base, sensitivity(found)) for how in ("thresholds", "layer"))
    assert fine.numbered_as(fine, among).labels.keys() == fine.labels.keys()
    assert all(torch.equal(row, fine.labels[key]) for key, row in fine.numbered_as(fine, among).labels.items())
    assert all(torch.equal(row, fine.labels[key]) for key, row in coarse.numbered_as(fine, among).labels.items())
    shifted = Modules(fine.labels, tuple(f"x {n}" if n.startswith("a ") else n for n in fine.names), fine.spaces)
    mixed = Modules({k: fine.labels[k].flip(0) for k in fine.labels}, shifted.names, fine.spaces)
    told = mixed.numbered_as(fine, among).labels
    assert all(
        torch.equal(row, fine.labels[key].flip(0) if key != "a" else fine.labels[key]) for key, row in told.items()
    )
