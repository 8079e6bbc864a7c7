"""Two processes save and restore one state together, and agree on what is damaged."""

import socket
import subprocess
import sys

PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_num_cpu_devices", 2)
port, index, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from capjax.checkpoint import Checkpointer, RunInfo
from capjax.mesh import MeshShape, make_mesh

mesh = make_mesh(MeshShape(data=1, fsdp=4))
shardings = {"params": {"w": NamedSharding(mesh, P("fsdp"))}, "key": NamedSharding(mesh, P())}
make = jax.jit(
    lambda seed: {"params": {"w": jnp.arange(2.0**19) + seed}, "key": jax.random.key(seed)},
    out_shardings=shardings,
)
abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), make(0)
)

def restored(ours):
    step, state, extra = ours.restore_latest(abstract)
    for got, wanted in zip(*(x["params"]["w"].addressable_shards for x in (state, make(step)))):
        np.testing.assert_array_equal(got.data, wanted.data)
    assert extra == {"examples_seen": step}
    return step

ours = Checkpointer(directory, RunInfo(), report=lambda line: print("reported:", line))
for step in (1, 2):
    ours.save(step, make(step), {"examples_seen": step})
ours.wait()
print("restored", restored(ours))
if index == 0:  # bits of array data, in every file that may hold some: not all of them are read
    data = ours._directory / "00000002" / "state" / "ocdbt.process_0" / "d"
    sizes = {path: path.stat().length for path in data.iterdir()}
    for path in (path for path, size in sizes.items() if size > max(sizes.values()) / 2):
        content = bytearray(path.read_bytes())
        for quarter in (1, 2, 3):
            content[len(content) * quarter // 4] ^= 1
        path.write_bytes(content)
multihost_utils.sync_global_devices("damage is done")
print("restored", restored(ours))
ours.close()
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROCESS, str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path / "checkpoints")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    first, second = (
        # Gloo prints to the same stream, from several threads at once.
        [line for line in output.splitlines() if line.startswith(("restored", "reported"))]
        for output, _ in outputs
    )
    assert first[0] == "restored 2"
    assert "the checkpoint of step 2 is damaged (" in first[1]
    assert first[2:] == ["restored 1"]
    assert second == ["restored 2", "restored 1"]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["00000001", "00000002.damaged"]
