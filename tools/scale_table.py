r"""The tables of docs/scale.md: `capjax plan` at the scale of the papers, on machines not here.

python tools/scale_table.py --outputs=DIR [--only=NAME]   # compiles; an output that is there stays
python tools/scale_table.py --outputs=DIR --docs=docs/scale.md   # writes the tables

Needs capjax[plan]. A compile takes one to four minutes on two cores.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PLANS = {
    "l14_v5e": "cappa_l14 --topology=v5e:8x8 --config.mesh.data=8 --config.model.remat=full",
    "l14_v5p": "cappa_l14 --topology=v5p:4x4x4 --config.mesh.data=4",
    "siglip_v5e": "siglip_b16 --config.model.remat=full --topology=v5e:8x8 --config.mesh.data=8",
    "g14_v5p": "cappa_g14 --topology=v5p:4x4x8 --config.mesh.data=8 --config.model.remat=dots",
}
LOSS = "sigmoid_1m_v5p"
LOSS_BATCH, LOSS_WIDTH, LOSS_TOPOLOGY = 2**20, 768, "v5p:8x8x8"


def main() -> None:
    """Runs the plans, or writes the tables of those that were run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outputs", type=Path, required=True)
    parser.add_argument("--only", choices=[*PLANS, LOSS])
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    if args.docs:
        write_tables(args.docs, args.outputs)
        return
    args.outputs.mkdir(parents=True, exist_ok=True)
    for name in [args.only] if args.only else [*PLANS, LOSS]:
        output = args.outputs / f"{name}.json"
        if output.exists():
            continue
        if name == LOSS:
            output.write_text(json.dumps(plan_loss(), indent=2) + "\n")
        else:
            command = f"plan --config={PLANS[name]} --output={output}"
            subprocess.run([sys.executable, "-m", "capjax.cli", *command.split()], check=False)


def plan_loss() -> dict[str, Any]:
    """Value and gradients of the chunked sigmoid loss alone, its embeddings over all chips."""
    from capjax.planning.topology import parse_topology, prepare, tpu_devices

    topology = parse_topology(LOSS_TOPOLOGY)
    prepare(topology)
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from capjax.mesh import BATCH, MeshShape, make_mesh
    from capjax.objectives.contrastive import ContrastiveObjective, contrastive_loss
    from capjax.planning import hlo
    from capjax.planning.flops import count_flops
    from capjax.planning.memory_traffic import bytes_moved
    from capjax.planning.roofline import roofline

    mesh = make_mesh(MeshShape(data=1, fsdp=-1), tpu_devices(topology))
    objective = ContrastiveObjective(weight=1.0, kind="sigmoid")

    def loss(image_BD, text_BKD, scale, bias):
        return contrastive_loss(objective, image_BD, text_BKD, scale, bias)[0]

    def rows(*shape):
        spec = P(BATCH, *(None,) * (len(shape) - 1))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P()))
    inputs = rows(LOSS_BATCH, LOSS_WIDTH), rows(LOSS_BATCH, 1, LOSS_WIDTH), scalar, scalar
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).trace(*inputs)
        compiled = traced.lower().compile()
    stats: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    times = roofline(
        topology,
        mesh,
        hardware_flops=count_flops(traced.jaxpr, 0),
        model_flops=3 * 2.0 * LOSS_BATCH**2 * LOSS_WIDTH,
        bytes_moved=bytes_moved(text, 0),
        collectives=hlo.collectives(text, dict(mesh.shape), 0),
    )
    return {
        "compile_s": time.monotonic() - begin,
        "embeddings": 2 * LOSS_BATCH * LOSS_WIDTH * 4 // mesh.size,
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
        "compute_s": times.compute,
        "memory_s": times.memory,
        "network_s": sum(network.seconds for network in times.networks),
    }


def write_tables(docs: Path, outputs: Path) -> None:
    """Replaces what stands between the marks in `docs`."""
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->"
    before, _, rest = docs.read_text().partition(begin)
    after = rest.partition(end)[2]
    plans = {name: json.loads(path.read_text()) for name in PLANS if (path := _file(outputs, name))}
    loss = _file(outputs, LOSS)
    parts = [_memory_table(plans), _time_table(plans)]
    if loss:
        parts.append(_loss_table(json.loads(loss.read_text())))
    docs.write_text(before + begin + "\n\n".join(parts) + "\n\n" + end + after)


def _file(outputs: Path, name: str) -> Path | None:
    path = outputs / f"{name}.json"
    return path if path.exists() else None


def _memory_table(plans: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| `capjax plan --config=` | batch | parameters + optimizer | activations, temporaries "
        "| all, of what there is | compiled in |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in plans.items():
        memory = facts["memory"]
        verdict = "" if memory["fits"] else ": **does not fit**"
        rows.append(
            f"| `{PLANS[name]}` | {facts['batch_size']:,} "
            f"| {(memory['parameters'] + memory['optimizer']) / 2**20:,.0f} MiB "
            f"| {_gib(memory['temporaries'])} "
            f"| {_gib(memory['needed'])} of {_gib(memory['available'])}{verdict} "
            f"| {facts['compile_s']:.0f} s |"
        )
    return "\n".join(rows)


def _time_table(plans: dict[str, dict[str, Any]]) -> str:
    rows = [
        "| plan | products computed / model's | products at the peak | memory | network | step: "
        "overlapped, not | MFU: overlapped, not | chip-hours: overlapped, not |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts in plans.items():
        times, flops = facts["time"], facts["flops"]
        low, high = times["overlapped"], times["sequential"]
        ideal = flops["model_per_step"] / facts["num_devices"]
        network = sum(x["seconds"] for x in times["networks"])
        rows.append(
            f"| {name} | {flops['hardware_per_device'] / ideal:.2f} "
            f"| {times['compute_s'] * 1e3:,.0f} ms | {times['memory_s'] * 1e3:,.0f} ms "
            f"| {network * 1e3:,.0f} ms "
            f"| {low['step_s'] * 1e3:,.0f}, {high['step_s'] * 1e3:,.0f} ms "
            f"| {low['mfu']:.1%}, {high['mfu']:.1%} "
            f"| {low['chip_hours']:,.0f}, {high['chip_hours']:,.0f} |"
        )
    return "\n".join(rows)


def _loss_table(loss: dict[str, Any]) -> str:
    return "\n".join(
        [
            f"| chunked sigmoid loss, value and gradients, batch {LOSS_BATCH:,}, width "
            f"{LOSS_WIDTH}, {LOSS_TOPOLOGY} | a chip |",
            "|---|---|",
            f"| embeddings (float32) | {loss['embeddings'] / 2**20:,.1f} MiB |",
            f"| arguments and results | {(loss['arguments'] + loss['results']) / 2**20:,.1f} MiB |",
            f"| temporaries | {loss['temporaries'] / 2**20:,.1f} MiB |",
            f"| products at the peak | {loss['compute_s'] * 1e3:,.1f} ms |",
            f"| memory | {loss['memory_s'] * 1e3:,.1f} ms |",
            f"| network | {loss['network_s'] * 1e3:,.1f} ms |",
            f"| compiled in | {loss['compile_s']:.0f} s |",
        ]
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
