"""How much memory a network needs whole, and one block at a time, predicted from shapes before anything is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from regrow.core.amounts import format_bytes
from regrow.core.axes import Axis, AxisGraph
from regrow.core.errors import ResourceError
from regrow.core.process_memory import read_peak, read_resident
from regrow.scoring.grams import linear_readers, predict_bytes
from regrow.streaming.network import StreamedNetwork

# How many of the largest block are in memory in float64 at a time where a network in memory is compared.
FLOAT64_BLOCKS = 1.7
# How many of the largest block are in memory at a time in their own precision: the present one and the next, which is
# read meanwhile; in a cut, what becomes of the present one, and what of the last one is on its way to the disk.
BLOCK_COPIES: Mapping[str, int] = {"pruning": 4, "evaluating": 2}
ACTIVATION_COPIES = 6  # how many results of a block's widest operation are in memory at a time
# Bytes of a run in memory per byte of the model: the model, and what is cut from it before it replaces the old.
WHOLE_COPIES = 2.0
# Bytes that the interpreter and the operations need besides, with the whole network in memory.
SPARE_BYTES: Mapping[str, int] = {"pruning": 2**28, "evaluating": 2**26}
# Bytes that libraries load once they compute, and those of their kernels, with one block in memory.
LIBRARY_BYTES = 2**26
# Ratio of the limit that a refusal proposes to the prediction: the next process may begin with more memory.
MARGIN = 1.05


@dataclass(frozen=True)
class MemoryPlan:
    """How a run stays within a limit of memory; amounts are bytes."""

    what: str  # the run, for messages
    limit: int
    whole: int  # what the run would need with the whole network in memory
    least: int  # what it needs with one block in memory
    results: int = 0  # what the results of blocks for all windows take; in files if there is no room for them
    blocks: int = 0  # how many blocks the network has
    decision: bool | None = None  # whether it is read one block at a time; ``None``: if it does not fit whole

    @property
    def streams(self) -> bool:
        """Whether the network is read one block at a time."""
        return self.whole > self.limit if self.decision is None else self.decision

    @property
    def needed(self) -> int:
        """How many bytes the run is predicted to need, the way that it runs."""
        if not self.streams:
            return self.whole
        return self.least if self.on_disk else self.least + self.results

    @property
    def on_disk(self) -> bool:
        """Whether results of blocks are kept in files, since memory has no room for them."""
        return self.least + self.results > self.limit

    def __str__(self) -> str:
        text = f"memory: about {format_bytes(self.needed)} of {format_bytes(self.limit)}"
        if not self.streams:
            return f"{text}, with all blocks in memory"
        where = "in files" if self.on_disk else "in memory"
        return (
            f"{text}, with one of {self.blocks} blocks at a time and hidden states {where} (all at once: "
            f"{format_bytes(self.whole)})"
        )

    def record(self) -> dict[str, int | None]:
        """Return the limit, the prediction and the peak resident memory of this process in bytes, as JSON data."""
        return {"limit": self.limit, "predicted": self.needed, "peak": read_peak()}

    def check(self) -> None:
        """Raise ResourceError, with an amount that is enough, if the network is read by block and even that exceeds."""
        if self.streams and self.least > self.limit:
            enough = format_bytes(int(MARGIN * self.least)).replace(" ", "")
            raise ResourceError(
                f"{self.what} within {format_bytes(self.limit)} of memory is impossible; use --memory {enough}"
            )


def plan_memory(
    network: StreamedNetwork, limit: int, windows: int, tokens: int, *, what: str = "pruning"
) -> MemoryPlan:
    """Predict the memory that a run on ``windows`` batches of ``tokens`` tokens needs, whole and block by block.

    ``limit``: bytes, which are not checked here; ``what``: ``"pruning"`` or ``"evaluating"``.
    """
    weights, model, held = network.weights, network.model, read_resident()
    size = {name: weights.bytes_of(name) for name in weights.stored}
    inside = [weights.like[name] for block in network.blocks for name in block.names]
    item = next(model.parameters()).element_size()
    # The outputs of the widest layer: of the whole network, such as the head, and within blocks.
    width, inner = (max((p.shape[0] for p in some if p.dim() == 2), default=1) for some in (model.parameters(), inside))
    hidden = max((p.shape[-1] for p in model.parameters() if p.dim() == 1), default=1)
    entries = max(sum(weights.like[name].numel() for name in block.names) for block in network.blocks)
    exact = int(8 * FLOAT64_BLOCKS * entries) if what == "pruning" else 0
    running = SPARE_BYTES[what] + 3 * tokens * width * max(item, 4)
    # Loading whole in another dtype maps the files beside the converted weights.
    mapped = sum(place.bytes for _, place in weights.places()) if weights.is_cast else 0
    whole = held + max(running + exact, mapped) + int((WHOLE_COPIES - (what != "pruning")) * sum(size.values()))
    # Behind the last block, the outputs are in memory instead of blocks.
    outer, outputs = sum(size[name] for name in network.outer), 2 * tokens * width * item
    blocks = BLOCK_COPIES[what] * network.largest_block + ACTIVATION_COPIES * tokens * inner * item
    least = held + LIBRARY_BYTES + outer + max(blocks, outputs)
    results = 2 * windows * tokens * hidden * item
    return MemoryPlan(f"{what} {weights.name}", limit, whole, least, results, len(network.blocks))


def add_products(plan: MemoryPlan, network: StreamedNetwork, axes: AxisGraph, units: Sequence[Axis]) -> MemoryPlan:
    """Return the plan with the bytes for Gram matrices of the inputs of layers that read the axes ``units``."""
    model = network.model
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    widths = {  # name of a weight → its numbers of inputs and outputs
        name: (reader.width, shapes[name][1 - reader.slot.dim]) for name, reader in linear_readers(axes, units).items()
    }
    weights = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    whole = read_resident() + SPARE_BYTES["pruning"] + weights + predict_bytes([*widths.values()], together=False)
    blocks = ([widths[name] for name in block.names if name in widths] for block in network.blocks)
    least = plan.least + max(predict_bytes(sizes, together=True) for sizes in blocks)
    return replace(plan, whole=max(plan.whole, whole), least=least)
