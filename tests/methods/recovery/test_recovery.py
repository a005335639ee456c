"""Recovery: least squares equals its closed form, training can be stopped anywhere, and what comes back is better."""

import copy
import signal
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hand import lm, mlp, texts
from regrow import Plan, apply, trace
from regrow.core.objectives import OBJECTIVES
from regrow.core.sources import Batch, Source, logits_in
from regrow.data.batch_streams import concatenate_batches
from regrow.evaluation import perplexity
from regrow.methods import RECOVERIES, MethodKind, find_method, recovery
from regrow.methods.recovery import RecoveryTask, distil, lora, refit, refit_work
from regrow.methods.recovery.refit_work import merge_batches
from regrow.methods.recovery.solve import RidgeCandidates, Sums, solve_ridge
from regrow.training.step import hold_interrupts


def task(model: nn.Module, axes, keep, source: Source, **more) -> RecoveryTask:
    dense = copy.deepcopy(model)
    plan = Plan.keeping(axes, keep)
    model, _ = apply(model, axes, plan)
    return RecoveryTask(model, dense, axes, plan, [source], **more)


def rows(batches: int = 8, width: int = 4, size: int = 16, seed: int = 1, shape: tuple[int, ...] = ()) -> Source:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(size, width, *shape, generator=generator)  # noqa: E731
    return Source("v", [Batch((draw(),), labels=torch.arange(size) % 3) for _ in range(batches)])


def perceptron(**more) -> RecoveryTask:
    model = mlp(width=12, second=9)[0]
    axes = trace(model, torch.randn(2, 4))
    return task(model, axes, {"0.weight:0": range(7), "2.weight:0": range(1, 7)}, rows(), **more)


