"""Users' data as batches: each kind that is read, and the messages for those that are not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from regrow.api.inputs import choose_reading
from regrow.core.axes import Example
from regrow.core.scores import Need
from regrow.core.sources import Batch, Source
from regrow.data.batch_forms import ReadOptions, to_batch
from regrow.data.batches import to_source, to_sources
from regrow.data.halves import SourceError
from regrow.scoring.collect import collect
from regrow.tracing import trace
from regrow.training.tune import finetune

INPUTS, LABELS = torch.arange(30.0).reshape(10, 3), torch.arange(10) % 2


def joined(source: Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    """All inputs and labels of a source."""
    batches = list(source)
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return torch.cat([batch.args[0] for batch in batches]), torch.cat(labels) if labels else None


@pytest.mark.parametrize(
    "data",
    [
        (INPUTS, LABELS),
        TensorDataset(INPUTS, LABELS),
        DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4),
        [(INPUTS[:4], LABELS[:4]), [INPUTS[4:], LABELS[4:]]],
        ((INPUTS[i : i + 5], LABELS[i : i + 5]) for i in (0, 5)),
        [Batch((INPUTS,), labels=LABELS)],
    ],
    ids=["tensors", "data set", "loader", "list of batches", "generator", "Batch"],
)
def test_every_kind_of_labelled_data_gives_the_same_examples(data):
    source = to_source(data, reading=ReadOptions(batch_size=4))
    for _ in range(2):  # each time the same
        inputs, labels = joined(source)
        assert torch.equal(inputs, INPUTS)
        assert torch.equal(labels, LABELS)
    assert torch.equal(source.batches[-1].args[0], list(source)[-1].args[0])


def test_a_loader_is_read_batch_by_batch():
    read = []

    class Rows(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    source = to_source(DataLoader(Rows(INPUTS, LABELS), batch_size=2))
    read.clear()
    next(iter(source))
    assert len(read) == 2
    assert [len(batch.labels) for batch in source.batches[1::2]] == [2, 2]


def test_training_and_measuring_read_a_loader_once_per_pass():
    reads = []

    class Rows(TensorDataset):
        def __getitem__(self, index):
            reads.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Rows(INPUTS, LABELS), batch_size=2)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    opening = 2 * 2  # one batch to see that there is one, one to choose the loss
    source = to_source(loader)
    reads.clear()
    finetune(model, [source], epochs=3)
    assert len(reads) <= 3 * 10 + opening
    axes = trace(model, INPUTS[:1])
    reads.clear()
    collect(model, axes, [source], {Need.ACTIVATIONS})
    assert len(reads) <= 10 + opening


def test_names_and_nothing():
    named = to_sources({"wiki": INPUTS, "code": (INPUTS, LABELS)})
    assert [source.name for source in named] == ["wiki", "code"]
    assert to_sources(None) == []
    assert to_sources({"input_ids": torch.ones(1, 4).long()})[0].batches[0].kwargs["input_ids"].shape == (1, 4)


def test_labels_of_tokens_are_shifted_for_causal_models_only():
    rows = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert to_batch(dict(rows), reading=ReadOptions(shift=True)).labels.tolist() == [[2, -100, -100]]
    assert to_batch(rows | {"labels": rows["input_ids"]}, reading=ReadOptions(shift=True)).labels.tolist() == [
        [2, 3, -100]
    ]
    assert to_batch(rows | {"labels": rows["input_ids"]}).labels.tolist() == [[1, 2, 3]]
    assert to_batch(rows).labels is None


def test_detection_targets_are_an_input():
    images, targets = [torch.ones(3, 8, 8)], [{"boxes": torch.ones(1, 4), "labels": torch.ones(1).long()}]
    batch = to_batch((images, targets))
    assert batch.args == (images, targets)
    assert batch.labels is None


def test_a_folder_of_classes_is_images(tmp_path):
    for kind in ("ant", "cat"):
        (tmp_path / kind).mkdir()
        for i in range(2):
            Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(tmp_path / kind / f"{i}.png")
    batch = to_source(str(tmp_path), reading=ReadOptions(batch_size=4, size=16)).batches[0]
    assert sorted(batch.labels.tolist()) == [0, 0, 1, 1]
    assert batch.args[0].min() < -1
    plain = ReadOptions(batch_size=4, size=16, normalised=False)
    values = to_source(tmp_path, reading=plain).batches[0].args[0]
    assert values.min() == 0
    assert float(values.max()) == pytest.approx(40 / 255)
    grey = choose_reading(nn.Sequential(nn.Conv2d(1, 2, 3)), None, 4, Example((torch.ones(1, 1, 16, 16),)))
    assert to_source(tmp_path, reading=grey).batches[0].args[0].shape == (4, 1, 16, 16)
    assert choose_reading(nn.Sequential(nn.Conv2d(1, 2, 3)), None, 4).channels == 1


class Columns:
    """A data set with columns, as Hugging Face's: rows by index, columns by slice."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        return {name: values[key] for name, values in self.columns.items()}


