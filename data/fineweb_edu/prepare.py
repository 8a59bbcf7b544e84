"""
FineWeb-Edu in GPT-2's tokens: the sample of 10 billion (20 GB), 1 in 2,000 documents for validation; with
CONFIG = 'sample-100BT' in this file ten times that. After the download a core encodes about a million tokens
per second: 3 hours of one core. It needs about 100 GB of disk, with --streaming 20 GB.

    python data/fineweb_edu/prepare.py [--processes N] [--streaming]

With --input it takes tables of your own instead; data/text/prepare.py does so under another name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare_script import prepare_hub

FOLDER = Path(__file__).resolve().parent
CONFIG = 'sample-10BT'


@command
def main(argv):
    prepare_hub(
        argv, __doc__, FOLDER, 'HuggingFaceFW/fineweb-edu', {'train': 'train'}, print_line, name=CONFIG
    )


if __name__ == '__main__':
    main()
