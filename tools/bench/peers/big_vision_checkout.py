"""big_vision's modules from a checkout of google-research/big_vision, which `BIG_VISION` names.

TensorFlow, which they import for files only, is left out.
"""

import importlib.machinery
import os
import sys
from unittest import mock


def modules():
    """(its CapPa, its utilities). Imports nothing of capjax."""
    root = os.environ.get("BIG_VISION")
    if not root:
        raise SystemExit("set BIG_VISION to a checkout of github.com/google-research/big_vision")
    sys.path.insert(0, root)
    absent = ("tensorflow", "tensorflow.io", "tensorflow.io.gfile")
    for name in absent:
        spec = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = mock.MagicMock(__spec__=spec)
    import big_vision.models.proj.cappa.cappa as cappa
    import big_vision.utils as utils

    for name in absent:
        del sys.modules[name]
    return cappa, utils
