"""
FineWeb-Edu in GPT-2's tokens. CONFIG: the sample of 10 billion; sample-100BT is ten times that, also sharded.

    python data/fineweb_edu/prepare.py [--processes N] [--streaming] [--input local.parquet ...]
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.prepare import write_hub  # noqa: E402

CONFIG = 'sample-10BT'


@command
def main(argv=None):
    write_hub(FOLDER, 'HuggingFaceFW/fineweb-edu', {'train': 'train'}, argv=argv, name=CONFIG)


if __name__ == '__main__':
    main()
