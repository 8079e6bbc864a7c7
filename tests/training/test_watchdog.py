"""A process that hangs says where, and ends with the status that asks for another start."""

import os
import signal
import subprocess
import sys
import time

import pytest

# The loop on a step that sleeps for ever in a function of a telling name, in step 3.
HANGS = """
import sys, threading, time
from pathlib import Path
from capjax.training.loop import Evaluator, train
from capjax.training.phases import Phases
from capjax.training.watchdog import Watchdog

where, limit, slow_limit, file = sys.argv[1], *map(float, sys.argv[2:4]), Path(sys.argv[4])

def a_lock_that_nobody_lets_go():
    threading.Event().wait()

def step(state, batch):
    if where == "step" and state == 2:
        a_lock_that_nobody_lets_go()
    if where == "stopped" and state == 2:
        print("now", flush=True)
        time.sleep(limit / 2)
    return state + 1, {"loss": 1.0}

def evaluate(state, step):
    if where == "evaluation":
        time.sleep(2 * limit) if state == 2 else a_lock_that_nobody_lets_go()
    return {}

phases = Phases()
with Watchdog(phases, limit, slow_limit, file):
    train(
        0, train_step=step, batches=iter(range(9)), total_steps=6, batch_size=1,
        evaluators=[Evaluator("val", 2, evaluate)], phases=phases,
    )
time.sleep(2 * limit)  # no longer watched
print("done")
"""


def start(*arguments):
    command = [sys.executable, "-c", HANGS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("where", "limits", "words"),
    [
        ("step", (0.5, 60), "waiting for a training step after step 2;"),
        ("evaluation", (0.4, 2), "evaluating after step 4;"),  # one of 0.8 s is borne
    ],
)
def test_a_hang_is_said_and_ends_the_process(tmp_path, where, limits, words):
    file = tmp_path / "hang-0.txt"
    process = start(where, *limits, file)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75
    assert words in error.splitlines()[-1] and str(file) in error.splitlines()[-1]
    for text in (error, file.read_text()):
        assert "a_lock_that_nobody_lets_go" in text and "process 0 stood still" in text
        assert 'threading.py", line' in text and text.count("hread 0x") == 2


def test_a_process_that_was_stopped_and_one_that_is_done_are_left_alone(tmp_path):
    process = start("stopped", 1, 60, tmp_path / "hang")
    assert process.stdout.readline() == "now\n"
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    output, error = process.communicate(timeout=120)
    assert (process.returncode, output, error) == (0, "done\n", "")
    assert not (tmp_path / "hang").exists()
