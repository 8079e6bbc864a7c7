"""Throughput against a clock of our own, the line word for word, and where it is shown."""

import io
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import pytest

from capjax.training.progress import (
    Progress,
    Rates,
    Throughput,
    duration,
    peak_flops,
    peak_rss_bytes,
    process_age_s,
    progress_line,
)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_throughput_splits_time():
    clock = Clock()
    throughput = Throughput(batch_size=10, clock=clock)
    assert throughput.recent() is None and throughput.overall() is None
    with throughput.waiting():
        clock.now += 3.0  # the first batch
    clock.now += 7.0  # compilation
    throughput.finished(101)
    assert throughput.recent() is None
    for step in (102, 103, 104, 105):
        with throughput.waiting():
            clock.now += 0.5
        clock.now += 1.5
        throughput.finished(step)
    with throughput.paused():
        clock.now += 100.0
    clock.now += 2.0
    throughput.finished(106)
    # Five steps in 10 s of training and 110 s in all, 2 s of them waiting.
    rates = throughput.overall()
    assert rates == Rates(images_per_s=5.0, data_wait=0.2, wall_per_step_s=22.0)
    assert throughput.training_s() == 20.0
    assert throughput.data_wait() == 5.0 / 20.0


def test_recent_rates_forget():
    clock = Clock()
    throughput = Throughput(batch_size=1, clock=clock, window=2)
    for step, seconds in enumerate((1.0, 9.0, 2.0, 2.0), start=1):
        clock.now += seconds
        throughput.finished(step)
    recent, overall = throughput.recent(), throughput.overall()
    assert recent is not None and recent.images_per_s == 0.5
    assert overall is not None and overall.images_per_s == pytest.approx(3 / 13)


def test_line():
    rates = Rates(images_per_s=512.0, data_wait=0.0123, wall_per_step_s=0.5)
    line = progress_line(
        400, 1000, 2.34567, rates, flops_per_image=1e9, peak=1.024e12, rss_bytes=1_500_000_000
    )
    assert line == (
        "step 400/1000  loss 2.3457  512 images/s  data-wait 1.2%  left 5:00  "
        "512.0 GFLOP/s  MFU 50.0%  memory 1.50 GB"
    )
    assert progress_line(1, 9, float("nan")) == "step 1/9  loss nan"
    assert "MFU" not in progress_line(1, 9, 1.0, rates, flops_per_image=1e9)


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3599, 3600.0, 93784)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "1d 2:03:04",
    ]


def device(kind, number, coords=None):
    fields = {"device_kind": kind, "id": number}
    return SimpleNamespace(**fields, **({} if coords is None else {"coords": coords}))


def test_peak_counts_chips_not_cores():
    gpus = [device("NVIDIA H100 80GB HBM3", i) for i in range(4)]
    assert peak_flops(gpus) == 4 * 989e12
    v5e = [device("TPU v5 lite", i, [i, 0, 0]) for i in range(4)]
    assert peak_flops(v5e) == 4 * 197e12
    cores = [device("TPU7x", i, [i // 2, 0, 0]) for i in range(8)]  # two devices a chip
    assert peak_flops(cores) == 4 * 2307e12
    slices = [SimpleNamespace(**vars(d), slice_index=i) for i in range(2) for d in v5e]
    assert peak_flops(slices) == 8 * 197e12


def test_peak_is_unknown_where_a_device_is():
    assert peak_flops(jax.devices()) is None
    assert peak_flops([device("NVIDIA H100 PCIe", 0)]) is None
    assert peak_flops([device("NVIDIA GH200 480GB", 0)]) is None


def test_plain_lines_come_when_due():
    stream = io.StringIO()
    with Progress(stream, plain_every_s=1000.0) as progress:
        for line in ("one", "two"):
            progress.show(line)
        progress.show("three", always=True)
        with progress.doing("compiling"):
            pass
    assert stream.getvalue().splitlines() == ["one", "three", "compiling...", "compiling... 0.0 s"]


def test_terminal_gets_one_line_that_is_replaced():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(stream) as progress:
        progress.show("first")
        with progress.doing("compiling"):
            time.sleep(0.6)
        progress.show("last")
    text = stream.getvalue()
    assert "compiling... 0." in text and "\x1b[2K" in text
    assert text.rstrip("\x1b[?25h\n\r ").endswith("last")


def test_only_the_first_process_shows(monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with Progress(stream) as progress, progress.doing("compiling"):
        progress.show("line", always=True)
    assert stream.getvalue() == ""


def test_process_age_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.5)\nfrom capjax.training.progress import process_age_s as a\n"
    begin = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", code + "print(a())"], capture_output=True, text=True, check=True
    )
    took = time.monotonic() - begin
    assert 0.5 <= float(shown.stdout) <= took + 0.02
    assert process_age_s() > 0


def test_peak_memory_is_of_this_process():
    before = peak_rss_bytes()
    block = bytearray(b"x") * (before + 50_000_000)
    assert peak_rss_bytes() >= before + 50_000_000
    del block
    # A process started from here has its own peak, not this one's.
    code = "from capjax.training.progress import peak_rss_bytes as p; print(p())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 10_000_000 < int(shown.stdout) < peak_rss_bytes()
