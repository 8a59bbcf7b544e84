"""
The parts behind the scripts, a file per concern. CONTRIBUTING.md says which part may import which.

ROOT is the repository's folder, MAIN the path of the running script. RANK, WORLD and LOCAL_RANK are this
process's place under torchrun.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = 'RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'  # what torchrun sets


def read_place(environ):
    """Returns (rank, number of processes, local rank): (0, 1, 0) unless torchrun or the like has set all.

    A RANK or WORLD_SIZE that another program has left in the environment is ignored.
    """
    if not all(environ.get(name) for name in PLACE):
        return 0, 1, 0
    try:
        rank, world, local_rank = (int(environ[name]) for name in PLACE[:3])
    except ValueError:
        return 0, 1, 0
    return (rank, world, local_rank) if 0 <= rank < world and local_rank >= 0 else (0, 1, 0)


RANK, WORLD, LOCAL_RANK = read_place(os.environ)

MAIN = Path(getattr(sys.modules['__main__'], '__file__', None) or '-').resolve()
if MAIN.parent == ROOT / 'nanoloop' or MAIN in (ROOT / 'model.py', ROOT / 'configurator.py'):
    sys.exit(f'{MAIN.name} is no script: see train.py, sample.py, bench.py, export.py and plot.py')
