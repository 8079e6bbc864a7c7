"""A tiny captioner, pictures, and a server without sockets."""

import asyncio
import contextlib
import io

import httpx2
import numpy as np
import pytest
from PIL import Image

from capjax.decoding.load import load
from capjax.decoding.options import DecodingOptions
from capjax.serving.app import make_app
from capjax.serving.limits import Limits
from tests.decoding.conftest import run_directory as run_directory

LENGTH = 12
WARM = [DecodingOptions(max_length=LENGTH)]
PATIENT = {"requests_per_minute": 1e6, "burst": 1000, "timeout_s": 300.0}


@pytest.fixture(scope="package")
def captioner(run_directory):
    return load(run_directory)


@pytest.fixture(scope="package")
def pictures():
    """PNG files of eight images whose captions differ."""
    rng = np.random.default_rng(1)
    arrays = [
        (rng.integers(0, 256, (height, width, 3)) * rng.random()).astype(np.uint8)
        for height, width in rng.integers(10, 40, (8, 2))
    ]
    return [png(array) for array in arrays]


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@contextlib.asynccontextmanager
async def talking(app, ready=True):
    """A client of the running application; the application stops when it leaves."""
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app), base_url="http://test", timeout=300
        ) as client,
    ):
        while ready and (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)
        yield client


def talk(captioner, conversation, warm=WARM, **limits):
    """What `conversation(client, batcher)` returns; limits are generous unless given."""
    app, batcher = make_app(captioner, Limits(**{**PATIENT, **limits}), warm)

    async def main():
        async with talking(app) as client:
            return await conversation(client, batcher)

    return asyncio.run(main())
