"""What passes is waited for, what does not is said at once, and neither is taken for absence."""

import errno
import itertools
import types

import pytest
from etils import epath

from capjax.errors import StorageError, UserError
from capjax.training import storage
from capjax.training.storage import exists, file_size, is_denied, is_transient, listing, patiently
from capjax.training.workdir import open_workdir
from tests.checkpoint.faulty import Faulty, install, quick


class HttpError(Exception):
    """As gcsfs raises it."""

    def __init__(self, code):
        self.code = code
        super().__init__(f"{code}")


class ClientConnectionError(Exception):
    """As aiohttp's, by name."""


class ServerDisconnectedError(ClientConnectionError):
    pass


class ClientError(Exception):
    """As botocore raises it."""

    def __init__(self, status):
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}
        super().__init__("of botocore")


class HTTPError(OSError):
    """As requests raises it."""

    def __init__(self, status):
        self.response = types.SimpleNamespace(status_code=status)
        super().__init__(f"{status} of requests")


PASSING = [
    *(OSError(n, "") for n in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ECONNRESET)),
    *(TimeoutError(), TimeoutError(), ConnectionError("gone"), OSError("says a library")),
    *(HttpError(503), HttpError("429"), ClientError(500), HTTPError(502)),
    ServerDisconnectedError(),
    ValueError("UNAVAILABLE: CURL error"),
    ValueError("UNKNOWN: Error reading [OS error 5: EIO Input/output error]"),
]
LASTING = [
    *(OSError(n, "") for n in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EROFS)),
    *(FileNotFoundError("by a library"), PermissionError("no"), IsADirectoryError("is")),
    *(HttpError(404), HttpError(403), ClientError(404), HTTPError(404)),
    *(ValueError("NOT_FOUND: x"), KeyError("x"), UserError("no"), StorageError("given up")),
    ValueError("PERMISSION_DENIED: [OS error 13: EACCES Permission denied]"),
]


@pytest.mark.parametrize("error", [*PASSING, *LASTING], ids=repr)
def test_what_may_pass(error):
    assert is_transient(error) == (error in PASSING)


def test_what_is_denied():
    denied = [PermissionError("no"), OSError(errno.EPERM, ""), HttpError(401), ClientError(403)]
    assert all(is_denied(error) for error in [*denied, LASTING[-1]])
    assert not any(is_denied(error) for error in [*PASSING, HttpError(404), OSError(28, "")])


def failing(times: int, error=None):
    """Fails so often, then returns 7."""
    left = itertools.count(times, -1)

    def action():
        if next(left) > 0:
            raise error or OSError(errno.EIO, "Input/output error")
        return 7

    return action


def test_pauses_double_up_to_a_limit_and_are_in_part_random(monkeypatch):
    pauses, lines = quick(monkeypatch), []
    assert patiently(failing(6), "reading x", lines.append) == 7
    for pause, longest in zip(pauses, (1, 2, 4, 8, 15, 15), strict=True):
        assert longest / 2 <= pause <= longest
    assert len(set(pauses)) == 6
    assert lines[0] == (f"reading x failed (Input/output error); trying again in {pauses[0]:.1f} s")


def test_given_up_after_the_budget(monkeypatch):
    pauses, lines = quick(monkeypatch), []
    with pytest.raises(StorageError, match=r"x failed for 60 s \(Input/output error\); run"):
        patiently(failing(10**6), "reading x", lines.append)
    assert sum(pauses) == pytest.approx(storage.BUDGET_S)
    assert len(lines) == len(pauses) < 12
    assert (StorageError.status, UserError.status) == (75, 2)


def test_what_lasts_is_raised_at_once(monkeypatch):
    pauses = quick(monkeypatch)
    with pytest.raises(FileNotFoundError):
        patiently(failing(1, FileNotFoundError("x")), "reading x")
    assert pauses == []


def test_what_cannot_be_seen_is_not_absent(monkeypatch, tmp_path, capsys):
    """`Path.exists` says False of all of these."""
    path = epath.Path(tmp_path / "file")
    assert (exists(path), file_size(path), listing(path)) == (False, None, [])
    path.write_bytes(b"four")
    assert (exists(path), file_size(path), listing(path)) == (True, 4, [])
    quick(monkeypatch)
    install(monkeypatch, Faulty(lambda n, name: "before" if n < 2 else ""))
    assert exists(path)
    assert capsys.readouterr().err.count("trying again in") == 2
    install(monkeypatch, Faulty(lambda n, name: "before"))
    for look in (exists, file_size, listing):
        with pytest.raises(StorageError):
            look(path)


def test_a_run_is_not_begun_over_one_that_cannot_be_seen(monkeypatch, tmp_path, capsys):
    root = tmp_path / "run"
    with open_workdir(root, {"seed": 1}) as workdir:
        assert workdir.is_new
    before = (root / "config.json").read_bytes()
    quick(monkeypatch)
    install(monkeypatch, Faulty(lambda n, name: "before"))
    with pytest.raises(StorageError, match="run the same command again"):
        open_workdir(root, {"seed": 2})
    monkeypatch.undo()
    assert (root / "config.json").read_bytes() == before
    with open_workdir(root, {"seed": 1}) as workdir:
        assert not workdir.is_new
