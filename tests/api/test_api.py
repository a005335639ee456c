"""The Python interface: networks and data as users have them, for each kind of labels."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from regrow.api.call import Call
from regrow.core.errors import InputError
from regrow.nets.vision import small
from regrow.store import StoreError
from regrow.tracing import TraceError


def net(outputs: int) -> nn.Sequential:
    """A small network with one hidden layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))


INPUTS = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
TARGETS = {
    "classification": torch.arange(64) % 3,
    "multi-label": (INPUTS[:, :3] > 0).float(),
    "regression": INPUTS[:, :3] * 2,
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("method", ["flap", "llm_pruner", "magnitude"])
def test_any_labels_prune_and_evaluate(kind, method):
    data = DataLoader(TensorDataset(INPUTS, TARGETS[kind]), batch_size=16)
    model, plan = regrow.prune(net(3), data, method=method, keep=0.5)
    assert model[0].out_features == 8
    assert plan.changes
    found = regrow.evaluate(model, {"train": data})["train"]
    assert (found.objective, found.count) == (kind, TARGETS[kind].numel() if kind != "classification" else 64)
    outputs, labels = model(INPUTS).detach(), TARGETS[kind]
    losses = {
        "classification": nn.functional.cross_entropy,
        "multi-label": nn.functional.binary_cross_entropy_with_logits,
        "regression": nn.functional.mse_loss,
    }
    assert found.loss == pytest.approx(float(losses[kind](outputs, labels)), rel=1e-5)


@pytest.mark.parametrize("budget", [{"smaller": "50%"}, {"smaller": 0.5}, {"target": "params=50%"}])
def test_a_share_of_all_parameters(budget):
    whole = sum(p.numel() for p in net(3).parameters())
    model, _ = regrow.prune(net(3), INPUTS, method="magnitude", settings={"compensate": False}, **budget)
    left = sum(p.numel() for p in model.parameters())
    assert whole / 2 - 10 < left <= whole / 2, "within one unit of 6 + 1 + 3 parameters"


def test_a_loss_of_ones_own_ranks_the_units():
    data = (INPUTS, TARGETS["regression"])
    kept = [
        regrow.prune(net(3), data, method="llm_pruner", keep=0.5, loss=loss)[1].changes
        for loss in (None, nn.MSELoss(), lambda output, labels: (output[:, 0] - labels[:, 0]).abs().mean())
    ]
    assert kept[0] == kept[1] != kept[2]


def test_a_network_that_returns_its_own_loss():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(3)

        def forward(self, inputs, targets=None):
            out = self.body(inputs)
            return {"loss": ((out - targets) ** 2).mean()} if targets is not None else out

    batch = {"inputs": INPUTS, "targets": TARGETS["regression"]}
    found = regrow.evaluate(Own(), [regrow.Batch((), batch)])["data"]
    assert found.objective == "own"
    assert found.loss == pytest.approx(float(((net(3)(INPUTS) - TARGETS["regression"]) ** 2).mean()), rel=1e-5)


class Detector(nn.Module):
    """Keeps its anchors in the place of a tensor of its class, for inputs of the last size, as detectors do."""

    anchors, shape = torch.empty(0), (0, 0)

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        h = self.body(x).relu()
        size = len(h), h.shape[-1]
        if self.shape != size:
            self.anchors, self.shape = torch.arange(h.shape[-1]).to(h), size
        return self.head(h) * self.anchors.view(1, 1, 1, -1)


def test_a_detector_that_keeps_anchors_is_pruned_and_loaded(tmp_path):
    images = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    model, _ = regrow.prune(Detector(), images, method="flap", keep=0.5, batch_size=4, example=images[:1])
    assert model.body.out_channels == 4
    with torch.no_grad():
        before = model(images)
        again = regrow.load(regrow.save(model, tmp_path / "small", example=images[:1]), model=Detector)
        assert torch.equal(again(images), before)


class Named(nn.Module):
    """Takes its inputs by name alone."""

    def __init__(self):
        super().__init__()
        self.body = net(3)

    def forward(self, *, values):
        return self.body(values)


def test_a_batch_with_names_is_an_example(tmp_path):
    batch = {"values": INPUTS, "labels": TARGETS["classification"]}
    assert [axis.size for axis in regrow.trace(Named(), batch).free()] == [16]
    model, _ = regrow.prune(Named(), [batch], example=batch, method="fisher", keep=0.5)
    assert regrow.evaluate(model, [batch])["data"].count == 64
    regrow.save(model, tmp_path / "saved", example=batch)
    assert (tmp_path / "saved" / "probe.st").exists()
    assert torch.equal(regrow.load(tmp_path / "saved", model=Named)(values=INPUTS), model(values=INPUTS))


def test_a_network_may_take_a_dict_itself():
    class Whole(Named):
        def forward(self, batch):
            return self.body(batch["values"])

    assert [axis.size for axis in regrow.trace(Whole(), {"values": INPUTS}).free()] == [16]


def test_a_decoder_gets_the_labels_shifted():
    class Pair(nn.Module):
        config = SimpleNamespace(is_encoder_decoder=True, pad_token_id=0, decoder_start_token_id=1)

        def __init__(self):
            super().__init__()
            self.table, self.seen = nn.Embedding(9, 4), []

        def forward(self, input_ids, decoder_input_ids):
            self.seen.append(decoder_input_ids.tolist())
            return self.table(decoder_input_ids) @ self.table.weight.T + self.table(input_ids).sum()

    model = Pair()
    found = regrow.evaluate(
        model, [{"input_ids": torch.ones(1, 2).long(), "labels": torch.tensor([[5, 6, -100, -100]])}]
    )
    assert model.seen[-1] == [[1, 5, 6, 0]]
    assert found["data"].count == 2


def test_masks_may_be_larger_than_the_logits_of_a_segmentation():
    model = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    images, masks = torch.randn(2, 3, 8, 8), torch.randint(4, (2, 8, 8))
    found = regrow.evaluate(model, (images, masks))["data"]
    logits = nn.functional.interpolate(model(images), size=(8, 8), mode="bilinear", align_corners=False)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, masks)), rel=1e-5)
    assert found.score == pytest.approx(float((logits.argmax(1) == masks).float().mean()))


