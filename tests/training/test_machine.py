"""What the host runs short of, from a made-up /proc, and when it is said."""

import os
from pathlib import Path

import pytest

from capjax.training.machine import MachineAlarms, held_bytes, memory_limit_bytes

GB = 1024 * 1024  # in kB, as the kernel counts


def write(root, **files):
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("cgroup", "limits", "expected"),
    [
        ("0::/\n", {}, 16),
        ("0::/\n", {"memory_DOT_max": "max\n"}, 16),
        ("0::/job/step\n", {"job__memory_DOT_max": f"{4 << 30}\n"}, 4),
        ("0::/job\n", {"memory_DOT_max": f"{8 << 30}"}, 8),  # a container sees its own at the root
        (
            "9:cpu:/\n4:memory:/job\n0::/\n",
            {"memory__job__memory_DOT_limit_in_bytes": f"{2 << 30}"},
            2,
        ),
        ("4:memory:/\n", {"memory__memory_DOT_limit_in_bytes": f"{1 << 62}"}, 16),
    ],
)
def test_the_limit_is_the_least_of_the_machine_and_its_groups(tmp_path, cgroup, limits, expected):
    write(tmp_path / "proc", meminfo=f"MemTotal: {16 * GB} kB\nMemFree: 1 kB\n")
    write(tmp_path / "proc", self__cgroup=cgroup)
    write(tmp_path / "cgroups", **limits)
    assert memory_limit_bytes(tmp_path / "proc", tmp_path / "cgroups") == expected << 30
    assert memory_limit_bytes(tmp_path / "none", tmp_path / "cgroups") is None


def test_workers_and_theirs_count_and_files_do_not(tmp_path):
    for pid, children, own in (("self", "7 9", 5), ("7", "8", 3), ("8", "", 2), ("9", "", 1)):
        write(tmp_path, **{f"{pid}__task__1__children": children})
        status = f"VmRSS: 99 kB\nRssAnon:\t{own * 100} kB\nRssFile: 7 kB\nRssShmem: {own} kB\n"
        write(tmp_path, **{f"{pid}__status": status})
    assert held_bytes(tmp_path) == 11 * 101 * 1024
    assert held_bytes(tmp_path / "none") == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_that_is_taken_is_seen():
    before = held_bytes()
    taken = bytearray(os.urandom(1)) * (64 << 20)
    assert 60 << 20 < held_bytes() - before < 80 << 20
    assert len(taken) < memory_limit_bytes()


def test_alarms_are_said_once_in_a_while_and_name_what_to_change():
    said, now, held = [], [0.0], [50]
    alarms = MachineAlarms(
        0.9, 0.25, said.append, held=lambda: held[0], limit=100, clock=lambda: now[0]
    )

    def log(step, wait):
        now[0] += 10.0
        alarms.write(step, {"train/loss": 1.0, "train/data_wait": wait})

    for step, wait in enumerate([0.9, 0.0, 0.0, 0.0, 0.0, 0.0]):  # the first batches: no habit
        log(step, wait)
    assert said == []
    for step in range(6, 24):
        log(step, 0.3 + 0.1 * (step % 2))
    assert len(said) == 1 and said[0].startswith("step 11: 35% of the time")
    assert "health.data_wait_share=0.25" in said[0] and "reading.num_threads" in said[0]
    held[0] = 91
    for step in range(24, 30):
        log(step, 0.0)
    assert len(said) == 2 and "91% of" in said[1] and "reading.cache_megabytes" in said[1]
    now[0] += 601.0
    log(30, 0.0)
    alarms.write(30, {"eval/val/loss": 1.0})
    assert len(said) == 3
    off = MachineAlarms(0.0, 0.0, said.append, held=lambda: 99, limit=100)
    for step in range(5):
        off.write(step, {"train/loss": 1.0, "train/data_wait": 1.0})
    assert len(said) == 3