def language(**more) -> RecoveryTask:
    model, _ = lm()
    source = texts("a", batches=8)
    axes = trace(model, *source.batches[0].args)
    halves = {axis.key: range(axis.size // 2) for axis in axes.units(only=("blocks",))}
    assert len(halves) == 4
    return task(model, axes, halves, source, **more)


def answers(model: nn.Module, source: Source) -> Tensor:
    with torch.no_grad():
        return torch.cat([logits_in(model(*batch.args)) for batch in source]).flatten(0, -2)


def error(one: RecoveryTask, seed: int) -> float:
    """How far the cut network is from the dense one, on inputs that no recovery has seen."""
    source = texts("t", seed=seed) if hasattr(one.model, "decoder") else rows(seed=seed)
    return float((answers(one.model, source) - answers(one.dense, source)).square().mean())


# --- refit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [refit.Settings(target=target) for target in ("own", "dense")])
@pytest.mark.parametrize("build", [perceptron, language])
def test_refit_brings_a_network_closer_to_the_dense_one_on_other_inputs(build, settings):
    one = build()
    before = error(one, 9)
    found = refit.refit(one, settings)
    assert error(one, 9) < 0.7 * before
    assert not found["left_out"] and all(row["after"] <= row["before"] for row in found["layers"])
    assert sum(row["after"] < 0.9 * row["before"] for row in found["layers"]) >= len(found["layers"]) / 2


@pytest.mark.parametrize("target", ["own", "dense"])
def test_refit_is_the_closed_form(target):
    one = perceptron()
    ridge = 0.05
    refit.refit(one, refit.Settings(ridges=(ridge,), target=target))
    x = torch.cat([batch.args[0] for batch in one.sources[0]]).double()
    own, dense = one.model.double(), one.dense.double()

    def solved(fed, wanted, start):
        """W′ = (Y Xᵀ + λ W)(X Xᵀ + λ)⁻¹, the bias as a last column."""
        fed = torch.cat([fed, torch.ones(len(fed), 1)], 1)
        gram = fed.T @ fed
        lam = ridge * gram.diagonal().mean()
        return torch.linalg.solve(gram + lam * torch.eye(len(gram)).double(), (wanted.T @ fed + lam * start).T).T

    with torch.no_grad():
        first, full = torch.relu(own[0](x)), torch.relu(dense[0](x))
        start = torch.cat([dense[2].weight[1:7, :7], dense[2].bias[1:7, None]], 1)
        middle = solved(first, dense[2](full)[:, 1:7], start)
        second, wide = torch.relu(own[2](first)), torch.relu(dense[2](full))
        if target == "own":  # the units that went, of a layer that reads what the cut network has, are as they were
            wide[:, 1:7] = second
        start = torch.cat([dense[4].weight[:, 1:7], dense[4].bias[:, None]], 1)
        last = solved(second, dense[4](wide), start)
    for layer, wanted in ((own[2], middle), (own[4], last)):
        torch.testing.assert_close(layer.weight.data, wanted[:, :-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.bias.data, wanted[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "target"), [(language, "dense"), (perceptron, "own")])
def test_the_target_residual_is_dense_where_outputs_are_added_to_a_residual_stream(build, target):
    one, two = build(), build()
    found, like = refit.refit(one, refit.Settings("residual")), refit.refit(two, refit.Settings(target))
    assert found["target"] == target and found["layers"] == like["layers"]
    assert ("residual stream" in found.get("note", "")) == (target == "own")
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


class Twice(nn.Module):
    """Runs each layer twice before it uses what the layer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.first(-x)
        p, q = self.last(torch.relu(a)), self.last(torch.tanh(b))
        return p - q


@pytest.mark.parametrize("target", ("auto", "own", "dense", "residual"))
def test_a_layer_that_runs_twice_is_not_fitted(target):
    model = Twice()
    one = task(model, trace(model, torch.randn(2, 4)), {"first.weight:0": range(7)}, rows())
    with pytest.raises(ValueError, match=r"last\.weight.* runs once per pass"):
        refit.refit(one, refit.Settings(target))


def test_padding_is_not_fitted():
    mask = torch.ones(3, 6, dtype=torch.int64)
    mask[1:, 4:] = 0
    weights = []
    for padding in (0, 7):
        source = texts("a", batches=8)
        batches = []
        for batch in source:
            ids = batch.args[0][:, :6].clone()
            ids[1:, 4:] = padding
            batches.append(Batch((ids,), {"attention_mask": mask}, batch.labels[:, :6]))
        model, _ = lm()
        axes = trace(model, batches[0].args[0])
        halves = {axis.key: range(axis.size // 2) for axis in axes.units(only=("blocks",))}
        one = task(model, axes, halves, Source("a", batches))
        assert refit.refit(one, refit.Settings())["layers"]
        weights.append(one.model.state_dict())
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())


def test_nothing_changes_where_nothing_is_missing():
    model = mlp(width=12)[0]
    axes = trace(model, torch.randn(2, 4))
    with torch.no_grad():
        model[0].bias[8:] = -100  # these neurons are never alive
    one = task(model, axes, {"0.weight:0": range(8)}, rows())
    before = copy.deepcopy(one.model.state_dict())
    found = refit.refit(one, refit.Settings())
    assert [row["ridge"] for row in found["layers"]] == [0.0]
    assert all(torch.equal(before[name], tensor) for name, tensor in one.model.state_dict().items())
    whole = RecoveryTask(copy.deepcopy(model), model, axes, Plan(), [rows()])
    assert refit.refit(whole, refit.Settings())["layers"] == []


def test_a_stream_is_made_up_for():
    """What a layer before lost for good, the last one gives back where it can see it."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(4, 10)
            self.d = nn.Linear(10, 6, bias=False)

        def forward(self, x):
            h = self.b(torch.relu(self.a(x)))
            return h + self.d(torch.relu(self.c(x)))

    torch.manual_seed(0)
    model = Net()
    axes = trace(model, torch.randn(2, 4))
    keep = {"a.weight:0": range(2), "c.weight:0": range(9)}
    left = {}
    for target in ("own", "dense"):
        one = task(copy.deepcopy(model), axes, keep, rows())
        refit.refit(one, refit.Settings(target=target))
        assert one.model.d.bias is not None  # it had none, and can have one
        left[target] = error(one, 9)
    assert left["dense"] < 0.7 * left["own"]


def test_convolutions_are_refitted_and_others_are_told():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 8, 3, padding=1, stride=2, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 9, 5),
    ).eval()
    source = rows(width=3, size=6, shape=(10, 10))
    axes = trace(model, source.batches[0].args[0])
    keep = {"0.weight:0": range(6), "2.weight:0": range(2), "4.weight:0": range(2)}
    one = task(model, axes, keep, source)
    other = rows(seed=5, width=3, size=6, shape=(10, 10))
    away = lambda: float((answers(one.model, other) - answers(one.dense, other)).square().mean())  # noqa: E731
    before = away()
    with pytest.raises(ValueError, match=r"4\.weight.* cannot be refitted: it is not a linear layer.*target=dense"):
        refit.refit(one, refit.Settings(target="own"))
    found = refit.refit(one, refit.Settings())
    assert found["target"] == "dense" and "4.weight" in found["left_out"]
    assert {"2.weight", "6.weight"} == {row["weight"] for row in found["layers"]} and away() < before
    assert model[2].bias is not None and model[2].bias.requires_grad


def test_refit_is_judged_on_the_source_that_is_left_out():
    one = language()
    several = [texts(name, seed=seed, batches=4) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    one, before = replace(one, sources=several), error(one, 9)
    settings = refit.Settings(choose_on="left_out_source", shrinkages=(0.5, 0.75, 1.0))
    found = refit.refit(one, settings)
    assert error(one, 9) < 0.7 * before and found["choose_on"] == "left_out_source"
    assert all(row["seen"] < row["after"] <= row["before"] for row in found["layers"])
    assert {row["shrinkage"] for row in found["layers"]} <= {0.0, 0.5, 0.75, 1.0}
    alone, plain = language(), language()
    found = refit.refit(alone, refit.Settings(choose_on="left_out_source"))
    assert "one set of data" in found["note"] and found["layers"] == refit.refit(plain, refit.Settings())["layers"]
    with pytest.raises(ValueError, match=r"choose_on must be one of held_out, left_out_source, got 'seen'"):
        refit.refit(language(), refit.Settings(choose_on="seen"))


def test_sources_are_left_out_whole_whatever_the_sizes_of_their_batches():
    one, settings = perceptron(), refit.Settings(choose_on="left_out_source")
    sources = [rows(1, size=48, seed=1), rows(6, size=8, seed=2), rows(2, size=16, seed=3)]
    whole = [Source(source.name, [concatenate_batches(list(source))]) for source in sources]
    found = [
        refit.refit(replace(one, model=copy.deepcopy(one.model), sources=some), settings) for some in (sources, whole)
    ]
    assert found[0]["layers"] == found[1]["layers"] and found[0]["choose_on"] == "left_out_source"


@pytest.mark.parametrize("settings", [refit.Settings(target=target) for target in ("own", "dense")])
@pytest.mark.parametrize("build", [perceptron, language])
def test_batches_that_wait_for_one_another_give_the_sums_of_one(build, settings, monkeypatch):
    one, several, ran = build(), build(), []
    found = refit.refit(one, settings)

    def split(parts, most):
        ran.append(merge_batches(parts, most, min_elements=1))
        return ran[-1]

    monkeypatch.setattr(refit, "merge_batches", split)
    again = refit.refit(several, settings)
    assert len(ran[0]) == 8
    for a, b in zip(found["layers"], again["layers"], strict=True):
        assert a["weight"] == b["weight"] and a["ridge"] == b["ridge"]
        assert b["after"] == pytest.approx(a["after"], rel=1e-4)
    for a, b in zip(one.model.parameters(), several.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_networks_that_keep_what_they_compute_run_all_data_in_one_batch(monkeypatch):
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(4, 8), nn.Linear(8, 4), {}

        def forward(self, x):
            hidden = torch.relu(self.a(x))
            if not torch.compiler.is_compiling():
                self.kept = {"x": x}
            return self.b(hidden) + (x if torch.compiler.is_compiling() else self.kept["x"])

    torch.manual_seed(0)
    one, ran = task(Keeping(), trace(Keeping(), torch.ones(2, 4)), {"a.weight:0": range(4)}, rows()), []
    monkeypatch.setattr(refit, "merge_batches", lambda parts, most: ran.append(most) or merge_batches(parts, most))
    refit.refit(one, refit.Settings(target="own"))
    refit.refit(perceptron(), refit.Settings(target="own"))
    assert ran == [1, refit_work.MAX_BATCHES]
    named = [Batch((), {"x": batch.args[0]}, batch.labels) for batch in rows(seed=2)]
    mixed = replace(one, sources=[Source("v", [*rows(), *named])])
    with pytest.raises(ValueError, match="in one batch, and 2 of these cannot be joined; give batches with the same"):
        refit.refit(mixed, refit.Settings(target="own"))


def test_layers_that_run_on_some_data_alone_are_refused(monkeypatch):
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            hidden = torch.relu(self.a(x))
            if torch.compiler.is_compiling() or bool((x[:, 0] > 0).any()):
                return self.b(hidden) + self.c(hidden)
            return self.c(hidden)

    torch.manual_seed(0)
    model = Routed()
    axes = trace(model, torch.ones(2, 4))
    source = rows()
    for batch in source.batches[4:6]:
        batch.args[0].sub_(9)
    one = task(model, axes, {"a.weight:0": range(4)}, source)
    monkeypatch.setattr(refit, "merge_batches", lambda parts, most: merge_batches(parts, most, min_elements=1))
    with pytest.raises(ValueError, match="which layers run depends on the data; recover by distil"):
        refit.refit(one, refit.Settings(target="own"))


def test_what_refit_cannot_work_with_is_said():
    with pytest.raises(ValueError, match="windows of one length"):
        ragged = Source("r", [Batch((torch.zeros(1, n, 4),)) for n in (2, 3, 2)])
        refit.refit(replace(perceptron(), sources=[ragged]), refit.Settings())
    with pytest.raises(ValueError, match="target must be one of auto, own, dense, residual, got 'input'"):
        refit.refit(perceptron(), refit.Settings(target="input"))
    with pytest.raises(ValueError, match="at least two"):
        refit.refit(replace(perceptron(), sources=[rows(1)]), refit.Settings())


def test_fast_sums_give_the_changes_of_exact_ones() -> None:
    """Products in float32 within a chunk, of inputs of different sizes: the same change to five digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 12, generator=generator) * torch.logspace(-1, 1, 12)
    missing = x @ torch.randn(12, 5, generator=generator) + torch.randn(3000, 5, generator=generator)
    exact, fast = (Sums.over_rows(x, missing, missing, fast=fast) for fast in (False, True))
    assert fast.residual_energy == pytest.approx(exact.residual_energy, rel=1e-6) and fast.rows == exact.rows
    wanted, found = (solve_ridge(sums, 0.03) for sums in (exact, fast))
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_ridge_is_the_one_that_held_out_rows_like_best():
    torch.manual_seed(0)
    x, noise = torch.randn(30, 20), torch.randn(30, 3)
    missing = x @ torch.randn(20, 3) * 0.4 + noise
    fit, held = Sums.over_rows(x[:22], missing[:22], missing[:22]), Sums.over_rows(x[22:], missing[22:], missing[22:])
    ridges = (1e-6, 1e-2, 0.3, 100.0)
    left = {
        ridge: (missing[22:].double() - x[22:].double() @ solve_ridge(fit, ridge)).square().sum() for ridge in ridges
    }
    choice = RidgeCandidates(ridges).choose([fit, held], bias=False)
    assert choice.ridge == min(ridges, key=lambda r: left[r]) == 0.3
    assert choice.after == pytest.approx(float(left[choice.ridge] / held.target_energy))
    torch.testing.assert_close(
        choice.change, solve_ridge(Sums.over_rows(x, missing, missing), 0.3), rtol=1e-6, atol=1e-9
    )


def test_ridge_and_shrinkage_are_those_that_left_out_sources_like_best():
    torch.manual_seed(0)
    shared = torch.randn(20, 3)
    x = [torch.cat([torch.randn(n, 20), torch.ones(n, 1)], 1) for n in (30, 40, 50)]
    own = [
        torch.cat([shared + torch.randn(20, 3) * 2, torch.ones(1, 3)]) for _ in x
    ]  # each source has a part of its own
    missing = [one @ weight for one, weight in zip(x, own, strict=True)]
    ridges, shrinkages = (1e-6, 0.1, 1.0, 10.0), (0.25, 0.5, 1.0)

    def change(at, ridge, shrinkage):
        sums = Sums.over_rows(torch.cat([x[i] for i in at]), *(torch.cat([missing[i] for i in at]),) * 2)
        alone = torch.zeros(21, 3).double()
        alone[-1] = torch.cat([missing[i] for i in at]).double().mean(0)
        return alone + shrinkage * (solve_ridge(sums, ridge) - alone)

    def left_out(ridge, shrinkage):
        solutions = [change([i for i in range(3) if i != m], ridge, shrinkage) for m in range(3)]
        lost = [(r.double() - one.double() @ d).square().sum() for r, one, d in zip(missing, x, solutions, strict=True)]
        return float(sum(one / r.double().square().sum() for one, r in zip(lost, missing, strict=True)) / 3)

    errors = {(ridge, shrinkage): left_out(ridge, shrinkage) for ridge in ridges for shrinkage in shrinkages}
    best = min(errors, key=lambda key: errors[key])
    sums = [Sums.over_rows(*pair, pair[1]) for pair in zip(x, missing, strict=True)]
    choice = RidgeCandidates(ridges, shrinkages, left_out=True).choose(sums, bias=True)
    assert (choice.ridge, choice.shrinkage) == best and best[1] < 1
    assert choice.before == pytest.approx(1) and choice.after == pytest.approx(errors[best])
    torch.testing.assert_close(choice.change, change([0, 1, 2], *best), rtol=1e-6, atol=1e-9)
    assert choice.seen < choice.after
    nothing = [Sums.over_rows(one, torch.randn(len(one), 3), torch.ones(len(one), 3)) for one in x]
    assert RidgeCandidates((1e-6,), left_out=True).choose(nothing, bias=True).change is None


def test_a_network_that_was_trained_since_is_refitted_to_the_dense_one():
    one = language()
    distil.distil(one, distil.Settings(lr=3e-2))
    with pytest.raises(ValueError, match=r"differs from the dense one .* trained since.*target=dense"):
        refit.refit(one, refit.Settings(target="own"))
    before = error(one, 9)
    found = refit.refit(one, refit.Settings())
    assert found["target"] == "dense" and "trained since" in found["note"] and error(one, 9) < before


# --- LoRA, distillation ---------------------------------------------------------------------------------------------


def test_merged_adapters_answer_as_adapters_did():
    pytest.importorskip("peft")
    one = language()
    names = [name for name, _ in one.model.named_parameters()]
    paths = lora.find_linear_layers(one.model, one.axes)
    assert len(paths) == 14 and "head" not in paths
    before = answers(one.model, one.sources[0])
    adapters = lora.add_adapters(one.model, paths, lora.Settings(rank=3))
    torch.testing.assert_close(answers(one.model, one.sources[0]), before)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.copy_(torch.randn_like(adapter) * 0.1)
    adapted = answers(one.model, one.sources[0])
    lora.remove_adapters(one.model, merge=True)
    torch.testing.assert_close(answers(one.model, one.sources[0]), adapted, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(adapted, before, atol=0.1)
    assert [name for name, _ in one.model.named_parameters()] == names and "peft_config" not in vars(one.model)


def test_lora_learns_and_leaves_a_plain_network():
    pytest.importorskip("peft")
    one = language()
    flags = {name: p.requires_grad for name, p in one.model.named_parameters()}
    kinds = [type(module) for module in one.model.modules()]
    found = lora.lora(one, lora.Settings(rank=2, passes=6, lr=1e-2))
    first, last = found["history"][0]["held_out"], min(row["held_out"] for row in found["history"])
    assert last < first - 0.1
    assert {name: p.requires_grad for name, p in one.model.named_parameters()} == flags
    assert [type(module) for module in one.model.modules()] == kinds
    held = Source("h", one.split_sources(0.125)[1])
    assert perplexity(one.model, held).mean == pytest.approx(last, rel=1e-3)


def test_distillation_lowers_the_divergence_on_other_text():
    one, other = language(), texts("t", seed=9)

    def away():
        return float(distil.compute_divergence(answers(one.model, other), answers(one.dense, other)))

    before = away()
    found = distil.distil(one, distil.Settings(passes=8, lr=3e-3))
    assert away() < 0.8 * before
    assert found["trained"] == sum(p.numel() for p in one.model.parameters())


@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_distillation_follows_the_dense_network_in_outputs_that_are_no_classes(kind):
    one = perceptron()
    one = replace(one, objective=OBJECTIVES[kind])
    before = error(one, 9)
    distil.distil(one, distil.Settings(lr=3e-3, mix=0.0, passes=20))
    assert error(one, 9) < 0.5 * before


def test_half_precision_comes_back_as_it_was():
    one = language()
    one.model.to(torch.bfloat16)
    one.model.register_buffer("shift", torch.ones(3, dtype=torch.bfloat16))
    distil.distil(one, distil.Settings())
    assert {p.dtype for p in one.model.parameters()} == {torch.bfloat16} == {one.model.shift.dtype}


def test_the_best_of_the_checked_networks_is_kept_and_the_first_is_the_cut_one():
    one = language()
    before = answers(one.model, one.sources[0])
    found = distil.distil(one, distil.Settings(lr=0.3, mix=0.0))  # a rate that ruins it
    assert found["best"] == 0 and found["history"][-1]["held_out"] > found["history"][0]["held_out"]
    assert torch.equal(answers(one.model, one.sources[0]), before)


# --- stopped = not stopped ------------------------------------------------------------------------------------------


class KilledError(Exception):
    """Ends a recovery as a kill does: nothing is written any more."""


@pytest.mark.parametrize("name", sorted(RECOVERIES))
@pytest.mark.parametrize("how", [KilledError, KeyboardInterrupt])
def test_a_recovery_taken_up_again_is_one_that_was_never_stopped(name, how, monkeypatch, tmp_path):
    if name == "lora":
        pytest.importorskip("peft")
    if how is KilledError:
        monkeypatch.setattr(recovery, "SECONDS", -1.0)  # a checkpoint after every step
    work = find_method(MethodKind.RECOVERY, name).create(name, {})
    steps: list[str] = []
    whole = language(progress=lambda done, total, what: steps.append(what))
    found = work(whole)
    wanted = whole.model.state_dict()
    for stop in sorted({1, 2, len(steps) // 2, len(steps)}):
        seen: list[str] = []

        def stopping(done, total, what, seen=seen, stop=stop):
            seen.append(what)
            if len(seen) == stop:
                raise how

        place = tmp_path / f"{stop}.safetensors"
        with pytest.raises(how):
            work(language(checkpoint=place, progress=stopping))
        again: list[str] = []
        resumed = language(checkpoint=place, progress=lambda done, total, what, again=again: again.append(what))
        assert work(resumed) == found
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in resumed.model.state_dict().items())
        if stop > 1:
            assert len(again) < len(steps)
    other = language(seed=1)
    work(other)
    same = all(torch.equal(tensor, wanted[key]) for key, tensor in other.model.state_dict().items())
    assert same is (name == "refit")  # nothing is drawn there


@pytest.fixture
def interrupts():
    """SIGINT as a terminal sends it, or ignored as of a job behind; whatever the tests run as."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_key_that_is_pressed_waits_for_the_end_of_a_step(interrupts):
    interrupts(signal.default_int_handler)
    done = []
    for step in range(2):
        with pytest.raises(KeyboardInterrupt), hold_interrupts():
            signal.raise_signal(signal.SIGINT)
            done.append(step)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        done.append("outside a step")
    assert done == [0, 1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_that_ignores_keys_goes_on_ignoring_them(interrupts):
    interrupts(signal.SIG_IGN)
    with hold_interrupts():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_settings_are_checked_and_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"no recovery 'refti'; did you mean 'refit'\? the recoveries are refit, lora"):
        find_method(MethodKind.RECOVERY, "refti")
    with pytest.raises(ValueError, match="lora has no setting 'ranks'"):
        find_method(MethodKind.RECOVERY, "lora").create("lora", {"ranks": 3})
    with pytest.raises(ValueError, match="mix must be 0 to 1"):
        distil.distil(language(), distil.Settings(mix=2.0))
    for name, value in (("windows", 0), ("held_out", 1.0), ("held_out", -1.0)):
        with pytest.raises(ValueError, match=name):
            distil.distil(language(), distil.Settings(**{name: value}))
    with pytest.raises(ValueError, match="smaller learning rate"):
        distil.distil(language(), distil.Settings(lr=1e30, windows=1))
