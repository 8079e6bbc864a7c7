"""Other libraries, where they are installed: their models are what ours are compared with."""

import importlib
import os
import warnings
from types import ModuleType, SimpleNamespace

import pytest


def _need(name: str) -> ModuleType:
    """The module; where it is missing the test is skipped, and fails under CI=true."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of while they are imported
            return importlib.import_module(name)
    except ImportError:
        reason = f"needs the package {name} (pip install 'capjax[parity]')"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def safetensors() -> ModuleType:
    """The module `safetensors.numpy`."""
    return _need("safetensors.numpy")


@pytest.fixture
def libraries() -> SimpleNamespace:
    """`torch` and `transformers`, which neither fetches nor prints anything."""
    _need("safetensors")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = SimpleNamespace(torch=_need("torch"), transformers=_need("transformers"))
    found.transformers.logging.set_verbosity_error()
    found.transformers.logging.disable_progress_bar()
    found.torch.manual_seed(0)
    return found
