"""Files of weights made to mislead or to run code: each is one line, and none is believed."""

import json
import pickle
import struct

import numpy as np
import pytest

from capjax.errors import UserError
from capjax.interop.npz import read_npz
from capjax.interop.tensor_files import read_tensors


def tensor(start: int, stop: int, shape: tuple = (2,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def file_of(header, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


GOOD = {"a": tensor(0, 8), "b": tensor(8, 16)}
BAD = {
    "no header": b"\x08\0\0",
    "longer than the file": file_of(GOOD, bytes(16), 1 << 20),
    "longer than memory": file_of(GOOD, bytes(16), (1 << 63) - 1),
    "shorter than the header": file_of(GOOD, bytes(16), 20),
    "data cut": file_of(GOOD, bytes(15)),
    "data left over": file_of(GOOD, bytes(17)),
    "beyond the file": file_of({"a": tensor(0, 8), "b": tensor(8, 1 << 40)}, bytes(16)),
    "overlap": file_of({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)),
    "the same bytes twice": file_of({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)),
    "a hole": file_of({"a": tensor(0, 8), "b": tensor(12, 20)}, bytes(20)),
    "backwards": file_of({"a": tensor(8, 0)}, bytes(8)),
    "negative": file_of({"a": tensor(-8, 0)}, bytes(8)),
    "another size than the shape": file_of({"a": tensor(0, 8, (3,))}, bytes(8)),
    "a shape that overflows": file_of({"a": tensor(0, 8, (1 << 62, 1 << 62))}, bytes(8)),
    "no such type": file_of({"a": tensor(0, 8, dtype="O")}, bytes(8)),
    "no object": file_of([1, 2], bytes(16)),
    "no JSON": file_of(b"\x80\x04\x95", bytes(16)),
    "nested": file_of(b'{"a":' * 100_000, bytes(16)),
}


def test_a_good_one_is_read(safetensors, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(GOOD, np.arange(4, dtype="<f4").tobytes()))
    found = read_tensors(path)
    np.testing.assert_array_equal(found["a"], [0, 1])
    np.testing.assert_array_equal(found["b"], [2, 3])


@pytest.mark.parametrize("kind", BAD)
def test_what_misleads_is_refused(kind, safetensors, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD[kind])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"weight_map": {}},
        {"weight_map": [1]},
        {"weight_map": {"a": "../x.safetensors"}},
        {"weight_map": {"a": "/x.safetensors"}},
    ],
)
def test_an_index_names_files_beside_it(content, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.safetensors.index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="expected a weight_map of the names of files beside it"):
        read_tensors(tmp_path / "in")


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def test_an_npz_runs_nothing(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([Bomb(tmp_path / "exploded")], object))
    with pytest.raises(UserError, match=r"x\.npz: not a readable \.npz file"):
        read_npz(tmp_path / "x.npz")
    assert not (tmp_path / "exploded").exists()
    np.load(tmp_path / "x.npz", allow_pickle=True)["a"]
    assert (tmp_path / "exploded").exists(), "the bomb works where it is unpickled"


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pth"])
def test_a_pickled_file_runs_nothing(suffix, require_module, tmp_path):
    require_module("torch")
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pickle.dumps({"a": Bomb(tmp_path / "exploded")}))
    with pytest.raises(UserError, match="not a plain file of tensors"):
        read_tensors(path)
    assert not (tmp_path / "exploded").exists()
