"""Devices and the compile cache, in fresh processes: JAX must not have started before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capjax.commands import runtime
from capjax.errors import UserError

SCRIPT = """
import argparse, sys, warnings
warnings.simplefilter("error")
from capjax.commands import runtime
parser = argparse.ArgumentParser()
runtime.add_arguments(parser)
runtime.start(parser.parse_args())
import jax
from absl import flags
assert flags.FLAGS.is_parsed()
jax.jit(lambda x: x * 2 + 1)(3.0).block_until_ready()
print(jax.device_count(), jax.devices()[0].platform)
"""


def start(*args, **env):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=kept | env,
    )


def test_compiled_programs_go_to_the_users_cache_and_are_found_again(tmp_path):
    args = ("--platform=cpu", "--num_cpu_devices=3")
    entries = []
    for _ in range(2):
        result = start(*args, XDG_CACHE_HOME=str(tmp_path))
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.split() == ["3", "cpu"]
        cache = tmp_path / "capjax" / "jax"
        entries.append({path.name: path.stat().st_mtime_ns for path in cache.glob("*-cache")})
    assert entries[0]
    assert entries[0] == entries[1]


def test_the_compile_cache_can_be_named_or_switched_off(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert runtime.compile_cache(None) == tmp_path / "user" / "capjax" / "jax"
    assert runtime.compile_cache("none") is None
    assert runtime.compile_cache(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
    assert runtime.compile_cache(None) == tmp_path / "jax"


def test_a_cache_that_cannot_be_written_is_an_error_only_where_it_was_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--compile_cache=.*cannot write there .*or none"):
        runtime.compile_cache(str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert runtime.compile_cache(None) is None


def test_a_user_without_a_home_has_a_cache(tmp_path, monkeypatch):
    def no_home():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert runtime.compile_cache(None) == tmp_path / f"cache-{os.getuid()}" / "capjax" / "jax"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--platform=tpu",), ["--platform=tpu", "--platform=cpu"]),
        (("--num_cpu_devices=0",), ["--num_cpu_devices=0", "at least 1"]),
    ],
)
def test_devices_that_are_not_there_are_a_user_error(args, words):
    result = start(*args)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("capjax.errors.UserError: ")
    assert all(word in last for word in words)
