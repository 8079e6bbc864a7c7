"""The collectives of compiled training steps, against golden files: what a change adds is seen.

TPU programs are compiled without a TPU, where the libtpu is installed that made the golden file.
To accept a change: `python -m tests.planning.test_collectives` writes the files anew, those of TPUs
only where there is a libtpu (pip install 'capjax[plan]').
"""

import importlib.metadata
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "collectives"
# What a machine without TPUs must say for libtpu to compile on it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Shallow, so that a compile takes seconds; the scanned layers' collectives are those of any depth.
SMALL = (
    "batch_size=256",
    "preprocessing.image_size=64",
    "data.text_length=32",
    "model.variant=S/16",
    "model.depth=3",
)
CAPPA = ("cappa_s16", (*SMALL, "model.decoder_depth=2"))
SIGLIP = ("siglip_b16", (*SMALL, "model.text_variant=S", "model.text_depth=3"))


class Case(NamedTuple):
    """A config with overrides, compiled for a topology ("": eight CPU devices) over a mesh."""

    config: tuple[str, tuple[str, ...]]
    topology: str
    mesh: dict[str, int]


CASES = {
    "cpu_fsdp4_tensor2_cappa": Case(CAPPA, "", {"fsdp": 4, "tensor": 2}),
    "v5e_data2_fsdp8_siglip": Case(SIGLIP, "v5e:4x4", {"data": 2, "fsdp": 8}),
    "v5p_fsdp8_tensor2_cappa": Case(CAPPA, "v5p:2x2x4", {"fsdp": 8, "tensor": 2}),
    "two_v5e_replica2_fsdp16_cappa": Case(CAPPA, "2*v5e:4x4", {"replica": 2, "fsdp": 16}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_collectives_are_the_golden_ones(name):
    want = (GOLDEN / f"{name}.txt").read_text()
    made_with = want.splitlines()[0]
    if made_with != versions(CASES[name]):
        pytest.skip(f"the golden file is of {made_with}, installed are {versions(CASES[name])}")
    assert text_of(name) == want


def versions(case: Case) -> str:
    """What decides on the compiled program, besides our code."""
    packages = ("jax", "libtpu") if case.topology else ("jax", "jaxlib")
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def text_of(name: str) -> str:
    """The golden file's text, made in a process of its own: libtpu is none to share."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | ENVIRONMENT
    command = [sys.executable, "-m", "tests.planning.test_collectives", name]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compiled_text(case: Case) -> str:
    """A line for each array that is exchanged: kind, mesh axes, shape, and times in a step."""
    import jax

    from capjax.commands import settings
    from capjax.commands.program import build_program
    from capjax.mesh import MeshShape, make_mesh
    from capjax.objectives.cross_entropy import NUM_CHUNKS
    from capjax.planning.hlo import collectives

    if case.topology:
        from capjax.planning.topology import parse_topology, planned_devices

        devices = planned_devices(parse_topology(case.topology))
    else:
        jax.config.update("jax_num_cpu_devices", 8)
        devices = jax.devices()
    mesh = make_mesh(MeshShape(**({"data": 1} | case.mesh)), devices)
    program = build_program(
        settings.load_config(*case.config), mesh, vocab_size=8_000, num_examples=10**9
    )
    with jax.set_mesh(mesh):
        compiled = program.train_step.lower(*program.abstract_inputs()).compile()
    found = collectives(compiled.as_text(), mesh.shape, NUM_CHUNKS)
    calls: Counter[str] = Counter()
    traffic: Counter[str] = Counter()
    for one in found:
        what = f"{one.kind} {'+'.join(one.axes)}"
        traffic[what] += one.traffic
        for shape in one.shapes:
            calls[f"{what} {shape}"] += one.calls
    lines = [versions(case), f"{case.config[0]} on {case.topology or 'cpu'} {case.mesh}", ""]
    lines += [f"{what} x{times}" for what, times in sorted(calls.items())]
    lines += ["", "MB that leave a device in a step:"]
    lines += [f"{what} {size / 1e6:.1f}" for what, size in sorted(traffic.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1:]:
        print(compiled_text(CASES[sys.argv[1]]), end="")
    else:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for case_name, each in CASES.items():
            if "no libtpu" in versions(each):
                print(f"{case_name}: left as it is, for want of libtpu")
            else:
                (GOLDEN / f"{case_name}.txt").write_text(text_of(case_name))
                print(case_name)
