"""Forms in which users give data: each with the list of batches that it equals, or with why it is refused.

A form is a function that makes the data, and what they equal: a function that makes a list of batches, or ``REFUSED``.
"""

import itertools
from collections import UserDict, deque, namedtuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from regrow.core.sources import Batch, Source

DRAW = torch.Generator().manual_seed(1)
X = torch.randn(32, 8, generator=DRAW).half().float()
Y = torch.randint(0, 4, (32,), generator=DRAW)
VALUES, MANY = torch.randn(32, 4, generator=DRAW), torch.arange(128).reshape(32, 4) % 3 == 0
EMPTY = X[:0], Y[:0]
REFUSED = "refused"
Pair = namedtuple("Pair", "inputs labels")


def batches(inputs=X, labels=Y):
    """Four batches of eight examples."""
    return list(zip(inputs.split(8), labels.split(8), strict=True))


class Again:
    """Starts again each time; with a length that may be wrong."""

    def __init__(self, items=None, length=None):
        self.items, self.length = batches() if items is None else items, length

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        if self.length is None:
            raise TypeError("no length")
        return self.length


class Once(Again):
    """Gives the same iterator each time, so that it can be read once."""

    def __init__(self, items=None, length=None):
        super().__init__(iter(batches() if items is None else items), length)


class OnceInside(Once):
    """Can be read once, which its iterators do not tell."""

    def __iter__(self):
        return (item for item in self.items)


class Endless(Again):
    """Never ends."""

    def __iter__(self):
        return itertools.cycle(batches())


class Resettable:
    """Is its own iterator, which starts again."""

    def __iter__(self):
        self.items = iter(batches())
        return self

    def __next__(self):
        return next(self.items)


class Shrinking:
    """Has fewer batches each time."""

    many = 5

    def __iter__(self):
        self.many -= 1
        return iter(batches()[: self.many])


class Reused:
    """Gives each batch in the same memory."""

    def __iter__(self):
        inputs, labels = torch.empty(8, 8), torch.empty(8, dtype=torch.int64)
        for given in batches():
            inputs.copy_(given[0])
            labels.copy_(given[1])
            yield inputs, labels


class Failing:
    """Fails at the third batch."""

    def __iter__(self):
        yield from batches()[:2]
        raise OSError("the disk\nis gone")


class Items:
    """Has items by number, and nothing else."""

    def __getitem__(self, index):
        return batches()[index]


class Stream(IterableDataset):
    """Single examples, or what is given, as a data set without indices."""

    def __init__(self, items=None):
        self.items = list(zip(X, Y, strict=True)) if items is None else items

    def __iter__(self):
        return iter(self.items)


class SizedStream(Stream):
    """With a length, which may be wrong."""

    def __init__(self, length):
        super().__init__()
        self.length = length

    def __len__(self):
        return self.length


class EndlessStream(Stream):
    def __iter__(self):
        return itertools.cycle(self.items)


class EndlessSampler(BatchSampler):
    def __init__(self):
        super().__init__(range(32), 8, False)

    def __iter__(self):
        return itertools.cycle([list(range(8))])


class Rows(Dataset):
    """A data set that fails at an index, says a wrong length, or has rows of different widths."""

    def __init__(self, length=32, fails=None, narrow=None):
        self.length, self.fails, self.narrow = length, fails, narrow

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index == self.fails:
            raise KeyError("column")
        return X[index, : 8 - (index == self.narrow)], Y[index]


def loader(dataset=None, **options):
    return DataLoader(TensorDataset(X, Y) if dataset is None else dataset, **({"batch_size": 8} | options))


def emptying(rows):
    """Collate rows; one batch loses all of its examples."""
    inputs, labels = torch.utils.data.default_collate(rows)
    return EMPTY if torch.equal(inputs[0], X[16]) else (inputs, labels)


def each(change):
    return lambda: [change(inputs, labels) for inputs, labels in batches()]


def third(change):
    """A change of the third batch alone, with number 2."""
    return lambda: [change(*pair) if i == 2 else pair for i, pair in enumerate(batches())]


def damaged(inputs, labels, value=torch.nan):
    return inputs.index_fill(0, torch.tensor(3), value), labels


def source(items):
    return Source("mine", items)


def records():
    return [Batch((inputs,), labels=labels) for inputs, labels in batches()]


def in_inference_mode():
    with torch.inference_mode():
        return [(inputs.clone(), labels.clone()) for inputs, labels in batches()]


def with_gradient(inputs):
    return inputs.clone().requires_grad_()


