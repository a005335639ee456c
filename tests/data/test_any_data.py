"""Any iterable of data gives what a list of its batches gives, or is refused in one line, by every function."""

import copy
import signal
import traceback
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regrow
from data_forms import INPUTS, KINDS, LABELS, REFUSED, Again, Once, X, Y, batches
from regrow.core.errors import InputError
from regrow.core.sources import Batch
from regrow.data import batch_streams
from regrow.data.batch_forms import ReadOptions
from regrow.data.batches import to_source
from regrow.data.halves import SourceError

SECONDS = 10
"""How long a call may take before it counts as one that hangs."""
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
AXES = regrow.trace(NET, X[:2])
SMALL, PLAN = regrow.prune(copy.deepcopy(NET), method="magnitude", keep=0.5, axes=AXES)


def weights(model):
    return [parameter.detach() for parameter in model.parameters()]


def net():
    return copy.deepcopy(NET)


def evaluate(data):
    (result,) = regrow.evaluate(NET, data, batch_size=8).values()
    return [torch.tensor([result.loss, result.score, result.count])]


def recover(data):
    small = copy.deepcopy(SMALL)
    regrow.recover(small, NET, PLAN, data, batch_size=8, axes=AXES)
    return weights(small)


CALLS = {
    "prune": lambda data: weights(regrow.prune(net(), data, method="llm_pruner", keep=0.5, batch_size=8, axes=AXES)[0]),
    "evaluate": evaluate,
    "finetune": lambda data: weights(regrow.finetune(net(), data, epochs=2, lr=0.1, batch_size=8)),
    "grow": lambda data: weights(regrow.grow(net(), mlp="+25%", data=data, steps=4, batch_size=8, axes=AXES)[0]),
    "recover": recover,
    "learn": lambda data: weights(
        regrow.learn(net(), [data], method="naive", epochs=1, batch_size=8, lr=0.1, axes=AXES).model
    ),
    "search": lambda data: weights(regrow.search(net(), data, smaller="30%", epochs=3, batch_size=8, axes=AXES).model),
}


def equal(first, second):
    return all(x.shape == y.shape and torch.allclose(x, y, atol=1e-6) for x, y in zip(first, second, strict=True))


def attempt(call, data):
    """The result of a call, or its one-line refusal; anything else is a fault of its own name."""
    torch.manual_seed(0)
    try:
        return call(data())
    except ValueError as error:
        ours = type(error).__module__.startswith("regrow.")
        raised = traceback.extract_tb(error.__traceback__)[-1].filename
        ours = ours or (type(error) is ValueError and "regrow" in raised)
        return str(error) if ours and "\n" not in str(error) else f"RAW {error!r:.100}"
    except TimeoutError:
        return "HANG"
    except Exception as error:
        return f"RAW {error!r:.100}"


def fault(command, name, same, results, got):
    """What is wrong with a result; empty if nothing is."""
    if not isinstance(got, str):
        unread = name in LABELS and command == "recover"  # refit compares outputs, and reads no labels
        known = results(batches if unread else same)
        return "" if any(equal(got, result) for result in known) else "SILENT"
    if got.startswith(("RAW", "HANG")):
        return got
    return "" if same is REFUSED else f"refused: {got}"


@pytest.fixture
def stopped():
    """Stop calls that hang."""

    def stop(*given):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("command", CALLS)
def test_every_form_of_data_gives_what_a_list_gives_or_is_refused(command, monkeypatch):
    monkeypatch.setattr(batch_streams, "MAX_BATCHES", 200)
    call, references = CALLS[command], {}

    def results(same):
        """Of the list of batches, which come in their order, and of tensors, which regrow shuffles."""
        if same is REFUSED:
            return []
        if same not in references:
            references[same] = [call(same()), call(tuple(map(torch.cat, zip(*same(), strict=True))))]
        return references[same]

    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for forms in [KINDS] if command == "search" else (KINDS, LABELS, INPUTS):  # it reads as learn does
            for name, (make, same) in forms.items():
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                got = attempt(call, make)
                signal.setitimer(signal.ITIMER_REAL, 0)
                torch.manual_seed(0)
                if problem := fault(command, name, same, results, got):
                    faults.append(f"{name}: {problem}")
    assert not faults, "\n".join(faults)


