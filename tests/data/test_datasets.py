"""Users' data sets as tasks: read when they are needed, in the order of examples in memory."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from regrow.core.tasks import Examples, ExamplesView, first_examples
from regrow.data import datasets
from regrow.data.batch_forms import ReadOptions
from regrow.data.datasets import LoadedExamples, StreamedExamples, fix_order, to_examples, to_tasks
from regrow.data.halves import SourceError
from regrow.data.streams import permuted_tasks

INPUTS, LABELS = torch.arange(33.0).reshape(11, 3), torch.arange(11) % 2


class BalancedBatches(BatchSampler):
    """A batch sampler of a class of its own."""


class Reads(Dataset):
    """Counts the entries that are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, index):
        self.read.append(index)
        return INPUTS[index], int(LABELS[index])


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize("size", [1, 5, 20])
@pytest.mark.parametrize(
    "data",
    [
        Reads(),
        TensorDataset(INPUTS, LABELS),
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=2),
        DataLoader(TensorDataset(INPUTS, LABELS), shuffle=True),
    ],
)
def test_streamed_batches_are_those_in_memory(data, size, seed):
    there = to_examples(data)
    assert isinstance(there, StreamedExamples)
    memory = Examples(INPUTS, LABELS)
    for one, other in zip(there.batches(size, seed), memory.batches(size, seed), strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.labels, other.labels)
    some, more = torch.tensor([7, 2, 4]), torch.tensor([2, 0])
    assert torch.equal(there.take(some).inputs, INPUTS[some])
    assert torch.equal(there.subset(some).take(more).labels, LABELS[some][more])


def test_only_what_is_needed_is_read():
    data = Reads()
    there = to_examples(data)
    next(there.batches(4, seed=0))
    assert len(data.read) == 4
    assert len(there) == 11
    assert there.labels_of() is None


def test_labels_of_a_subset_are_known_without_reading():
    data = Reads()
    data.targets = LABELS.tolist()
    assert torch.equal(to_examples(Subset(data, [3, 5, 8])).labels_of(), LABELS[[3, 5, 8]])
    assert not data.read


def test_batches_do_not_change_the_global_generator():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    list(to_examples(Reads()).batches(4, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_workers_read_the_same():
    loader = DataLoader(TensorDataset(INPUTS, LABELS), num_workers=1)
    assert torch.equal(next(to_examples(loader).batches(11)).inputs, INPUTS)


def test_an_iterable_comes_as_it_comes():
    class Rows(IterableDataset):
        def __iter__(self):
            return iter([(INPUTS[i], LABELS[i]) for i in range(11)])

    there = to_examples(DataLoader(Rows(), batch_size=4))
    assert isinstance(there, LoadedExamples)
    assert [len(batch) for batch in there.batches(100, seed=1)] == [4, 4, 3]
    assert len(there) == 11
    assert torch.equal(there.take(torch.tensor([9, 1])).inputs, INPUTS[[9, 1]])


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 4, "sampler": RandomSampler(INPUTS, replacement=True)},
        {"batch_size": 4, "sampler": RandomSampler(INPUTS, num_samples=6)},
        {"batch_size": 4, "sampler": SequentialSampler(INPUTS[:5])},
        {"batch_size": 4, "shuffle": True, "drop_last": True},
        {"batch_sampler": [[0, 3, 5], [1, 2]]},
        {"batch_sampler": BalancedBatches(SequentialSampler(INPUTS), 3, False)},
    ],
)
def test_a_loader_that_samples_in_its_own_way_comes_as_it_comes(options):
    loader = DataLoader(TensorDataset(INPUTS, LABELS), **options)
    there = to_examples(loader)
    assert isinstance(there, LoadedExamples)
    assert [len(batch) for batch in there.batches(2)] == [len(labels) for _, labels in loader]


