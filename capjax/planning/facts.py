"""Everything that a plan says of a training step, as one dict: the JSON of `capjax plan`.

Keys (bytes, FLOPs and seconds; "device" is what JAX calls one: a chip, or half of a v4 or tpu7x):

    name, num_params, batch_size, accumulation_steps, total_steps, remat, flops_per_image,
      microbatch_unit   of the config
    topology, chip, num_chips, num_devices, mesh (axis -> size)
    is_estimate   true where nothing was compiled (GPUs)
    versions, compile_s   of the compiler, and how long it took
    memory        of one device: parameters, optimizer, average, batch, padding, temporaries, code
                  (0 the last three where the compiler refused); needed, available, fits
    flops         model_per_image, model_per_step; hardware_per_device has what is computed again
    bytes_moved   to and from the memory of one device in a step (0 for GPUs: not known)
    collectives   kind, axes, calls, traffic (bytes that leave one device) in a step
    time          compute_s, memory_s; has_networks; networks: axes, is_permute, is_slow, traffic,
                  bandwidth, seconds; of the bounds `overlapped` and `sequential`: step_s, mfu,
                  images_per_s, days, chip_hours
    advice        what to change, where it does not fit
    tries         of --search: every batch_size compiled, and the bytes it needs; with it
                  largest_batch (that fits, 0 if none), too_large_batch (the least that does not, or
                  null) and largest_batch_in_words
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from capjax.objectives.cross_entropy import NUM_CHUNKS
from capjax.planning import estimate, fit, hlo
from capjax.planning.flops import count_flops
from capjax.planning.memory_traffic import bytes_moved
from capjax.planning.roofline import Roofline, roofline, totals
from capjax.planning.topology import Topology

Doing = Callable[[str], AbstractContextManager[None]]  # announces what takes a while


class Run(NamedTuple):
    """What the facts need of a config. `microbatch_unit` divides the rows of every microbatch."""

    name: str
    num_params: int
    batch_size: int
    accumulation_steps: int
    total_steps: int
    remat: str
    flops_per_image: float
    microbatch_unit: int


def step_facts(
    run: Run, traced: Any, state: Any, batch: Any, *, topology: Topology, mesh: Mesh, doing: Doing
) -> dict[str, Any]:
    """The facts of a traced step (`jitted.trace(state, batch)`); compiles it where it can be."""
    found: list[hlo.Collective] | None = None
    moved = 0.0
    about: dict[str, Any] = {"versions": {"jax": jax.__version__}}
    memory = estimate.argument_memory(state, batch)
    if topology.is_tpu:
        kind = mesh.devices.flat[0].device_kind
        begin = time.monotonic()
        with doing(f"compiling batch {run.batch_size:,} for {mesh.size} x {kind}"):
            compiled, needed = _compile(traced, mesh, memory.peak)
        about["compile_s"] = time.monotonic() - begin
        about["versions"]["libtpu"] = _libtpu_version()
        if compiled is not None:
            memory = estimate.compiled_memory(compiled, state, batch)
            needed = memory.peak
            text = compiled.as_text()
            found = hlo.collectives(text, dict(mesh.shape), NUM_CHUNKS)
            moved = bytes_moved(text, NUM_CHUNKS)
    else:
        memory = estimate.estimated_memory(traced.jaxpr, state, batch)
        needed = memory.peak
    available = topology.device_memory(mesh.size)
    is_too_much = needed > available
    return {
        **run._asdict(),
        "topology": str(topology),
        "chip": topology.chip.name,
        "num_chips": topology.num_chips,
        "num_devices": mesh.size,
        "mesh": dict(mesh.shape),
        "is_estimate": not topology.is_tpu,
        **about,
        "memory": memory._asdict()
        | {"needed": needed, "available": available, "fits": not is_too_much},
        **_speed_facts(run, traced, topology, mesh, found, moved),
        "advice": _advice(run, memory, needed, available, mesh) if is_too_much else [],
    }


def _advice(
    run: Run, memory: estimate.Memory, needed: int, available: int, mesh: Mesh
) -> list[str]:
    return fit.advice(
        needed=needed,
        available=available,
        state=memory.state,
        gradients=memory.parameters,
        batch_size=run.batch_size,
        accumulation_steps=run.accumulation_steps,
        unit=run.microbatch_unit,
        fsdp=mesh.shape["fsdp"],
        num_copies=mesh.shape["replica"] * mesh.shape["data"],
        remat=run.remat,
    )


def _speed_facts(
    run: Run,
    traced: Any,
    topology: Topology,
    mesh: Mesh,
    found: list[hlo.Collective] | None,
    moved: float,
) -> dict[str, Any]:
    hardware = count_flops(traced.jaxpr, unknown_trips=NUM_CHUNKS)
    model = run.flops_per_image * run.batch_size
    times = roofline(
        topology,
        mesh,
        hardware_flops=hardware,
        model_flops=model,
        bytes_moved=moved,
        collectives=found or [],
    )
    return {
        "flops": {
            "model_per_image": run.flops_per_image,
            "model_per_step": model,
            "hardware_per_device": hardware,
        },
        "bytes_moved": moved,
        "collectives": totals(found or []),
        "time": _time_facts(times, run, topology) | {"has_networks": found is not None},
    }


def _compile(traced: Any, mesh: Mesh, arguments: int) -> tuple[Any, int]:
    """(the compiled step, 0), or (None, the bytes of a device that it would need).

    `arguments` are the bytes of what the step is given.
    """
    with jax.set_mesh(mesh):
        lowered = traced.lower()
        try:
            return lowered.compile(), 0
        except jax.errors.JaxRuntimeError as error:
            needed = estimate.bytes_wanted(str(error), arguments)
            if needed is None:
                raise
            return None, needed


def _time_facts(times: Roofline, run: Run, topology: Topology) -> dict[str, Any]:
    bounds = {}
    for name, step_s in (("overlapped", times.overlapped), ("sequential", times.sequential)):
        hours = step_s * run.total_steps / 3600
        bounds[name] = {
            "step_s": step_s,
            "mfu": times.ideal / step_s,
            "images_per_s": run.batch_size / step_s,
            "days": hours / 24,
            "chip_hours": hours * topology.num_chips,
        }
    networks = [x._asdict() | {"seconds": x.seconds} for x in times.networks]
    return {"compute_s": times.compute, "memory_s": times.memory, "networks": networks, **bounds}


def _libtpu_version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # a nightly build has another name
        return "unknown"
