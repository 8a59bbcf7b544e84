"""
WikiText-103 (raw) in GPT-2's tokens. Its rows are lines, so no end-of-text token follows them.

    python data/wikitext103/prepare.py [--processes N] [--streaming] [--input FILE ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command
from data import prepare_hub

FOLDER = Path(__file__).resolve().parent
SPLITS = {'train': 'train', 'validation': 'val'}


@command
def main(argv):
    prepare_hub(argv, __doc__, FOLDER, 'Salesforce/wikitext', SPLITS, eot=False, name='wikitext-103-raw-v1')


if __name__ == '__main__':
    main()