def test_images_in_a_list_are_an_example_and_their_targets_are_not():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(3)

        def forward(self, images, targets=None):
            out = self.body(torch.stack([image.flatten()[:6] for image in images]))
            return {"loss": out.square().mean()} if targets is not None else out

    batch = {"images": [INPUTS[0], INPUTS[1]], "targets": [{"boxes": INPUTS[2]}] * 2}
    model, _ = regrow.prune(Sums(), [regrow.Batch((), batch)] * 2, method="magnitude", keep=0.5)
    assert model.body[0].out_features == 8
    assert regrow.evaluate(model, [batch])["data"].objective == "own"


def test_a_loss_that_needs_no_training_mode_is_measured_without_dropout():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(3)

        def forward(self, inputs, starts):
            hidden = nn.functional.dropout(inputs, 0.5, self.training)
            return {"loss": nn.functional.cross_entropy(self.body(hidden), starts)}

    batch = {"inputs": INPUTS, "starts": TARGETS["classification"]}
    first, second = (regrow.evaluate(Head(), [batch])["data"].loss for _ in range(2))
    assert first == second


def test_finetuning_mixes_sets_of_data_and_takes_an_optimizer():
    class Watched(nn.Linear):
        seen: list[float] = []  # noqa: RUF012

        def forward(self, x):
            self.seen.append(float(x[0, 0].detach()))
            return super().forward(x)

    torch.manual_seed(0)
    model, labels = Watched(6, 3), TARGETS["classification"]
    data = {name: (torch.full_like(INPUTS, value), labels) for name, value in (("a", 1.0), ("b", 2.0))}
    before = model.weight.detach().clone()
    regrow.finetune(model, data, epochs=2, batch_size=8, optimizer="adamw", lr=1e-3, weight_decay=0, decay="constant")
    for epoch in (model.seen[:16], model.seen[16:]):
        assert sorted(epoch) == [1.0] * 8 + [2.0] * 8
        assert epoch != sorted(epoch)
    assert 1e-3 < (model.weight - before).abs().max() <= 33e-3, "32 steps of Adam at most"


def test_recovery_lowers_what_was_lost():
    dense = net(3)
    small, plan = regrow.prune(copy.deepcopy(dense), INPUTS, keep=0.4, reconstruct=False)
    lost = torch.dist(small(INPUTS), dense(INPUTS))
    regrow.recover(small, dense, plan, INPUTS, by="refit", batch_size=16)
    assert torch.dist(small(INPUTS), dense(INPUTS)) < 0.9 * lost


