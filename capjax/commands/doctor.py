"""`capjax doctor`: what would keep a run from starting, from being fast, or from surviving."""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from capjax.errors import UserError

LEVELS = ("ok", "warn", "fix")
_WRITTEN_BYTES = 32 << 20
_CORE = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "array-record", "numpy")


class Finding(NamedTuple):
    """One line: how bad it is, and what it is or what to do."""

    level: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `capjax doctor`."""
    parser.add_argument(
        "--workdir",
        default=".",
        help="where runs will be written; its storage is looked at (default: here)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints a line for each check, on the first process; 1 where one is to be mended."""
    from capjax.commands import distributed, runtime
    from capjax.training.workdir import is_remote

    if not is_remote(args.workdir) and not Path(args.workdir).expanduser().is_dir():
        raise UserError(f"--workdir={args.workdir}: there is no such directory; make it first")
    begin = time.monotonic()
    runtime.start(args, alike={})
    import jax

    peers = distributed.peers()
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "devices": lambda: devices(time.monotonic() - begin),
        "collectives": collectives,
        "clocks": clocks,
        "storage": lambda: storage(args.workdir),
        "sharing": lambda: sharing(args.workdir),
        "versions": versions,
        "compile cache": lambda: compile_cache(args.compile_cache),
        "decoding": decoding,
        "preemption": lambda: preemption(peers),
    }
    worst = 0
    for name, check in checks.items():
        for finding in together(tried(check)):
            worst = max(worst, LEVELS.index(finding.level))
            if jax.process_index() == 0:
                print(f"{finding.level + ':':6}{name}: {finding.text}", flush=True)
    return int(worst == LEVELS.index("fix"))


def tried(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """What a check finds; an error in it is a finding too."""
    found = []
    try:
        found.extend(check())
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        found.append(Finding("fix", f"{type(error).__name__}: {line}"))
    return found


def together(mine: list[Finding]) -> list[Finding]:
    """Of all processes: what is well as the first says it, the rest with the numbers of whom."""
    import jax

    texts = everyones(json.dumps(mine))
    if len(texts) == 1:
        return mine
    said: dict[Finding, list[int]] = {}
    for number, text in enumerate(texts):
        for finding in json.loads(text):
            said.setdefault(Finding(*finding), []).append(number)
    whole = jax.process_count()
    return [
        finding
        if finding.level == "ok" or len(numbers) == whole
        else Finding(finding.level, f"process {', '.join(map(str, numbers))}: {finding.text}")
        for finding, numbers in said.items()
        if finding.level != "ok" or 0 in numbers
    ]


def everyones(text: str) -> list[str]:
    """The text of every process, at most 4,000 bytes of each."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode()[:4000].ljust(4000), np.uint8)
    gathered = np.asarray(multihost_utils.process_allgather(data))
    return [row.tobytes().decode().rstrip() for row in gathered]


def devices(start_s: float) -> Iterator[Finding]:
    """Which there are, and whether there are better ones that JAX cannot use."""
    import jax

    kinds = [device.device_kind for device in jax.local_devices()]
    shown = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    text = f"{shown} in each of {jax.process_count()} process(es), started in {start_s:.1f} s"
    if jax.default_backend() != "cpu":
        yield Finding("ok", text)
    elif list(Path("/dev").glob("nvidia[0-9]*")):
        yield Finding("fix", "an NVIDIA GPU is here and JAX uses none: pip install capjax[cuda]")
    elif list(Path("/dev").glob("accel[0-9]*")) or list(Path("/dev/vfio").glob("[0-9]*")):
        yield Finding("warn", "JAX uses the CPU; for the TPU here: pip install capjax[tpu]")
    else:
        yield Finding("ok", text)


def collectives() -> Iterator[Finding]:
    """Sums over all devices: whether they are right, and how fast."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from capjax.mesh import MeshShape, make_mesh

    count = jax.device_count()
    if count == 1:
        yield Finding("ok", "one device, none needed")
        return
    width = (1 << 20) if jax.default_backend() == "cpu" else (1 << 25)  # floats of a device
    mesh = make_mesh(MeshShape())
    rows = NamedSharding(mesh, P("data"))
    mine = np.repeat(
        np.array([[device.id % 128] for device in jax.local_devices()], np.float32), width, axis=1
    )
    numbers = jax.make_array_from_process_local_data(rows, mine)
    total = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=NamedSharding(mesh, P()))
    wanted = float(sum(device.id % 128 for device in jax.devices()))
    found = np.asarray(total(numbers).addressable_data(0))
    if not (found == wanted).all():
        wrong = int((found != wanted).sum())
        yield Finding("fix", f"{wrong} of {width} sums are wrong: test or replace this machine")
        return
    begin = time.monotonic()
    for _ in range(3):
        jax.block_until_ready(total(numbers))
    seconds = (time.monotonic() - begin) / 3
    rate = 4 * width * 2 * (count - 1) / count / seconds
    yield Finding(
        "ok",
        f"sums over {count} devices of {jax.process_count()} process(es) are right, "
        f"{rate / 1e9:.2f} GB/s through each device",
    )


