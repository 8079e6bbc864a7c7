"""The facts of a plan as text, 100 columns wide at most."""

from collections.abc import Mapping
from typing import Any

from capjax.planning.fit import gib

_PARTS = {
    "parameters": "parameters",
    "optimizer": "optimizer state",
    "average": "average of parameters",
    "batch": "batch",
    "padding": "padding of those",
    "temporaries": "activations and other temporaries",
    "code": "program",
}


def render(facts: Mapping[str, Any]) -> str:
    """The table, which names what is exact, what is a bound and what is an estimate."""
    parts = [_heading(facts), _memory(facts), _work(facts), _traffic(facts), _time(facts)]
    if "tries" in facts:
        parts.append(_tries(facts))
    if facts["advice"]:
        parts.append(_lines("it does not fit; change", facts["advice"]))
    return "\n\n".join(part for part in parts if part)


def _heading(facts: Mapping[str, Any]) -> str:
    mesh = " x ".join(f"{axis}={size}" for axis, size in facts["mesh"].items() if size > 1)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    how = (
        "estimated from the traced program, nothing compiled"
        if facts["is_estimate"]
        else f"compiled in {facts['compile_s']:.0f} s"
    )
    accumulated = facts["accumulation_steps"]
    steps = f" in {accumulated} microbatches" if accumulated > 1 else ""
    return (
        f"{facts['name']}: {facts['num_params'] / 1e6:,.2f} M parameters, batch "
        f"{facts['batch_size']:,}{steps}, remat={facts['remat']}\n"
        f"{facts['topology']}: {facts['num_chips']} chips, mesh {mesh or '1 device'}\n"
        f"{how} ({versions})"
    )


def _memory(facts: Mapping[str, Any]) -> str:
    memory, estimated = facts["memory"], facts["is_estimate"]
    rows = [
        (label, gib(memory[key]))
        for key, label in _PARTS.items()
        if memory[key] or key == "temporaries"
    ]
    refused = not estimated and memory["temporaries"] == 0
    if refused:
        rows[-1] = ("all else", gib(memory["needed"] - sum(memory[key] for key in _PARTS)))
    total = "all of it" + (" (estimate)" if estimated else "")
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    rows.append((total, f"{gib(memory['needed'])} of {gib(memory['available'])}: {verdict}"))
    return _table(f"memory of a {_device(facts)}", rows)


def _work(facts: Mapping[str, Any]) -> str:
    flops = facts["flops"]
    ideal = flops["model_per_step"] / facts["num_devices"]
    rows = [
        ("model, an image", f"{_number(flops['model_per_image'] / 1e9)} GFLOP"),
        ("model, a step", f"{_number(flops['model_per_step'] / 1e12)} TFLOP"),
        (
            f"computed by a {_device(facts)}, a step",
            f"{_number(flops['hardware_per_device'] / 1e12)} TFLOP, "
            f"{flops['hardware_per_device'] / ideal:.2f} times its share of the model's",
        ),
    ]
    return _table("matrix products", rows)


def _traffic(facts: Mapping[str, Any]) -> str:
    if not facts["time"]["has_networks"]:
        return ""
    rows = [
        (
            f"{row['kind']} over {'+'.join(row['axes'])}",
            f"{row['traffic'] / 1e9:8.3f} GB  in {row['calls']} calls",
        )
        for row in facts["collectives"]
    ]
    return _table(f"sent by a {_device(facts)} in a step", rows or [("nothing", "")])


def _time(facts: Mapping[str, Any]) -> str:
    times = facts["time"]
    rows = [("matrix products at the peak", f"{times['compute_s'] * 1e3:10,.1f} ms")]
    if times["memory_s"]:
        moved = f"{facts['bytes_moved'] / 1e9:,.3g} GB to and from the memory"
        rows.append((moved, f"{times['memory_s'] * 1e3:10,.1f} ms"))
    for network in times["networks"]:
        how = ", to one neighbour" if network["is_permute"] else ""
        how += ", slow network" if network["is_slow"] else ""
        rows.append(
            (
                f"{'+'.join(network['axes'])} at {network['bandwidth'] / 1e9:g} GB/s{how}",
                f"{network['seconds'] * 1e3:10,.1f} ms",
            )
        )
    bounds = {"overlapped": "step, all overlapped", "sequential": "step, no network overlapped"}
    if not times["has_networks"]:
        bounds = {"overlapped": "step"}
    for key, label in bounds.items():
        bound = times[key]
        rows.append(
            (
                label,
                f"{bound['step_s'] * 1e3:10,.1f} ms   MFU {bound['mfu']:.1%}   "
                f"{bound['days']:,.2f} days   {bound['chip_hours']:,.0f} chip-hours",
            )
        )
    left_out = "elementwise work and the input are left out"
    if not times["has_networks"]:
        left_out += ", and so are the memory's bandwidth and the network"
    title = (
        f"time of each of {facts['total_steps']:,} steps: bounds from data sheets, no prediction\n"
        f"  ({left_out})"
    )
    return _table(title, rows)


def _tries(facts: Mapping[str, Any]) -> str:
    available = facts["memory"]["available"]
    lines = [
        f"batch {row['batch_size']:>10,}   {gib(row['bytes']):>12}   "
        f"{'fits' if row['bytes'] <= available else 'does not fit'}"
        for row in facts["tries"]
    ]
    return _lines(f"batch: {facts['largest_batch_in_words']}", lines)


def _device(facts: Mapping[str, Any]) -> str:
    return "chip" if facts["num_devices"] == facts["num_chips"] else "device (half a chip)"


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 1000 else f"{x:.4g}"


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return _lines(title, [f"{label:<{width}}  {value}".rstrip() for label, value in rows])


def _lines(title: str, lines: list[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)])
