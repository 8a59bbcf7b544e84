"""
OpenWebText in GPT-2's tokens: about 9 billion for training, 17 GB. Preparing it needs about 60 GB of disk.

    python data/openwebtext/prepare.py [--processes N] [--streaming] [--input FILE ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command
from data import prepare_hub

FOLDER = Path(__file__).resolve().parent
REVISION = 'refs/convert/parquet'


@command
def main(argv):
    prepare_hub(argv, __doc__, FOLDER, 'Skylion007/openwebtext', {'train': 'train'}, revision=REVISION)


if __name__ == '__main__':
    main()
