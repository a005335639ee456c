"""Size and quality of a network before and after a call that writes a run folder."""

import warnings
from dataclasses import replace

from regrow.api.inputs import Inputs
from regrow.api.runs import loaded_of, seed_generators
from regrow.axes import AxisGraph
from regrow.commands.measuring import can_measure, measure
from regrow.evaluation import Perplexity
from regrow.nets.precision import autocasting
from regrow.progress import Progress, silent
from regrow.run_folder import RunFolder
from regrow.sources import preserve_random_state
from regrow.streaming.network import StreamedNetwork
from regrow.tracing.capture import first_line


def measure_run(
    folder: RunFolder,
    inputs: Inputs,
    axes: AxisGraph,
    name: str,
    precision: str,
    progress: Progress = silent,
    network: StreamedNetwork | None = None,
) -> dict[str, Perplexity]:
    """Log size and quality of a network, as the command does, and return its perplexities.

    Loaders that shuffle give the same order each time, and their random state is restored: a folder changes no result.

    Args:
        folder: The run.
        inputs: The network, and the data on which its quality is measured; data that are no validation data, and whose
            labels do not fit the network, are left out with a warning.
        axes: Its axes.
        name: What the rows call it: ``"dense"``, ``"pruned"``.
        precision: The precision of forward passes.
        progress: Called with (steps done, steps in all, what is being done).
        network: The network, if it is read one block at a time.
    """
    loaded = loaded_of(inputs) if network is None else replace(loaded_of(inputs), model=network.model)
    tests = inputs.tests if can_measure(inputs.objective) else ()
    goal = inputs.objective
    seen = frozenset(source.name for source in inputs.sources)
    generators = [generator for source in tests for generator in source.generators]
    with preserve_random_state(*generators), autocasting(inputs.model, precision):
        seed_generators(*generators)
        try:
            return measure(folder, loaded, axes, tests, seen, name, progress, network=network, objective=goal)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if inputs.tests is not inputs.sources:
                raise
            line = first_line(error)
    warnings.warn(f"the quality of the network is not measured: {line}; give validation= data", stacklevel=2)
    return {}
