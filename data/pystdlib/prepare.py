"""
The standard library of the Python that runs this, as bytes: a real corpus without a download. It has about
10 million tokens (20 MB), 10 to 20 % of them for validation: files chosen by their names, so that most stay
the same in another Python. It takes a few seconds; train.py does it by itself.

    python data/pystdlib/prepare.py      it has no options
"""

import platform
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository
from configurator import command, print_line
from nanoloop.checks import UserError
from nanoloop.prepare import write_text
from nanoloop.prepare_script import parse
from nanoloop.text_files import hold_out_by_name
from nanoloop.tokenizer import Bytes

FOLDER = Path(__file__).resolve().parent
LEFT_OUT = set('site-packages dist-packages test tests idle_test idlelib lib2to3 __pycache__'.split())


@command
def main(argv):
    parse(argv, __doc__, flags={})
    library = Path(sysconfig.get_path('stdlib'))
    paths = sorted(p for p in library.rglob('*.py') if not LEFT_OUT & set(p.relative_to(library).parts))
    if not paths:
        raise UserError(f'{library} has no Python sources, use data/text/prepare.py with a text of your own')
    source = f'standard library of Python {platform.python_version()}'
    write_text(FOLDER, paths, Bytes(), source, say=print_line, held_out=hold_out_by_name(paths, 0.1))


if __name__ == '__main__':
    main()
