"""
FineWeb-Edu in GPT-2's tokens: the sample of 10 billion; with CONFIG = 'sample-100BT' ten times that.

    python data/fineweb_edu/prepare.py [--processes N] [--streaming] [--input FILE ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command
from data import prepare_hub

FOLDER = Path(__file__).resolve().parent
CONFIG = 'sample-10BT'


@command
def main(argv):
    prepare_hub(argv, __doc__, FOLDER, 'HuggingFaceFW/fineweb-edu', {'train': 'train'}, name=CONFIG)


if __name__ == '__main__':
    main()
