"""
WikiText-103 (raw) in GPT-2's tokens. Its rows are lines, so no end-of-text token follows them.

    python data/wikitext103/prepare.py [--processes N] [--streaming] [--input local.parquet ...]
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.prepare import write_hub  # noqa: E402


@command
def main(argv=None):
    write_hub(
        FOLDER,
        'Salesforce/wikitext',
        {'train': 'train', 'validation': 'val'},
        end=False,
        argv=argv,
        name='wikitext-103-raw-v1',
    )


if __name__ == '__main__':
    main()