def test_parts_of_a_shuffled_loader_are_of_one_pass():
    loader = DataLoader(TensorDataset(INPUTS, LABELS), shuffle=True, drop_last=True)
    there = fix_order(ExamplesView(to_examples(loader), most=4))
    one, other = (torch.cat([batch.inputs for batch in there.batches(9)]) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(one.sort(0)[0], INPUTS)


def test_inputs_by_name():
    rows = [{"a": INPUTS[i], "b": -INPUTS[i], "labels": LABELS[i]} for i in range(11)]

    class Named(Dataset):
        def __len__(self):
            return 11

        def __getitem__(self, index):
            return rows[index]

    batch = next(to_examples(Named()).batches(3))
    assert torch.equal(batch.inputs["b"], -INPUTS[:3])
    assert torch.equal(batch.labels, LABELS[:3])


def test_every_shape_of_a_sequence_of_tasks(monkeypatch):
    monkeypatch.setattr(datasets, "HELD_OUT_FRACTION", 2 / 11)
    rows = [(INPUTS[i], int(LABELS[i]), 0) for i in range(11)]
    data = (INPUTS, LABELS)
    for tasks in (
        [(rows[2:], rows[:2])] * 2,
        [((INPUTS[2:], LABELS[2:]), (INPUTS[:2], LABELS[:2]))] * 2,
        (((INPUTS[2:], LABELS[2:]), (INPUTS[:2], LABELS[:2])) for _ in range(2)),
        [data, data],
    ):
        found = to_tasks(tasks)
        assert [(task.name, len(task.train), len(task.test), task.classes) for task in found] == [
            ("task-1", 9, 2, (0, 1)),
            ("task-2", 9, 2, (0, 1)),
        ]


def test_held_out_examples_are_not_learned(monkeypatch):
    monkeypatch.setattr(datasets, "HELD_OUT_FRACTION", 0.3)
    rows = [(INPUTS[i], int(LABELS[i])) for i in range(11)]
    for data in (
        (INPUTS, LABELS),
        (INPUTS.numpy(), LABELS.numpy()),
        rows,
        TensorDataset(INPUTS, LABELS),
        DataLoader(TensorDataset(INPUTS, LABELS), shuffle=True, drop_last=True),
    ):
        (task,) = to_tasks([data])
        learned, tested = (set(first_examples(part, 11).inputs[:, 0].tolist()) for part in (task.train, task.test))
        assert not learned & tested
        assert len(learned | tested) == 11
    (task,) = to_tasks([rows[:2]])
    assert (len(task.train), len(task.test)) == (1, 1)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_pictures_as_torchvision_gives_them(mode, channels):
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    drawn = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
    rows = [(image.fromarray(one).convert(mode), i % 3) for i, one in enumerate(drawn)]
    (task,) = to_tasks([(rows, rows)])
    first = task.train.take(torch.tensor([2])).inputs[0]
    assert first.shape == (channels, 5, 4)
    raw = torch.tensor(np.array(rows[2][0])).reshape(5, 4, -1)
    assert torch.equal((first[-1] * 255).round(), raw[..., -1].float())
    assert permuted_tasks(task, 2)[1].train.take(torch.tensor([0])).inputs.shape == (1, channels, 5, 4)
    rows[1] = (image.new(mode, (9, 9)), 0)
    with pytest.raises(SourceError, match="to be equal size"):
        to_tasks([(rows, rows)])


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "no task to learn"),
        ([3], "cannot read a int"),
        ((INPUTS, LABELS), "got one tuple; give"),
        ((INPUTS.numpy(), LABELS.numpy()), "got one tuple; give"),
        ([INPUTS.numpy()], "batch 0 has none"),
        ([[INPUTS, LABELS]], "task-1: a list of two may be"),
        ([[INPUTS.numpy(), LABELS.tolist()]], "give a tuple \\(inputs, labels\\) or"),
        ([[(INPUTS, LABELS)] * 2], "or a DataLoader"),
        (TensorDataset(INPUTS, LABELS), "got one TensorDataset; give"),
        (DataLoader(TensorDataset(INPUTS, LABELS)), "got one DataLoader; give"),
        ("pictures/", "got one str; give"),
        ((TensorDataset(INPUTS, LABELS),) * 2, "got one tuple; give"),
        ({"train": INPUTS, "test": INPUTS}, "give a list of tasks"),
    ],
)
def test_what_is_no_task_is_named(tasks, words):
    with pytest.raises(SourceError, match=words):
        to_tasks(tasks)


def test_a_dict_names_the_tasks():
    data = (INPUTS, LABELS)
    assert [task.name for task in to_tasks({"one": (data, data), "two": (data, data)})] == ["one", "two"]


def test_tokens_of_a_data_set_are_labelled_by_the_tokens_that_follow():
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(6)]
    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    whole = tuple(torch.stack(part) for part in zip(*pairs, strict=True))
    for data in (rows, DataLoader(rows, batch_size=2), DataLoader(pairs, batch_size=2), whole, [whole]):
        examples = to_examples(data, ReadOptions(shift=True)).take(torch.tensor([1]))
        assert examples.labels.tolist() == [[2, 3, 4, -100]]
    following = whole[0], whole[0].roll(-1, 1)  # already those of the next tokens
    assert to_examples(following, ReadOptions(shift=True)).labels.tolist() == following[1].tolist()


def test_labels_that_a_data_set_changes_are_read_from_its_entries():
    class Parity(Dataset):
        targets, target_transform = [*range(10)], staticmethod(lambda label: label % 2)

        def __len__(self):
            return 10

        def __getitem__(self, index):
            return torch.ones(3) * index, self.target_transform(self.targets[index])

    for data in (Parity(), Subset(Parity(), [0, 3, 4])):
        assert to_examples(data).labels_of() is None
    (task,) = to_tasks([(Parity(), Parity())])
    assert task.classes == (0, 1)
