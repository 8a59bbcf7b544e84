"""
Found in place of the package by a file of this folder that is run as a script, which none of them is.

Python looks first in the folder of the script, that is, in this one.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
sys.modules.pop('nanoloop', None)
import nanoloop  # noqa: E402, F401  it ends the program with a line