def test_a_reader_that_is_read_once_is_counted_in_whole():
    assert regrow.evaluate(NET, Once())["data"].count == 32


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty batch", "batch 2 is empty: its first input is float32 \\[0, 8\\]; leave such batches out"),
        ("loader fails", "batch 2 cannot be read: OSError: the disk; mend the loader"),
        ("data set fails", "batch 2 cannot be read: KeyError: 'column'"),
        ("NaN", "batch 2: an input holds NaN"),
        ("infinity", "batch 2: an input holds infinity"),
        ("label 4", "batch 2: labels .* do not fit the loss: IndexError: Target 4 is out of bounds"),
        ("too few", "batch 2: labels \\(int64 \\[5\\]\\) do not fit the loss"),
        ("none in one batch", "batch 2 has no labels, and the first batch labels of whole numbers"),
        ("wrong key in one batch", "batch 2: the network does not take its inputs \\(wrong=float32 \\[8, 8\\]\\)"),
        (
            "triple in one batch",
            "batch 2: the network does not take its inputs \\(float32 \\[8, 8\\], int64 \\[8\\]\\)",
        ),
        ("widths", "batch 2: the network does not take its inputs \\(float32 \\[8, 7\\]\\)"),
        ("values after 0 and 1", "batch 2: labels of the loss multi-label are from 0 to 1"),
        ("endless", "does not end within 10,000 batches; give a part of it"),
        ("shrinking", "had 4 batches when it was first read, and has"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_a_refusal_names_the_batch(command, name, words):
    with pytest.raises((InputError, SourceError), match=words):
        CALLS[command]((KINDS | LABELS | INPUTS)[name][0]())


@pytest.mark.parametrize("name", ["wrong key", "triples", "uint8"])
@pytest.mark.parametrize("command", ["prune", "grow", "recover", "learn"])
def test_a_network_that_is_traced_on_the_data_names_the_batch(command, name):
    data = INPUTS[name][0]()
    calls = {
        "prune": lambda: regrow.prune(net(), data, keep=0.5),
        "grow": lambda: regrow.grow(net(), mlp="+25%", data=data, steps=1),
        "recover": lambda: regrow.recover(copy.deepcopy(SMALL), NET, PLAN, data),
        "learn": lambda: regrow.learn(net(), [data], epochs=1),
    }
    with pytest.raises(ValueError, match=r"(source '(data|task-1)', (batch 0|first examples)|the example): ") as caught:
        calls[command]()
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_label_counts_nothing():
    ignored = torch.full((8,), -100)
    parts = [*batches()[:2], (X[16:24], ignored), *batches()[3:]]
    kept = [*batches()[:2], *batches()[3:]]
    assert regrow.evaluate(NET, parts) == regrow.evaluate(NET, kept)
    with pytest.raises(ValueError, match="source 'data', batch 2"):
        regrow.finetune(net(), parts)


def test_what_is_read_once_and_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(batch_streams, "available_memory", lambda: 1)
    with pytest.raises(SourceError, match="read only once, and its 4 batches do not fit into half of the free memory"):
        regrow.evaluate(NET, Once())
    assert regrow.evaluate(NET, Again())["data"].count == 32


def test_counting_leaves_the_order_of_a_loader_that_shuffles_as_it_was():
    class Shuffled(Again):
        def __iter__(self):
            return (self.items[i] for i in torch.randperm(4))

    torch.manual_seed(3)
    wanted = [pair[0] for pair in Shuffled()]
    torch.manual_seed(3)
    source = to_source(Shuffled())
    assert all(torch.equal(batch.args[0], inputs) for batch, inputs in zip(source, wanted, strict=True))


def test_a_loader_that_torch_counts_is_not_read_for_it():
    read = []

    class Rows(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    assert len(to_source(DataLoader(Rows(X, Y), batch_size=8, shuffle=True))) == 4
    assert len(read) <= 8


def test_endless_tasks_are_refused():
    with pytest.raises(SourceError, match="the tasks do not end within 10,000"):
        regrow.learn(net(), iter(lambda: (X, Y), None), method="naive")


@pytest.mark.parametrize("change", [torch.Tensor.int, torch.Tensor.numpy, torch.Tensor.tolist])
def test_tokens_in_any_form_are_labelled_by_the_tokens_that_follow(change):
    ids, mask = torch.arange(24).reshape(6, 4), torch.ones(6, 4).long().index_fill(1, torch.tensor(3), 0)
    reading = ReadOptions(2, shift=True)
    pairs = zip(ids.split(2), mask.split(2), strict=True)
    plain = [{"input_ids": tokens, "attention_mask": seen} for tokens, seen in pairs]
    changed = [{key: change(value) for key, value in batch.items()} for batch in plain]
    wanted = to_source(plain, reading=reading)
    assert wanted.batches[0].labels.tolist() == [[1, 2, -100, -100], [5, 6, -100, -100]]
    for data in (changed, Once(changed)):
        for batch, other in zip(to_source(data, reading=reading), wanted, strict=True):
            assert torch.equal(batch.labels, other.labels)
            assert batch.kwargs["input_ids"].tolist() == other.kwargs["input_ids"].tolist()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([[1, 2], [3]], "batch 1: lists of numbers are no tensor: .*; pad them to one length"),
        (torch.arange(4), r"batch 1: input_ids have shape \[4\]; give \[sequences, tokens\]"),
    ],
)
def test_tokens_that_are_no_batch_are_refused(ids, words):
    with pytest.raises(SourceError, match=words):
        to_source([{"input_ids": torch.ones(2, 2).long()}, {"input_ids": ids}], reading=ReadOptions(shift=True))


def test_infinity_hides_positions_in_a_mask():
    mask = torch.zeros(2, 2).index_fill(0, torch.tensor(1), -torch.inf)
    (batch,) = to_source([Batch((X[:2],), {"attention_mask": mask})])
    assert torch.equal(batch.kwargs["attention_mask"], mask)
