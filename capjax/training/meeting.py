"""How the processes of a run meet before JAX starts, each of them as the others expect.

Process 0 listens at the coordinator's address until all are there and alike; then that port is
JAX's, while the connections stay (`capjax.training.peers`). JAX alone would wait for a process that
is missing, and take one that trains on something else.
"""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from capjax.errors import UserError
from capjax.training.peers import Peers

_MAX_LINE = 1 << 22
_REUNION_S = 3.0  # once something is wrong, how long others may still come to hear it


def meet(
    address: str,
    num_processes: int,
    process_id: int,
    facts: Mapping[str, Any],
    *,
    timeout_s: float,
    heartbeat_s: float = 30.0,
    end: Callable[[str, int], None] | None = None,
) -> Peers:
    """Joins the processes of a run at `address` (HOST:PORT, of process 0).

    `facts` (JSON values) must be alike in all. Raises `UserError`, in all of them, where one does
    not come in time, has another fact or another `num_processes`, or the number of another.
    """
    host, _, port = address.rpartition(":")
    hello = {
        "capjax": process_id,
        "num_processes": num_processes,
        "host": socket.gethostname(),
        "facts": dict(facts),
    }
    if process_id == 0:
        links, verdict = _gather(int(port), hello, timeout_s)
        for link in links:
            with contextlib.suppress(OSError):
                link.sendall(json.dumps(verdict).encode() + b"\n")
        by_id = dict(enumerate(links, 1))
    else:
        link, verdict = _join(host.strip("[]"), int(port), hello, timeout_s)
        by_id = {0: link}
    if "refused" in verdict:
        for link in by_id.values():
            link.close()
        raise UserError(verdict["refused"])
    for link in by_id.values():
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Peers(process_id, tuple(verdict["hosts"]), by_id, heartbeat_s, end)


def _gather(
    port: int, mine: dict[str, Any], timeout_s: float
) -> tuple[list[socket.socket], dict[str, Any]]:
    """On process 0: the connections, by number where all is well, and what all are to be told."""
    deadline, count = time.monotonic() + timeout_s, mine["num_processes"]
    hellos, links, strangers, objection = {0: mine}, {}, [], ""
    with _listen(port) as listener:
        while len(hellos) < count and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                link, _ = listener.accept()
            except TimeoutError:
                break
            hello = _line_from(link, 5.0)
            if hello is None or "capjax" not in hello:  # no process of ours
                link.close()
                continue
            if found := _objection(hello, hellos):
                objection = objection or found
                deadline = min(deadline, time.monotonic() + _REUNION_S)
            if hello["capjax"] in hellos or hello["num_processes"] != count:
                strangers.append(link)
                continue
            hellos[hello["capjax"]], links[hello["capjax"]] = hello, link
    if not objection and len(hellos) < count:
        objection = _missing(hellos, count, timeout_s)
    if objection:
        return [*links.values(), *strangers], {"refused": objection}
    hosts = [hellos[number]["host"] for number in range(count)]
    return [links[number] for number in range(1, count)], {"hosts": hosts}


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of the coordinator is taken on {socket.gethostname()} "
            f"({error.strerror or error}): end what listens there, or choose another port with "
            "--coordinator=HOST:PORT or JAX_COORDINATOR_PORT"
        ) from error


def _objection(hello: dict[str, Any], hellos: Mapping[int, dict[str, Any]]) -> str:
    """What is wrong with a process that came; "" where nothing is."""
    mine, number = hellos[0], hello["capjax"]
    his, ours = f"process {number} on {hello['host']}", f"process 0 on {mine['host']}"
    if hello["num_processes"] != mine["num_processes"]:
        return (
            f"{his} was started as one of {hello['num_processes']} processes, {ours} as one of "
            f"{mine['num_processes']}; give all the same --num_processes"
        )
    if number in hellos:
        return (
            f"two processes have the number {number}, on {hellos[number]['host']} and on "
            f"{hello['host']}; give each a --process_id of its own"
        )
    for name in sorted(mine["facts"] | hello["facts"]):
        here, there = mine["facts"].get(name), hello["facts"].get(name)
        if here != there:
            return (
                f"{his} has {name}={there}, {ours} has {name}={here}; start all with the same "
                "command, configuration, devices and version of capjax"
            )
    return ""


def _missing(hellos: Mapping[int, dict[str, Any]], count: int, timeout_s: float) -> str:
    missing = [number for number in range(count) if number not in hellos]
    shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{len(missing)} of {count} processes did not come within {timeout_s:g} s: {shown}; see "
        "what became of them, raise --initialization_timeout, or run this one alone with "
        "--num_processes=1"
    )


def _join(
    host: str, port: int, hello: dict[str, Any], timeout_s: float
) -> tuple[socket.socket, dict[str, Any]]:
    """Elsewhere: the connection to process 0, and what it says once all are there."""
    deadline = time.monotonic() + timeout_s
    while True:
        reason: object = "it closed the connection"
        try:
            link = socket.create_connection((host, port), timeout=min(timeout_s, 10.0))
            link.sendall(json.dumps(hello).encode() + b"\n")
            # Process 0 may have come later than this one, and then waits for longer.
            verdict = _line_from(link, max(deadline - time.monotonic(), 0) + timeout_s)
            if verdict is not None and verdict.keys() & {"hosts", "refused"}:
                return link, verdict
            link.close()
        except OSError as error:
            reason = error.strerror or error
        if time.monotonic() >= deadline:
            raise UserError(
                f"process 0 does not answer at {host}:{port} after {timeout_s:g} s ({reason}): see "
                "whether it runs and whether that name and port reach it, raise "
                "--initialization_timeout, or run this one alone with --num_processes=1"
            )
        time.sleep(0.2)


def _line_from(link: socket.socket, timeout_s: float) -> dict[str, Any] | None:
    """The object of one line; None where something else comes, or nothing."""
    deadline, buffer = time.monotonic() + timeout_s, b""
    try:
        while not buffer.endswith(b"\n") and len(buffer) < _MAX_LINE:
            link.settimeout(max(deadline - time.monotonic(), 0.001))
            data = link.recv(1 << 16)
            if not data:
                return None
            buffer += data
        message = json.loads(buffer)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