def test_a_saved_network_is_a_model(tmp_path):
    model, _ = regrow.prune(net(3), INPUTS, keep=0.5)
    regrow.save(model, tmp_path / "saved", example=INPUTS[:2])
    loaded = regrow.load(tmp_path / "saved", model=lambda: net(3))
    assert torch.equal(loaded(INPUTS), model(INPUTS))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: regrow.prune(net(3), keep=0.5), "no input to run the network with; give example="),
        (lambda: regrow.prune(3, INPUTS, keep=0.5), "model must be a torch.nn.Module"),
        (lambda: regrow.prune(net(3), keep=0.5, example=7), "example must be a tensor"),
        (
            lambda: regrow.prune(net(3), INPUTS, keep=0.5, target="params=100"),
            "exclude each other, got keep=0.5",
        ),
        (lambda: regrow.prune(net(3), INPUTS, smaller="130%"), "smaller must be between 0 and 1, got 1.3"),
        (lambda: regrow.evaluate(net(3), None), "no input to run the network with"),
        (lambda: regrow.evaluate(net(3), INPUTS), "no labels"),
        (
            lambda: regrow.evaluate(net(2), (INPUTS, TARGETS["classification"])),
            "do not fit the loss: IndexError: Target 2 is out of bounds",
        ),
        (lambda: regrow.evaluate(net(3), (INPUTS, TARGETS["classification"].float())), "do not fit the loss"),
        (lambda: regrow.prune(INPUTS, net(3), keep=0.5), "the network comes first"),
        (lambda: regrow.prune(nn.Linear, INPUTS, keep=0.5), r"write Linear\(\)"),
        (lambda: regrow.prune(net(3), keep=0.5, example=(1, 6)), r"write torch.ones\(1, 6\)"),
        (lambda: regrow.prune(net(3).to("meta"), INPUTS, keep=0.5), "has no weights"),
        (lambda: regrow.finetune(net(3).requires_grad_(False), (INPUTS, INPUTS[:, :3])), "requires_grad"),
        (lambda: regrow.recover(net(3), net(2), regrow.Plan(), INPUTS), "dense must be the network before the cut"),
        (
            lambda: regrow.recover("run", net(3), regrow.Plan(), INPUTS),
            r"got str, .* write recover\(model, dense, plan",
        ),
        (lambda: regrow.recover(net(3), net(3), INPUTS, regrow.Plan()), r"got \w+, \w+, Tensor; write"),
    ],
)
def test_mistaken_calls_name_the_remedy(call, words):
    with pytest.raises(InputError, match=words):
        call()


@pytest.mark.parametrize("keep", [70, "70"])
def test_another_fraction_than_one_between_0_and_1_is_refused(keep):
    with pytest.raises(ValueError, match=r"keep must be .*, got '?70"):
        regrow.prune(net(3), INPUTS, keep=keep)


def test_trace_and_save_name_what_is_mistaken(tmp_path):
    for args in ((), ((1, 6),)):
        with pytest.raises(TraceError, match="does not run without a tensor among its inputs; give"):
            regrow.trace(net(3), *args)
    with pytest.raises(TraceError, match="got a str; load"):
        regrow.trace("resnet18", INPUTS)
    with pytest.raises(StoreError, match=r"got a \w+ as the model; write save\(model, folder\)"):
        regrow.save(tmp_path / "new", net(3))


def test_networks_that_regrow_builds_take_pictures_of_values_0_to_1(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    for i, name in enumerate(("ant", "cat")):
        (tmp_path / name).mkdir()
        image.new("RGB", (8, 8), (200 * i, 0, 0)).save(tmp_path / name / "0.png")
    model, origin = small("mlp:4", (3, 8, 8), 2)
    for normalised in (True, False):
        if not normalised:
            model.origin = origin
        (source,) = Call(model, tmp_path, example=torch.ones(1, 3, 8, 8)).read().sources
        assert (float(source.batches[0].args[0].min()) < 0) == normalised


def test_class_labels_of_one_output_are_refused():
    with pytest.raises(InputError, match="give labels as floats"):
        regrow.prune(net(1), (INPUTS, torch.arange(64) % 2), method="fisher", keep=0.5)


def test_lengths_that_differ_are_named_where_layers_are_not_reconstructed():
    encoder = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 3))
    batches = [(torch.randint(9, (4, n)), torch.zeros(4, n).long()) for n in (6, 6, 5)]
    with pytest.warns(UserWarning, match="layers are not reconstructed: refit needs windows of one length"):
        regrow.prune(encoder, batches, keep=0.7)


def test_a_cut_whose_layers_cannot_be_fitted_is_taken_back():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(self.first(x).relu()) - self.last(self.first(-x).tanh())

    model = Twice()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="runs once per pass"):
        regrow.prune(model, [(INPUTS[:32],), (INPUTS[32:],)], method="flap", keep=0.5, reconstruct=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
