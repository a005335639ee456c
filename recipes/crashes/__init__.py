"""Commands that are killed and made to fail; on one thread, without the network."""

import os
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
sys.dont_write_bytecode = True
sys.path.append(str(Path(__file__).parents[2] / "tests" / "cli"))  # for toys.py
