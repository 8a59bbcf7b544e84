"""
WikiText-103 (raw) in GPT-2's tokens: about 118 million for training (240 MB), and its own validation split.
Its rows are lines, so no end-of-text token follows them. It takes a few minutes and 1 GB of disk.

    python data/wikitext103/prepare.py [--processes N] [--streaming]

With --input it takes tables of your own instead; data/text/prepare.py does so under another name.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.prepare_script import prepare_hub

FOLDER = Path(__file__).resolve().parent
SPLITS = {'train': 'train', 'validation': 'val'}


@command
def main(argv):
    name = 'wikitext-103-raw-v1'
    prepare_hub(argv, __doc__, FOLDER, 'Salesforce/wikitext', SPLITS, print_line, eot=False, name=name)


if __name__ == '__main__':
    main()
