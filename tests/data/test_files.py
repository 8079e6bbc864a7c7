import sys
from types import SimpleNamespace

import fsspec
import pytest

from capjax.data import files
from capjax.errors import UserError


@pytest.fixture(params=["local", "file", "memory"])
def folder(request, tmp_path):
    """The prefix of a folder with a.tar, b.tar, c.txt and deep/0007.tar in it."""
    content = {"a.tar": b"aaaa", "b.tar": b"0123456789", "c.txt": b"", "deep/0007.tar": b"seven"}
    if request.param == "memory":
        system = fsspec.filesystem("memory")
        for name, data in content.items():
            system.pipe(f"/{tmp_path.name}/{name}", data)
        return f"memory://{tmp_path.name}"
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return f"file://{tmp_path}" if request.param == "file" else str(tmp_path)


@pytest.fixture
def bucket(s3):
    for i in range(3):
        s3.put_object(Bucket="shards", Key=f"x/{i:03d}.tar", Body=b"0123456789" * (i + 1))
    return s3


def names(found, folder):
    assert all(name.startswith(folder) for name in found), found
    return [name.removeprefix(folder).strip("/") for name in found]


def test_paths_globs_and_ranges_name_files_in_order(folder):
    assert names(files.expand(f"{folder}/b.tar"), folder) == ["b.tar"]
    assert names(files.expand(f"{folder}/*.tar"), folder) == ["a.tar", "b.tar"]
    assert names(files.expand(f"{folder}/**/*7.tar"), folder) == ["deep/0007.tar"]
    assert names(files.expand(f"{folder}/*/{{0007..0007}}.t*"), folder) == ["deep/0007.tar"]
    assert names(files.expand(f"{folder}/?.t*"), folder) == ["a.tar", "b.tar", "c.txt"]
    for path in files.expand(f"{folder}/*.tar"):
        assert files.expand(path) == [path], "what is found can be asked for again"


@pytest.mark.parametrize(
    "pattern", ["no.tar", "*.zip", "deep", "dee*", "{0006..0007}.tar", "deep/{6..7}.tar"]
)
def test_what_no_file_fits_is_refused(folder, pattern):
    with pytest.raises(UserError, match="no file"):
        files.expand(f"{folder}/{pattern}")


@pytest.mark.parametrize("pattern", ["{7..3}.tar", "{0..99999999999999}.tar"])
def test_ranges_that_are_none_are_refused(folder, pattern):
    with pytest.raises(UserError, match=r"range \{.*: expected the last number"):
        files.expand(f"{folder}/deep/{pattern}")


def test_ranges_keep_their_order_and_width(tmp_path):
    for name in ("8", "9", "10", "08", "09"):
        (tmp_path / name).touch()
    assert names(files.expand(f"{tmp_path}/{{8..10}}"), str(tmp_path)) == ["8", "9", "10"]
    assert names(files.expand(f"{tmp_path}/{{08..10}}"), str(tmp_path)) == ["08", "09", "10"]


def test_brackets_in_a_file_name_are_no_pattern(tmp_path):
    (tmp_path / "a[1].tar").touch()
    assert files.expand(f"{tmp_path}/a[1].tar") == [f"{tmp_path}/a[1].tar"]
    fsspec.filesystem("memory").pipe("/brackets/a[1].tar", b"")
    assert files.expand("memory://brackets/a[1].tar") == ["memory://brackets/a[1].tar"]


def test_bytes_of_ranges(folder):
    path = f"{folder}/b.tar"
    assert files.read_bytes(path) == b"0123456789"
    assert files.read_bytes(path, 3, 4) == b"3456"
    assert files.read_bytes(path, 7) == b"789"
    assert files.read_bytes(path, 8, 100) == b"89", "the file ends before"
    assert files.read_bytes(path, 3, 0) == b""
    with pytest.raises(OSError):
        files.read_bytes(f"{folder}/no.tar", 0, 5)


def test_state_tells_size_and_change(folder):
    state = files.state(f"{folder}/b.tar")
    assert state.size == 10
    assert state.modified
    assert files.state(f"{folder}/b.tar") == state
    with fsspec.open(f"{folder}/b.tar", "wb") as file:
        file.write(b"9876543210")
    assert files.state(f"{folder}/b.tar") != state
    with pytest.raises(OSError):
        files.state(f"{folder}/no.tar")


def test_siblings():
    assert files.sibling("s3://bucket/x/a.json", "images") == "s3://bucket/x/images"
    assert files.sibling("x/a.json", "images") == "x/images"
    assert files.sibling("a.json", "images") == "images"
    assert files.sibling("x/a.json", "/images") == "/images"
    assert files.sibling("x/a.json", "gs://b/images") == "gs://b/images"
    assert "~" not in files.sibling("s3://b/a.json", "~/images")