KINDS = {
    "list": (batches, batches),
    "tensors": (lambda: (X, Y), batches),
    "arrays": (lambda: (X.double().numpy(), Y.numpy()), batches),
    "tensor and numbers": (lambda: (X, Y.tolist()), REFUSED),
    "data set": (lambda: TensorDataset(X, Y), batches),
    "entries": (lambda: [(X[i], int(Y[i])) for i in range(32)], batches),
    "loader": (loader, batches),
    "loader of a stream": (lambda: loader(Stream()), batches),
    "stream of examples": (Stream, REFUSED),
    "stream of batches": (lambda: Stream(batches()), batches),
    "sized stream": (lambda: loader(SizedStream(32)), batches),
    "generator": (lambda: (pair for pair in batches()), batches),
    "map": (lambda: map(tuple, batches()), batches),
    "again": (Again, batches),
    "once": (Once, batches),
    "once, sized": (lambda: Once(length=4), batches),
    "once inside": (OnceInside, batches),
    "once inside, sized": (lambda: OnceInside(length=4), batches),
    "loader of a stream that is read once": (lambda: loader(Stream(iter(zip(X, Y, strict=True)))), batches),
    "stream that is read once": (lambda: Stream(iter(batches())), batches),
    "resettable": (Resettable, batches),
    "deque": (lambda: deque(batches()), batches),
    "tuple": (lambda: tuple(batches()), batches),
    "values of a dict": (lambda: dict(enumerate(batches())).values(), batches),
    "length too small": (lambda: Again(length=2), batches),
    "length too large": (lambda: Again(length=9), batches),
    "length 0": (lambda: Again(length=0), batches),
    "stream with a length too small": (lambda: loader(SizedStream(16)), batches),
    "reused memory": (Reused, batches),
    "reused memory, generator": (lambda: (pair for pair in Reused()), batches),
    "records": (records, batches),
    "source": (lambda: source(records()), batches),
    "source of a generator": (lambda: source(record for record in records()), batches),
    "named tuples": (each(Pair), batches),
    "dicts": (each(lambda x, y: {"input": x, "labels": y}), batches),
    "other dicts": (each(lambda x, y: UserDict(input=x, labels=y)), batches),
    "arrays in batches": (each(lambda x, y: (x.numpy(), y.numpy())), batches),
    "source of pairs": (lambda: source(batches()), batches),
    "source of a queue": (lambda: source(deque(records())), batches),
    "entries by name": (lambda: [{"input": X[i], "label": int(Y[i])} for i in range(32)], batches),
    "turned arrays": (
        lambda: (X.numpy()[::-1], Y.numpy()[::-1].astype(">i4")),
        lambda: batches(X.flip(0), Y.flip(0)),
    ),
    "in inference mode": (in_inference_mode, batches),
    "numbered": (lambda: enumerate(batches()), REFUSED),
    "no iterator": (lambda: Again(5, 4), REFUSED),
    "shrinking": (Shrinking, REFUSED),
    "items by number": (Items, REFUSED),
    "empty batch": (lambda: [*batches()[:2], EMPTY, *batches()[2:]], REFUSED),
    "empty first": (lambda: [EMPTY, *batches()], REFUSED),
    "empty in a generator": (lambda: (pair for pair in [*batches(), EMPTY]), REFUSED),
    "empty from a collate_fn": (lambda: loader(Stream(), collate_fn=emptying), REFUSED),
    "empty source": (lambda: source([*records(), Batch((EMPTY[0],), labels=EMPTY[1])]), REFUSED),
    "empty tensors": (lambda: EMPTY, REFUSED),
    "empty iterator": (lambda: iter(()), REFUSED),
    "endless": (Endless, REFUSED),
    "endless generator": (lambda: (pair for pair in Endless()), REFUSED),
    "cycle": (lambda: itertools.cycle(batches()), REFUSED),
    "endless loader": (lambda: loader(EndlessStream()), REFUSED),
    "endless stream": (EndlessStream, REFUSED),
    "endless, sized": (lambda: Endless(length=4), REFUSED),
    "endless batch sampler": (
        lambda: DataLoader(TensorDataset(X, Y), batch_sampler=EndlessSampler()),
        REFUSED,
    ),
    "a length without end": (lambda: Endless(length=10**9), REFUSED),
    "loader fails": (Failing, REFUSED),
    "data set fails": (lambda: loader(Rows(fails=20)), REFUSED),
    "data set too long": (lambda: loader(Rows(64)), REFUSED),
}
LABELS = {
    **{
        f"labels {dtype}": (each(lambda x, y, dtype=dtype: (x, y.to(dtype))), batches)
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)
    },
    "int32 labels, tensors": (lambda: (X, Y.int()), batches),
    "bool": (lambda: batches(X, Y % 2 == 1), lambda: batches(X, Y % 2)),
    "bool per output": (lambda: batches(X, MANY), lambda: batches(X, MANY.float())),
    "float64 values": (lambda: batches(X, VALUES.double()), lambda: batches(X, VALUES)),
    "numbers": (each(lambda x, y: (x, y.tolist())), batches),
    "labels [N, 1]": (each(lambda x, y: (x, y[:, None])), REFUSED),
    "one-hot": (each(lambda x, y: (x, torch.eye(4).long()[y])), REFUSED),
    "classes as floats": (each(lambda x, y: (x, y.float())), REFUSED),
    "too few": (third(lambda x, y: (x, y[:5])), REFUSED),
    "label 4": (third(lambda x, y: (x, torch.full_like(y, 4))), REFUSED),
    "label -1": (third(lambda x, y: (x, torch.full_like(y, -1))), REFUSED),
    "none": (each(lambda x, y: x), REFUSED),
    "tuples of one": (each(lambda x, y: (x,)), REFUSED),
    "none in one batch": (third(lambda x, y: x), REFUSED),
    "floats in one batch": (third(lambda x, y: (x, y.float())), REFUSED),
    "values after 0 and 1": (lambda: batches(X, torch.cat([MANY[:16].float(), VALUES[16:] * 9])), REFUSED),
    "NaN values": (lambda: batches(X, VALUES.index_fill(0, torch.tensor(20), torch.nan)), REFUSED),
    "strings": (each(lambda x, y: (x, ["a"] * 8)), REFUSED),
    "without a dimension": (each(lambda x, y: (x, y[0])), REFUSED),
    "sparse labels": (each(lambda x, y: (x, y.to_sparse())), REFUSED),
    "labels without numbers": (each(lambda x, y: (x, y.to("meta"))), REFUSED),
}
"""Forms of labels; a command that reads none may take what it does not read."""
INPUTS = {
    "float64": (each(lambda x, y: (x.double(), y)), batches),
    "float64 tensors": (lambda: (X.double(), Y), batches),
    "float64 loader": (lambda: loader(TensorDataset(X.double(), Y)), batches),
    "float64 source": (lambda: source([Batch((x.double(),), labels=y.int()) for x, y in batches()]), batches),
    "float16": (each(lambda x, y: (x.half(), y)), batches),
    "float64 in one batch": (third(lambda x, y: (x.double(), y)), batches),
    "uint8": (each(lambda x, y: (x.to(torch.uint8), y)), REFUSED),
    "int64": (each(lambda x, y: (x.long(), y)), REFUSED),
    "complex": (each(lambda x, y: (x + 0j, y)), REFUSED),
    "NaN": (third(damaged), REFUSED),
    "infinity": (third(lambda x, y: damaged(x, y, torch.inf)), REFUSED),
    "NaN in tensors": (lambda: damaged(X, Y), REFUSED),
    "NaN in a loader": (lambda: loader(TensorDataset(*damaged(X, Y))), REFUSED),
    "wrong key": (each(lambda x, y: {"wrong": x, "labels": y}), REFUSED),
    "wrong key of labels": (each(lambda x, y: {"input": x, "klass": y}), REFUSED),
    "wrong key in one batch": (third(lambda x, y: {"wrong": x, "labels": y}), REFUSED),
    "triples": (each(lambda x, y: (x, y, y)), REFUSED),
    "triple in one batch": (third(lambda x, y: (x, y, y)), REFUSED),
    "three tensors": (lambda: (X, X, Y), REFUSED),
    "widths": (third(lambda x, y: (x[:, :7], y)), REFUSED),
    "wrong width": (each(lambda x, y: (x[:, :7], y)), REFUSED),
    "widths in a loader": (lambda: loader(Rows(narrow=20)), REFUSED),
    "rows": (each(lambda x, y: (list(x), y)), REFUSED),
    "numbers": (each(lambda x, y: (x.tolist(), y)), REFUSED),
    "without dimensions": (each(lambda x, y: (x[0, 0], y)), REFUSED),
    "number": (lambda: (torch.tensor(3.0), torch.tensor(1)), REFUSED),
    "single examples": (lambda: loader(batch_size=None), REFUSED),
    "sparse": (each(lambda x, y: (x.to_sparse(), y)), REFUSED),
    "with a gradient": (each(lambda x, y: (with_gradient(x), y)), batches),
    "of a computation": (each(lambda x, y: (with_gradient(x) * 1, y)), batches),
    "tensors with a gradient": (lambda: (with_gradient(X), Y), batches),
    "without numbers": (each(lambda x, y: (x.to("meta"), y)), REFUSED),
    "text in batches": (each(lambda x, y: (["text"] * 8, y)), REFUSED),
    "nothing in one batch": (third(lambda x, y: None), REFUSED),
    "a set in one batch": (third(lambda x, y: {1, 2}), REFUSED),
    "array of objects": (lambda: (np.array([["a"] * 8] * 32, dtype=object), Y.numpy()), REFUSED),
    "an object": (object, REFUSED),
    "vectors": (lambda: list(zip(X, VALUES, strict=True)), REFUSED),
    "lengths": (lambda: (X, Y[:5]), REFUSED),
}