def clocks() -> Iterator[Finding]:
    """How far they are apart; a barrier says when "now" is."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        yield Finding("ok", "one process")
        return
    apart = []
    for i in range(3):  # the best of three: what holds a process up looks like a late clock
        multihost_utils.sync_global_devices(f"clocks {i}")
        times = [float(text) for text in everyones(repr(time.time()))]
        apart.append(max(times) - min(times))
    if min(apart) > 2:
        yield Finding("fix", f"{min(apart):.1f} s apart: let every machine follow one time server")
    else:
        yield Finding("ok", f"at most {min(apart) * 1e3:.0f} ms apart")


def storage(workdir: str) -> Iterator[Finding]:
    """Write, read back, rename, free space: of process 0, which writes most."""
    import jax
    from etils import epath

    from capjax.training.workdir import is_remote

    root = epath.Path(workdir).expanduser()
    if jax.process_index() == 0:
        path, target = root / f".doctor-{os.getpid()}", root / f".doctor-{os.getpid()}.renamed"
        data = os.urandom(1 << 20) * (_WRITTEN_BYTES >> 20)
        try:
            begin = time.monotonic()
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                with contextlib.suppress(OSError, AttributeError):  # an object store has no disk
                    os.fsync(file.fileno())
            written = time.monotonic()
            if path.read_bytes() != data:
                yield Finding("fix", f"{root} returns other bytes than were written: do not use it")
            read = time.monotonic()
            path.rename(target)
            rates = [len(data) / 1e6 / max(s, 1e-9) for s in (written - begin, read - written)]
            text = f"{root} writes {rates[0]:.0f} MB/s, reads {rates[1]:.0f} MB/s"
            free = None if is_remote(workdir) else shutil.disk_usage(root).free / 1e9
            if free is None:
                yield Finding("ok", text)
            elif free < 1:
                yield Finding("fix", f"{root} has {free:.2f} GB free: make room for checkpoints")
            else:
                level = "ok" if free > 20 else "warn"
                yield Finding(level, f"{text}, {free:.0f} GB free")
        except OSError as error:
            reason = error.strerror or error
            yield Finding("fix", f"cannot write in {root} ({reason}): choose another --workdir")
        finally:
            for leftover in (path, target):
                with contextlib.suppress(OSError):
                    leftover.unlink(missing_ok=True)


def sharing(workdir: str) -> Iterator[Finding]:
    """Whether what process 0 writes is there for the others."""
    import jax
    from etils import epath

    if jax.process_count() == 1:
        yield Finding("ok", "one process")
        return
    root = epath.Path(workdir).expanduser()
    name = everyones(f".doctor-shared-{os.getpid()}")[0]
    with contextlib.suppress(OSError):
        if jax.process_index() == 0:
            (root / name).write_text("here")
    everyones("written")
    sees = (root / name).exists()
    everyones("seen")
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            (root / name).unlink(missing_ok=True)
    elif not sees:
        yield Finding("fix", f"{root} is not what process 0 has there: use storage that all share")
        return
    yield Finding("ok", f"all {jax.process_count()} processes see one {root}")


def versions() -> Iterator[Finding]:
    """Of the packages: against what capjax asks for, and, in a checkout, against what is tested."""
    from importlib import metadata

    from packaging.requirements import Requirement

    bad = []
    try:
        required = metadata.requires("capjax") or []
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        required = []
    for requirement in map(Requirement, required):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            bad.append(f"{requirement.name} {found}, needs {requirement.specifier or 'any'}")
    if bad:
        yield Finding("fix", f"{'; '.join(bad)}: pip install -U capjax")
        return
    have = {name: metadata.version(name) for name in _CORE}
    minor = "py311" if sys.version_info[:2] == (3, 11) else "py312"
    pins = Path(__file__).parents[2] / "constraints" / f"{minor}.txt"
    pinned = re.findall(r"^([\w.-]+)==(\S+)$", pins.read_text(), re.M) if pins.exists() else []
    tested = {name.lower().replace("_", "-"): version for name, version in pinned}
    other = [f"{n} {v} (tested {tested[n]})" for n, v in have.items() if tested.get(n, v) != v]
    if other:
        yield Finding("warn", f"{', '.join(other)}; for the tested ones: make core")
    else:
        yield Finding("ok", ", ".join(f"{name} {version}" for name, version in have.items()))


def compile_cache(flag: str | None) -> Iterator[Finding]:
    """Whether a program that was compiled is found again."""
    from capjax.commands import runtime

    directory = runtime.compile_cache(flag)
    if directory is None:
        yield Finding("warn", "off, every start compiles anew: give --compile_cache=DIR")
        return
    sizes = [entry.stat().st_size for entry in directory.glob("*-cache")]
    yield Finding("ok", f"{directory} holds {len(sizes)} programs, {sum(sizes) / 1e6:.0f} MB")


def decoding() -> Iterator[Finding]:
    """Photographs that one core decodes and resizes in a second."""
    import io

    import numpy as np
    from PIL import Image

    from capjax.data.images import ImagePreprocessing

    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    preprocess = ImagePreprocessing(image_size=224)
    count, begin = 0, time.process_time()  # of this core, not of what else runs on it
    while (seconds := time.process_time() - begin) < 0.5:
        preprocess.preprocess_bytes(buffer.getvalue())
        count += 1
    cores = os.cpu_count() or 1
    text = f"{count / seconds:.0f} JPEGs of 640 x 480 a second a core, {cores} cores"
    if importlib.util.find_spec("simplejpeg") is None:
        yield Finding("warn", f"{text}; a third more with pip install capjax[fast]")
    else:
        yield Finding("ok", text)


def preemption(peers: Any) -> Iterator[Finding]:
    """A real SIGTERM to one process; all must stop before the same step. It can be done once."""
    import jax

    from capjax.training.stopping import StopSignals

    with StopSignals(peers):
        begin, step, stop = time.monotonic(), 0, None
        while stop is None and time.monotonic() - begin < 20:
            stop = peers.stop_before(step)
            if step == 2 and jax.process_index() == jax.process_count() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            step += stop is None
            time.sleep(0.01)
    steps = set(everyones(str(step if stop else "never")))
    if len(steps) > 1 or "never" in steps:
        yield Finding("fix", f"after SIGTERM the processes stopped before steps {sorted(steps)}")
    else:
        processes = f"all {jax.process_count()} processes" if jax.process_count() > 1 else "the run"
        yield Finding("ok", f"SIGTERM to one process stops {processes} before the same step")