def test_s3_reads_as_a_disk_does(bucket):
    assert files.expand("s3://shards/x/*.tar") == [f"s3://shards/x/00{i}.tar" for i in range(3)]
    assert files.expand("s3://shards/x/{001..002}.tar") == files.expand("s3://shards/x/*.tar")[1:]
    path = "s3://shards/x/001.tar"
    state = files.state(path)
    assert state.size == 20
    assert files.read_bytes(path, 0, 4) == b"0123"
    assert files.read_bytes(path, 8, 4) == b"8901"
    assert files.read_bytes(path, 18, 100) == b"89"
    assert files.read_bytes(path, 8, 0) == b""
    assert len(files.read_bytes(path)) == 20
    for pattern in ("s3://shards/x/no.tar", "s3://shards/x/{001..003}.tar", "s3://no/bucket"):
        with pytest.raises(UserError, match="no file"):
            files.expand(pattern)
    with pytest.raises(FileNotFoundError):
        files.read_bytes("s3://shards/x/no.tar")
    bucket.put_object(Bucket="shards", Key="x/003.tar", Body=b"new")
    bucket.put_object(Bucket="shards", Key="x/001.tar", Body=b"9" * 20)
    assert len(files.expand("s3://shards/x/*.tar")) == 4, "listings of before are not believed"
    assert files.state(path).size == 20
    assert files.state(path, fresh=True) != state


def test_store_out_of_reach_is_an_os_error(monkeypatch):
    system = fsspec.filesystem("memory")

    def fail(*_, **__):
        raise RuntimeError("no credentials")

    monkeypatch.setattr(type(system), "info", fail)
    with pytest.raises(OSError, match="no credentials"):
        files.state("memory://a")
    with pytest.raises(UserError, match="no credentials"):
        files.expand("memory://a/*")


def test_reads_that_fail_are_tried_a_few_times(failing):
    fsspec.filesystem("memory").pipe("/failing", b"0123456789")
    for error in (TimeoutError("late"), ConnectionResetError(), RuntimeError("payload cut short")):
        pauses = failing(3, error)
        assert files.read_bytes("memory://failing", 3, 4) == b"3456"
        assert len(pauses) == 3
        assert sum(pauses) < 15
    pauses = failing(4, TimeoutError("late"))
    with pytest.raises(TimeoutError, match="late"):
        files.read_bytes("memory://failing")
    assert len(pauses) == 3, "then it is given up"
    pauses = failing(1, FileNotFoundError("gone"))
    with pytest.raises(FileNotFoundError):
        files.read_bytes("memory://failing")
    assert not pauses, "what is not there does not come by waiting"


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, PermissionError), (403, PermissionError), (404, FileNotFoundError),
     (410, FileNotFoundError)],
)  # fmt: skip
def test_what_a_server_refuses_for_good_is_not_asked_for_again(failing, status, kind):
    aiohttp = pytest.importorskip("aiohttp")
    asked = SimpleNamespace(real_url="https://host/a")
    pauses = failing(1, aiohttp.ClientResponseError(asked, (), status=status))
    with pytest.raises(kind, match="memory://failing: ClientResponseError: "):
        files.read_bytes("memory://failing")
    assert not pauses
    fsspec.filesystem("memory").pipe("/failing", b"0123456789")
    pauses = failing(1, aiohttp.ClientResponseError(asked, (), status=503))
    assert files.read_bytes("memory://failing") == b"0123456789"
    assert len(pauses) == 1


def test_answers_cut_short_are_asked_for_again(failing, monkeypatch):
    pauses = failing(0, None)
    system = fsspec.filesystem("memory")
    system.pipe("/failing", b"0123456789")
    read, lengths = type(system).cat_file, [1, 0, 7]
    monkeypatch.setattr(
        type(system), "cat_file", lambda *args, **given: read(*args, **given)[: lengths.pop(0)]
    )
    assert files.read_whole("memory://failing", 2, 9) == b"2345678"
    assert len(pauses) == 2
    lengths[:] = [7] * 4
    with pytest.raises(files.WrongFile, match="memory://failing ends before byte 12"):
        files.read_whole("memory://failing", 4, 12)
    assert len(pauses) == 2 + 3


def test_the_size_of_a_remote_file_is_asked_for_again(failing, monkeypatch):
    pauses = failing(0, None)
    system = fsspec.filesystem("memory")
    system.pipe("/failing", b"0123456789")
    info, errors = type(system).info, [TimeoutError("late")]

    def late(*args, **given):
        if errors:
            raise errors.pop()
        return info(*args, **given)

    monkeypatch.setattr(type(system), "info", late)
    assert files.RemoteFile("memory://failing").read() == b"0123456789"
    assert len(pauses) == 1


def test_a_remote_file_reads_and_seeks_as_a_local_one(failing, tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    fsspec.filesystem("memory").pipe("/failing", b"0123456789")
    with files.RemoteFile("memory://failing") as far, (tmp_path / "x").open("rb", 0) as near:
        for offset, whence in ((0, 0), (7, 0), (-2, 1), (-4, 2), (3, 2), (0, 0)):
            failing(1, TimeoutError())
            assert far.seek(offset, whence) == near.seek(offset, whence) == far.tell()
            assert far.read(3) == near.read(3)
        assert far.read() == near.read()


def test_unknown_and_missing_storage_is_named(monkeypatch):
    with pytest.raises(UserError, match="begins with one of s3://"):
        files.expand("nowhere://a/b.tar")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError, match="gcsfs"):
        files.expand("gs://a/b.tar")