def test_columns_of_tokens_and_of_images():
    data = Columns(input_ids=[[1, 2], [3, 4], [5, 6]], label=[0, 1, 0], title=["a", "b", "c"])
    first = to_source(data, reading=ReadOptions(batch_size=2)).batches[0]
    assert first.kwargs["input_ids"].tolist() == [[1, 2], [3, 4]]
    assert first.labels.tolist() == [0, 1]
    assert "title" not in first.kwargs
    pictures = [Image.new("L", (8, 8), color=i) for i in (0, 200)]
    images = to_source(Columns(image=pictures, label=[1, 0]), reading=ReadOptions(size=8)).batches[0]
    assert images.args[0].shape == (2, 3, 8, 8)
    assert images.labels.tolist() == [1, 0]
    plain = ReadOptions(size=8, normalised=False)
    images = to_source(Columns(image=pictures, label=[1, 0]), reading=plain).batches[0].args[0]
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [0, 200]
    grey = ReadOptions(size=8, channels=1)
    assert to_source(Columns(image=pictures, label=[1, 0]), reading=grey).batches[0].args[0].shape == (2, 1, 8, 8)


class Words:
    """A tokenizer of characters."""

    bos_token_id = None

    def __call__(self, text, **kwargs):
        return {"input_ids": [ord(c) for c in text]}


def test_strings_and_chats_are_text(tmp_path):
    reading = ReadOptions(tokenizer=Words(), seq_len=4)
    assert to_source(["abcdefgh"], reading=reading).batches[0].args[0].tolist() == [
        [97, 98, 99, 100],
        [101, 102, 103, 104],
    ]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert bytes(to_source(file, reading=reading).batches[0].args[0].flatten().tolist()) == b"user: Hi"
    rows = Columns(messages=[[{"role": "user", "content": "Hi"}]])
    assert bytes(to_source(rows, reading=reading).batches[0].args[0].flatten().tolist()) == b"user: Hi"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (3, "cannot read a int"),
        ([], "is empty"),
        ([{1, 2}], "a batch must be a tensor"),
        ((INPUTS, LABELS[:3]), "the same length, got 10, 3"),
        (["some text"], "no tokenizer"),
        ("nowhere", "'nowhere' is no folder of class folders"),
        (
            "A text,\nas it is",
            "a string names a file or a text domain, and this one has 16 characters; give texts in a list",
        ),
        (Columns(title=["a"]), "hold no inputs that are known"),
        ([INPUTS, LABELS], "come as a tuple"),
    ],
    ids=["number", "nothing", "set", "lengths", "text", "path", "long path", "columns", "list"],
)
def test_what_cannot_be_read_is_named(data, words):
    with pytest.raises(SourceError, match=words):
        list(to_source(data))


def test_arrays_lists_of_labels_entries_and_one_dict_are_inputs_with_labels():
    for data in (
        (INPUTS.numpy(), LABELS.numpy()),
        [(INPUTS[i], int(LABELS[i])) for i in range(len(INPUTS))],
        {"x": INPUTS, "label": LABELS},
    ):
        (source,) = to_sources(data)
        assert torch.equal(torch.cat([batch.labels for batch in source]), LABELS)
