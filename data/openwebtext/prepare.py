"""
OpenWebText in GPT-2's tokens: about 9 billion for training, 17 GB; needs about 60 GB while it is prepared.

    python data/openwebtext/prepare.py [--processes N] [--streaming] [--input local.parquet ...]
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.prepare import write_hub  # noqa: E402


@command
def main(argv=None):
    splits = {'train': 'train'}
    write_hub(FOLDER, 'Skylion007/openwebtext', splits, argv=argv, revision='refs/convert/parquet')


if __name__ == '__main__':
    main()
