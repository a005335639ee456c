"""Sums of products of a layer's inputs, Σ x xᵀ, over calibration data."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from regrow.core.axes import Axis, AxisGraph
from regrow.core.sources import Batch, device_of
from regrow.scoring.collect import BlockVisits
from regrow.scoring.gradients import evaluation_mode, find_trunk
from regrow.scoring.watch import InputHook, visible_rows
from regrow.scoring.weights import Reader, readers

ROWS_PER_SUM = 4096  # the number of rows summed at a time in float32
# The most bytes of sums that are kept at a time; layers beyond it are measured in another pass over the data.
MAX_SUM_BYTES = 2 * 2**30
MAX_INPUTS = 16384  # the most inputs of a layer whose products are summed: those of more take over 2 GiB
ORDERING_MATRICES = 4  # how many matrices of the size of a layer's sums ordering its units takes, beside the sums
MAX_BATCH_WINDOWS = 8  # the most windows that should be in a batch of the data


@dataclass
class Gram:
    """Sums of products over the inputs x of a layer, from which a constant c near their mean is subtracted.

    Without it, float32 would lose the variance of inputs that hardly vary beside their mean.
    """

    products: Tensor  # Σ (x − c) (x − c)ᵀ, `[k, k]` float64
    total: Tensor  # Σ (x − c), `[k]` float64
    constant: Tensor  # c, the mean of the first inputs, `[k]` float64
    rows: int = 0  # the number of inputs

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "Gram":
        """Return sums over no inputs yet of a layer, each of ``width`` values, on a device (MPS: on the CPU)."""
        home = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        products = torch.zeros(width, width, dtype=torch.float64, device=home)
        return cls(products, products.new_zeros(width), products.new_zeros(width))

    @property
    def mean(self) -> Tensor:
        """The mean of x, ``[k]`` float64; 0 without inputs."""
        return self.constant + self.total / max(1, self.rows)

    def add(self, rows: Tensor) -> None:
        """Add inputs of the layer, ``[rows, k]`` of any floating dtype, to the sums in place."""
        with torch.autocast(rows.device.type, enabled=False):
            for part in rows.split(ROWS_PER_SUM):
                part = part.double() if part.dtype == torch.float64 else part.float()
                if not self.rows:
                    self.constant = part.mean(0).to(self.constant)
                part = part - self.constant.to(part)
                self.products += (part.T @ part).to(self.products)
                self.total += part.sum(0).to(self.total)
                self.rows += len(part)

    def mean_products(self, *, centre: bool) -> Tensor:
        """Return the mean of x xᵀ, or (``centre``) of (x − mean) (x − mean)ᵀ, ``[k, k]``; overwrites ``products``."""
        products = self.products
        if self.rows:
            products.addr_(self.total, self.total, alpha=-1 / self.rows).div_(self.rows)
        return products if centre else products.addr_(self.mean, self.mean)


def linear_readers(axes: AxisGraph, units: Sequence[Axis]) -> dict[str, Reader]:
    """Return weight name → its reader, for linear layers that read one axis of ``units``, which no other weight reads.

    Layers of more than :data:`MAX_INPUTS` inputs are left out.
    """
    reads = readers(axes, units)
    readers_of, axes_of = Counter(reader.axis for reader in reads), Counter(reader.weight for reader in reads)
    return {
        reader.weight: reader
        for reader in reads
        if readers_of[reader.axis] == axes_of[reader.weight] == 1
        and len(axes.shapes[reader.weight]) == 2
        and reader.width <= MAX_INPUTS
    }


def sum_products(
    model: nn.Module,
    widths: Mapping[str, int],
    batches: Sequence[Batch],
    use: Callable[[str, Gram], None],
    visits: BlockVisits | None = None,
) -> None:
    """Sum the products of linear layers' inputs; call ``use`` with each layer's name and sums once they are complete.

    ``widths``: name of a layer's weight → its number of inputs. Positions that an ``attention_mask`` hides are left
    out. In memory the batches run in as few passes as the memory for sums allows, without the head if no layer lies in
    it; by ``visits``, for a network that does not fit into memory, in one. ``use`` may overwrite the sums. Raises
    ``ValueError`` if no batch reaches a layer.
    """
    if not widths:
        return
    sums: dict[str, Gram] = {}
    todo = set(widths)

    def finish() -> None:
        for name in [*sums]:
            if name not in todo:
                raise ValueError(f"{name!r} is read in several parts of the network; load it whole, without --memory")
            todo.remove(name)
            use(name, sums.pop(name))

    if visits is not None:
        batches = list(batches)  # read once per part of the network

        @contextmanager
        def around(number: int, watched: Mapping[int, str]) -> Iterator[None]:
            if number == 0:
                finish()
            with _GramHook({key: name for key, name in watched.items() if name in widths}, sums, batches[number]):
                yield

        visits.visit(batches, list(widths), around)
        finish()
    else:
        parameters, device = dict(model.named_parameters(remove_duplicate=False)), device_of(model)
        for part in _group_layers(widths):
            run = find_trunk(model, batches[0], part) if batches else model
            watched = {id(parameters[name]): name for name in part}
            with evaluation_mode(model), torch.no_grad():
                for number, batch in enumerate(batches):
                    local = batch.to(device)
                    with _GramHook(watched, sums, batch):
                        local.run(run)
                    if number == 0 and run is not model and len(sums) < len(part):  # the trunk leaves some out
                        sums.clear()
                        run = model
                        with _GramHook(watched, sums, batch):
                            local.run(run)
            finish()
    if todo:
        raise ValueError(f"no batch reached the weight {min(todo)!r}; give more data, or --exclude {min(todo)}")


def predict_bytes(layers: Sequence[tuple[int, int]], *, together: bool) -> int:
    """Return the bytes for the sums of layers, of (inputs, outputs) each, and for ordering the units of the largest.

    ``together``: whether all are summed in one pass, as block by block; else in as many as :data:`MAX_SUM_BYTES` asks
    for.

    >>> predict_bytes([(1000, 100), (500, 100)], together=True)
    43600000
    """
    sums, widest = sum(8 * k * k for k, _ in layers), max((8 * k * k for k, _ in layers), default=0)
    most = max((8 * k * (ORDERING_MATRICES * k + 2 * out) for k, out in layers), default=0)
    return (sums if together else max(widest, min(sums, MAX_SUM_BYTES))) + most


def _group_layers(widths: Mapping[str, int]) -> list[list[str]]:
    """Return the layers (name → inputs) in groups whose sums take at most :data:`MAX_SUM_BYTES`; or one by itself."""
    parts: list[list[str]] = [[]]
    for name in widths:
        if parts[-1] and sum(8 * widths[other] ** 2 for other in (*parts[-1], name)) > MAX_SUM_BYTES:
            parts.append([])
        parts[-1].append(name)
    return parts


class _GramHook(InputHook):
    """Adds the inputs of watched weights on a batch to ``sums``, without padding, and leaves the inputs unchanged."""

    def __init__(self, watched: Mapping[int, str], sums: dict[str, Gram], batch: Batch) -> None:
        super().__init__(watched)
        self.sums, self.batch = sums, batch

    def replace_input(self, name: str, value: Tensor, dim: int) -> Tensor:
        """Add an input of the weight ``name`` to its sums, and return it unchanged."""
        rows = value.detach().movedim(dim, -1).reshape(-1, value.shape[dim])
        if (visible := visible_rows(value, dim, self.batch)) is not None:
            rows = rows[visible.to(rows.device)]
        if name not in self.sums:
            self.sums[name] = Gram.empty(rows.shape[1], rows.device)
        self.sums[name].add(rows)
        return value
