"""Several processes as one program: who they are, whether all are there, and how they part.

Where they were started tells which: Slurm, Cloud TPU machines, GKE and other Kubernetes jobs, and
Open MPI are found as `jax.distributed.initialize` finds them, by JAX's own code. Flags win, then
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A single task is alone.
"""

import argparse
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import capjax
from capjax.data.processes import ignore_signals
from capjax.errors import UserError
from capjax.training.peers import Peers

# What may differ between the processes of one program.
_OWN = ("process_id", "coordinator", "compile_cache", "verbose")
_peers = Peers()


class Place(NamedTuple):
    """Where a process stands among those of its program."""

    coordinator: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None  # None: all that it sees


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `find_place` and `connect` read."""
    group = parser.add_argument_group(
        "several processes (the same command in each; Slurm, TPU machines, GKE and Open MPI are "
        "recognised)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument(
        "--num_processes", type=int, metavar="N", help="1: alone, whatever is recognised"
    )
    group.add_argument("--process_id", type=int, metavar="I", help="this one: 0 to N - 1")
    group.add_argument(
        "--initialization_timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="seconds that the processes wait for one another at the start (default 300)",
    )
    group.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=30,
        metavar="S",
        help="seconds after which a process that is silent counts as dead (default 30)",
    )


def find_place(args: argparse.Namespace, together: bool) -> Place | None:
    """Where this process stands; None where it is alone. Raises `UserError` for half an answer.

    `together`: the command is run by all processes as one, so that what they were started by is
    looked at; otherwise only the flags are.
    """
    for name, least in (("initialization_timeout", 0.1), ("heartbeat_timeout", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}={getattr(args, name)}: expected at least {least}")
    address, count, number = args.coordinator, args.num_processes, args.process_id
    if count == 1 or (not together and (address, count, number) == (None, None, None)):
        return None
    if together:
        address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
        count = _number("JAX_NUM_PROCESSES") if count is None else count
        number = _number("JAX_PROCESS_ID") if number is None else number
    local = None
    if None in (address, count, number) and (cluster := _detect()) is not None:
        address, count, number, local = _completed(cluster, args, (address, count, number))
    if count == 1 or (address, count, number) == (None, None, None):
        return None
    if address is None or count is None or number is None or not 0 <= number < count:
        raise UserError(
            f"--coordinator={address} --num_processes={count} --process_id={number}: give all "
            "three, the id from 0 to the number less 1, or --num_processes=1 alone"
        )
    port = re.fullmatch(r".+:(\d{1,5})", address)
    if port is None or not 0 < int(port[1]) < 1 << 16:
        raise UserError(f"--coordinator={address}: expected HOST:PORT, such as node001:8476")
    return Place(address, count, number, local)


def _number(variable: str) -> int | None:
    text = os.environ.get(variable)
    if text is not None and not text.isdecimal():
        raise UserError(f"{variable}={text}: expected a number")
    return None if text is None else int(text)


def _detect() -> Any | None:
    """The class of JAX that describes what started this process; None where it is a single task."""
    # Not public; what is, `initialize()`, tells neither how many processes it is about to wait for
    # nor which, and takes the shell of an allocation for a task of it.
    from jax._src.clusters import ClusterEnv

    environ = os.environ
    alone = {
        "ompi": environ.get("OMPI_COMM_WORLD_SIZE") == "1",
        "slurm": environ.get("SLURM_STEP_NUM_TASKS", "1") == "1",
    }
    for cluster in ClusterEnv._cluster_types:
        if alone.get(cluster.name) or cluster.opt_in_only_method:
            continue
        if cluster.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in environ:
            continue  # no indexed job: a notebook, say
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that only that kind of cluster needs
            try:
                if cluster.is_env_present():
                    return cluster
            except Exception as error:
                raise _unplaced(cluster, error) from error
    for variable in ("OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX"):
        if environ.get(variable, "0") != "0" and "JAX_NUM_PROCESSES" not in environ:
            raise UserError(
                f"{variable}={environ[variable]}: one of several processes, but neither how many "
                "nor where the first one is can be known; set JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID (docs/launch.md), or --num_processes=1"
            )
    return None


def _completed(cluster: Any, args: argparse.Namespace, given: tuple) -> tuple:
    """Address, count, number and devices: those given, the rest as the cluster has them."""
    address, count, number = given
    try:
        count = cluster.get_process_count() if count is None else count
        number = cluster.get_process_id() if number is None else number
        if count > 1 and address is None:
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(
                timeout_secs=int(args.initialization_timeout) or 1, override_coordinator_port=port
            )
        local = _local_devices(cluster)
    except Exception as error:
        raise _unplaced(cluster, error) from error
    return address, count, number, local


def _unplaced(cluster: Any, error: Exception) -> UserError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"{cluster.__name__.removesuffix('Cluster')} seems to have started this process, but does "
        f"not tell its place ({reason[0]}); give --coordinator, --num_processes and --process_id, "
        "or --num_processes=1 alone"
    )


def _local_devices(cluster: Any) -> list[int] | None:
    """The GPUs of this process: with several tasks on a machine one each, as JAX has it.

    A task that is alone on its machine has them all, and one to which the scheduler has bound some
    has those.
    """
    environ = os.environ
    number = cluster.get_local_process_id()
    of_slurm = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    is_alone = (
        re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", of_slurm) is not None
        if cluster.name == "slurm"
        else environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    is_bound = "SLURM_GPUS_PER_TASK" in environ or (visible and "," not in visible)
    return None if number is None or is_alone or is_bound else [number]


def connect(place: Place, args: argparse.Namespace, alike: Mapping[str, Any]) -> None:
    """Meets the other processes, then starts JAX's service. Raises `UserError` in all of them.

    `alike`: what must be the same in all, besides the flags and the versions.
    """
    from capjax.training.meeting import meet

    begin = time.monotonic()
    flags = {name: value for name, value in vars(args).items() if name not in _OWN}
    global _peers
    _peers = meet(
        place.coordinator,
        place.num_processes,
        place.process_id,
        _text_values(_versions() | {"GPUs": _num_gpus(place, args)} | flags | dict(alike)),
        timeout_s=args.initialization_timeout,
        heartbeat_s=float(args.heartbeat_timeout),
    )
    import jax

    # It would swallow SIGTERM. Ours is agreed upon by `Peers`, of every command and every signal.
    jax.config.update("jax_enable_preemption_service", False)
    left = args.initialization_timeout - (time.monotonic() - begin)
    jax.distributed.initialize(
        coordinator_address=place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=place.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(left), 30),
        heartbeat_timeout_seconds=args.heartbeat_timeout,
    )


def _text_values(facts: Mapping[str, Any]) -> dict[str, str]:
    """As they go through JSON, and as a refusal shows them."""
    return {name: str(value) for name, value in facts.items()}


def _versions() -> dict[str, str]:
    """Of this code, by its bytes too, and of JAX."""
    import hashlib
    from importlib.metadata import version

    digest = hashlib.sha256()
    root = Path(capjax.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    code = f"{capjax.__version__} (code {digest.hexdigest()[:8]})"
    return {"capjax": code} | {f"version of {name}": version(name) for name in ("jax", "jaxlib")}


def _num_gpus(place: Place, args: argparse.Namespace) -> int:
    """NVIDIA's that this process will take; a missing driver is known before JAX waits for it."""
    if "cpu" in (args.platform, os.environ.get("JAX_PLATFORMS")):
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if place.local_device_ids is not None:
        return len(place.local_device_ids)
    if visible is not None:
        return len(list(filter(None, visible.split(","))))
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def check_devices() -> None:
    """Prints on process 0 which process has which devices. Raises `UserError` where they differ."""
    import jax

    if jax.process_count() == 1:
        return
    kinds: dict[int, list[str]] = {}
    for device in jax.devices():
        kinds.setdefault(device.process_index, []).append(device.device_kind)
    rows = [(i, _peers.hosts[i], kinds.get(i, [])) for i in range(jax.process_count())]
    for number, host, found in rows:
        if sorted(found) != sorted(rows[0][2]):
            raise UserError(
                f"process {number} on {host} has {_devices(found)}, process 0 on {rows[0][1]} has "
                f"{_devices(rows[0][2])}; give all the same devices"
            )
    if jax.process_index() == 0:
        for number, host, found in rows:
            print(f"process {number} on {host}: {_devices(found)}", file=sys.stderr, flush=True)


def _devices(kinds: list[str]) -> str:
    counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items()) or "no devices"


def peers() -> Peers:
    """The processes of this program; a new one alone where there are no others."""
    return _peers if len(_peers.hosts) > 1 else Peers()


def wait_for_death() -> None:
    """Called upon an error that the end of another process may have caused: lets that be said."""
    if len(_peers.hosts) > 1:
        time.sleep(1.0)


def leave(status: int, line: str = "") -> None:
    """Called by `cli` at the end. Does not return where this process failed and others go on."""
    if _peers.stop and len(_peers.hosts) > 1:
        ignore_signals()  # it ends already; another SIGTERM would change its status
    if not _peers.leave(status, line):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # JAX would wait for the others, and they for this one
