"""
OpenWebText in GPT-2's tokens: 8 million documents, about 9 billion tokens for training (18 GB), 4.4 million
for validation. After the download a core encodes about a million tokens per second: 3 hours of one core. It
needs about 60 GB of disk, with --streaming 18 GB.

    python data/openwebtext/prepare.py [--processes N] [--streaming]

With --input it takes tables of your own instead; data/text/prepare.py does so under another name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare_script import prepare_hub

FOLDER = Path(__file__).resolve().parent
REVISION = 'refs/convert/parquet'


@command
def main(argv):
    prepare_hub(
        argv, __doc__, FOLDER, 'Skylion007/openwebtext', {'train': 'train'}, print_line, revision=REVISION
    )


if __name__ == '__main__':
    main()
