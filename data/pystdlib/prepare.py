"""
The running Python's own standard library as bytes: a real corpus of about 10 MB that needs no download.

    python data/pystdlib/prepare.py
"""

import platform
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))

from configurator import command  # noqa: E402
from nanoloop.checks import UserError  # noqa: E402
from nanoloop.prepare import write_text  # noqa: E402
from nanoloop.tokenizer import Bytes  # noqa: E402

LEFT_OUT = set('site-packages dist-packages test tests idle_test idlelib lib2to3 __pycache__'.split())


@command
def main(argv):
    if argv:
        raise UserError(f'unknown argument {argv[0]!r}, this script takes none')
    library = Path(sysconfig.get_path('stdlib'))
    paths = sorted(p for p in library.rglob('*.py') if not LEFT_OUT & set(p.relative_to(library).parts))
    if not paths:
        raise UserError(f'{library} has no Python sources, use data/text/prepare.py with a text of your own')
    write_text(FOLDER, paths, Bytes(), f'standard library of Python {platform.python_version()}')


if __name__ == '__main__':
    main()
