"""
The parts behind the scripts, a file per concern. CONTRIBUTING.md says which part may import which.

ROOT is the repository's folder; RANK, WORLD and LOCAL_RANK are this process's place under torchrun.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RANK, WORLD, LOCAL_RANK = (
    int(os.environ.get(name, default))
    for name, default in (('RANK', 0), ('WORLD_SIZE', 1), ('LOCAL_RANK', 0))
)
