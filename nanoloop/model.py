"""
Not the model, which is ../model.py. See nanoloop.py in this folder.
"""

import nanoloop  # noqa: F401
