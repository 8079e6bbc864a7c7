"""Stores to read from: one on this machine that speaks S3, and one that fails at times."""

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from capjax.data import files


@pytest.fixture(scope="session")
def s3_server():
    """Its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A client of the store; it has one bucket, `shards`, with what earlier tests put there."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="shards")
    yield client
    fsspec.filesystem("s3").invalidate_cache()


@pytest.fixture
def failing(monkeypatch):
    """Makes the next reads of `memory://` fail, with what; the pauses come to the list."""
    system = fsspec.filesystem("memory")
    read, pauses, left = type(system).cat_file, [], []

    def cat_file(*args, **kwargs):
        if left:
            raise left.pop()
        return read(*args, **kwargs)

    def fail(times, error):
        left[:] = [error] * times
        pauses.clear()
        return pauses

    monkeypatch.setattr(type(system), "cat_file", cat_file)
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    return fail
