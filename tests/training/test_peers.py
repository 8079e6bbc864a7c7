"""Processes that meet, agree and part: here threads, each with its own end of real sockets."""

import contextlib
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from capjax.errors import RunAgain, UserError
from capjax.training.loop import Stopped
from capjax.training.meeting import _join, meet
from capjax.training.peers import Peers, Stop
from capjax.training.stopping import StopSignals, end_cleanly

ASKED = Stop("stopped by SIGTERM", 75)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Every `Peers` of a test; their sockets are closed after it."""
    monkeypatch.setattr("capjax.training.meeting._REUNION_S", 0.5)
    yield OPENED
    for peers in OPENED:
        peers._all_left.set()  # nobody is to be ended by what follows
    while OPENED:
        peers = OPENED.pop()
        for link in peers._links.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


OPENED: list[Peers] = []


def meeting(*who: tuple[int, int, dict], timeout_s: float = 20.0, heartbeat_s: float = 30.0):
    """Of each (number, how many, facts): what came of it, and how it was ended."""
    port, ends = free_port(), [[] for _ in who]

    def join(index: int):
        number, count, facts = who[index]
        try:
            return meet(
                f"127.0.0.1:{port}",
                count,
                number,
                facts,
                timeout_s=timeout_s,
                heartbeat_s=heartbeat_s,
                end=lambda line, status: ends[index].append((line, status)),
            )
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(who)) as pool:
        found = list(pool.map(join, range(len(who))))
    OPENED.extend(peers for peers in found if isinstance(peers, Peers))
    return found, ends


def eventually(is_so) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def alike(count: int) -> list[tuple[int, int, dict]]:
    return [(number, count, {"batch_size": "16"}) for number in range(count)]


def test_those_who_are_alike_meet_whoever_comes_first():
    found, _ = meeting(*reversed(alike(4)))
    assert [peers.process_id for peers in found] == [3, 2, 1, 0]
    assert all(peers.hosts == (socket.gethostname(),) * 4 for peers in found)


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ((1, 2, {"batch_size": "32"}), f"process 1 on {HOST} has batch_size=32, process 0 on"),
        ((1, 2, {"batch_size": "16", "x": "1"}), "has x=1, process 0 on"),
        ((1, 3, {"batch_size": "16"}), "as one of 3 processes, process 0"),
    ],
)
def test_another_fact_or_count_is_refused_by_name(second, words):
    found, _ = meeting((0, 2, {"batch_size": "16"}), second)
    assert found[0] == found[1]  # both say the same
    assert words in found[0]


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken, pytest.raises(UserError, match="is taken on"):
        meet(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, {}, timeout_s=1.0)


def test_a_number_taken_twice_is_refused_by_name():
    found, _ = meeting((0, 3, {}), (1, 3, {}), (1, 3, {}))
    assert len(set(found)) == 1
    assert "two processes have the number 1" in found[0]


def test_one_that_does_not_come_is_named_in_time():
    begin = time.monotonic()
    found, _ = meeting((0, 4, {}), (2, 4, {}), timeout_s=1.0)
    assert time.monotonic() - begin < 10
    assert found[0] == found[1]
    assert "2 of 4 processes did not come within 1 s: 1, 3;" in found[0]
    (alone,), _ = meeting((1, 2, {}), timeout_s=0.5)
    assert "process 0 does not answer at 127.0.0.1:" in alone
    assert "after 0.5 s (Connection refused)" in alone


def test_a_stranger_at_the_door_changes_nothing():
    port, found = free_port(), []
    server = threading.Thread(
        target=lambda: found.append(meet(f"127.0.0.1:{port}", 2, 0, {}, timeout_s=20.0))
    )
    server.start()
    for words in (b"GET / HTTP/1.1\r\n\r\n\n", b"[1]\n", b"{}\n"):
        link = None
        while link is None:
            with contextlib.suppress(OSError):
                link = socket.create_connection(("127.0.0.1", port))
        with link:
            link.sendall(words)
            assert link.recv(1) == b""  # hung up on
    other = meet(f"127.0.0.1:{port}", 2, 1, {}, timeout_s=20.0)
    server.join()
    OPENED.extend((*found, other))
    assert len(found[0].hosts) == len(other.hosts) == 2


def test_the_port_is_free_for_jax_once_all_are_there():
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        found = list(
            pool.map(lambda i: meet(f"127.0.0.1:{port}", 2, i, {}, timeout_s=20.0), range(2))
        )
    OPENED.extend(found)
    with socket.create_server(("127.0.0.1", port)):
        assert all(peers.stop_before(0) is None for peers in found)


@pytest.mark.parametrize("asker", [0, 2])
def test_all_stop_at_the_step_after_the_last_that_any_began(asker):
    found, ends = meeting(*alike(3))
    reached = {0: 5, 1: 7, 2: 4}
    for number, last in reached.items():
        for step in range(3, last + 1):
            assert found[number].stop_before(step) is None
    found[asker].want_stop(ASKED)
    eventually(lambda: all(peers.stop for peers in found))
    found[1].want_stop(Stop("too late", 130))
    for number, last in reached.items():
        answers = [found[number].stop_before(step) for step in range(last + 1, 10)]
        assert answers == [None] * (7 - last) + [ASKED] * 2
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(found[1].leave, 75)
        rest = pool.submit(found[2].leave, 75)
        time.sleep(0.1)  # process 0 still writes what they saved
        assert not first.done() and not rest.done()
        assert found[0].leave(75) and first.result() and rest.result()
    assert ends == [[], [], []]


def test_before_the_first_step_there_is_nothing_to_wait_for():
    found, ends = meeting(*alike(2))
    assert found[0].stop_before(12) is None  # it compiles, say; the other is not there yet
    found[1].want_stop(ASKED)
    eventually(lambda: all(ends))
    line = "stopped by SIGTERM before the first step; run the same command again"
    assert ends == [[(line, 75)]] * 2


def test_a_death_ends_the_others_and_a_goodbye_does_not():
    found, ends = meeting(*alike(4))
    found[1].leave(0)
    for number in (1, 2):  # as the kernel does for one that ended, or was killed
        found[number]._links[0].shutdown(socket.SHUT_RDWR)
    eventually(lambda: ends[3])
    assert ends[3] == [(f"error: process 2 on {HOST} has died; its own output says why", 1)]
    found[3]._links[0].shutdown(socket.SHUT_RDWR)  # for which process 0 waits a while
    eventually(lambda: ends[0])
    assert ends[0] == ends[3]


@pytest.mark.parametrize("hangs", [True, False])
def test_one_that_hangs_ends_all_and_the_others_say_where_they_are_first(hangs):
    found, ends = meeting(*alike(3))
    said = []
    for peers in found:
        peers.last_words = lambda peers=peers: said.append(peers.process_id)
    found[1].stop_now(Stop("nothing moved", 75), hangs=hangs)
    eventually(lambda: all(ends))
    assert ends == [[("nothing moved", 75)]] * 3
    assert set(said) >= {0, 2} if hangs else not said  # the word goes round: some are asked again


def test_one_that_is_silent_ends_the_others_by_name():
    port, ends, heard = free_port(), [], b""
    frozen = {"capjax": 2, "num_processes": 3, "host": "frozen", "facts": {}}

    def join(number: int) -> Peers:
        end = lambda line, status: ends.append((line, status))  # noqa: E731
        address = f"127.0.0.1:{port}"
        return meet(address, 3, number, {}, timeout_s=20.0, heartbeat_s=2.0, end=end)

    with ThreadPoolExecutor(3) as pool:
        others = pool.map(join, range(2))
        link, _ = pool.submit(_join, "127.0.0.1", port, frozen, 20.0).result()
        OPENED.extend(others)
    begin = time.monotonic()
    eventually(lambda: len(ends) == 2)
    assert time.monotonic() - begin > 1.5
    (line, status), other = ends
    assert line.startswith("error: process 2 on frozen has been silent for 2 s (")
    assert (line, status) == other == (line, 1)
    with link:
        while b"has been silent" not in heard:  # it is told too, for when it moves again
            heard += link.recv(1 << 16)


def test_a_failure_of_one_ends_the_others_with_its_words_and_status():
    found, ends = meeting(*alike(2), heartbeat_s=1.0)
    begin = time.monotonic()
    assert not found[1].leave(2, "no such disk")  # so it does not wait for JAX's goodbye
    assert time.monotonic() - begin < 20
    eventually(lambda: ends[0])
    assert ends[0] == [(f"error: process 1 on {HOST} failed: no such disk", 2)]


def test_a_failure_of_all_leaves_each_its_own_words():
    found, ends = meeting(*alike(3), heartbeat_s=4.0)
    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda peers: peers.leave(2, "each says why"), found))
    assert ends == [[], [], []]


def hear(number: int) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_stops_one_process_before_its_next_step(number, status):
    before = signal.getsignal(number)
    peers = Peers()
    with pytest.raises(RunAgain, match="the same command goes on") as stopped, StopSignals(peers):
        assert peers.stop_before(0) is None
        assert peers.stop_before(1) is None
        hear(number)
        hear(number)  # at once: a launcher that passes on what it got too
        eventually(lambda: peers.stop)
        assert peers.stop_before(1) is None  # asked twice a step
        raise Stopped(peers.stop_before(2).reason)
    assert stopped.value.status == status
    assert signal.getsignal(number) == before


def test_another_reason_to_stop_is_no_signal():
    with pytest.raises(Stopped, match="an alarm"), StopSignals(Peers()):
        raise Stopped("an alarm")


def test_a_second_signal_ends_at_once_whatever_the_main_thread_does(monkeypatch):
    monkeypatch.setattr("capjax.training.stopping._TWICE_S", 0.0)
    ends = []
    with StopSignals(peers := Peers(end=lambda line, status: ends.append((line, status)))):
        peers.stop_before(0)
        peers.stop_before(1)
        hear(signal.SIGUSR1)
        eventually(lambda: peers.stop)
        hear(signal.SIGTERM)  # Slurm: a warning, and then the time is up
        hear(signal.SIGTERM)
        eventually(lambda: ends)
    assert ends == [("stopped by SIGTERM, twice: ended at once", 75)]


def test_other_commands_close_what_is_open():
    before, closed, during = signal.getsignal(signal.SIGTERM), [], []
    with (
        pytest.raises(RunAgain, match="stopped by SIGTERM"),
        end_cleanly(),
        contextlib.ExitStack() as stack,
    ):
        stack.callback(closed.append, 1)
        stack.callback(lambda: during.append(signal.getsignal(signal.SIGTERM)))
        try:
            hear(signal.SIGTERM)
        except Exception:  # of a library that thinks it was its own
            closed.append("swallowed")
    assert closed == [1]
    assert during == [signal.SIG_DFL]  # the second ends it
    assert signal.getsignal(signal.SIGTERM) == before
