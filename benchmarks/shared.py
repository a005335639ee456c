"""The harness of recipes/, for the benchmarks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from harness import *  # noqa: F403
