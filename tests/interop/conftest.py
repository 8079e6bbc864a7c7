"""Other libraries, where they are installed: their models are what ours are compared with."""

import os
from types import ModuleType, SimpleNamespace

import pytest


@pytest.fixture
def safetensors(require_module) -> ModuleType:
    """The module `safetensors.numpy`."""
    return require_module("safetensors.numpy")


@pytest.fixture
def libraries(require_module) -> SimpleNamespace:
    """`torch` and `transformers`, which neither fetches nor prints anything."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = ("safetensors", "torch", "transformers")
    found = SimpleNamespace(**{name: require_module(name) for name in names})
    found.transformers.logging.set_verbosity_error()
    found.transformers.logging.disable_progress_bar()
    found.torch.manual_seed(0)
    return found
