"""A spike is passed over as if its batches had not been there, and again after a kill."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from capjax import cli
from capjax.checkpoint import load_params
from capjax.checkpoint.directory import discard_after
from capjax.commands import build, rollback
from capjax.errors import UserError
from capjax.training.health import Health
from capjax.training.metrics import read_metrics
from capjax.training.spikes import Spiked, read_rollbacks
from tests.commands.conftest import train_losses

B = 16
POISONED = 14 * B  # the batch of step 15
FLAGS = (
    "--config.mesh.data=8",
    "--config.health.spike_metrics=loss",
    "--config.health.spike_window=8",
    "--config.health.spike_factor=2",  # the loss falls all the while
    "--config.health.rollback_steps=2",
)


def checkpoints(root, *steps):
    for step in steps:
        (root / "checkpoints" / f"{step:08d}").mkdir(parents=True)
    return root


def steps_in(root):
    return sorted(int(path.name) for path in (root / "checkpoints").iterdir())


def test_going_back_is_to_the_newest_checkpoint_that_is_old_enough(tmp_path):
    root, health = epath.Path(checkpoints(tmp_path, 10, 20, 28, 30)), Health(rollback_steps=3)
    back = rollback.go_back(root, Spiked(30, "a spike"), health, B, position=30 * B)
    assert back[:4] == (30, 20, 20 * B, 30 * B) and steps_in(tmp_path) == [10, 20]
    assert rollback.data_offset([back], 20, {"examples_seen": 20 * B}, B) == 10 * B
    # Later saves know it themselves; so does one that is older than the note.
    assert rollback.data_offset([], 25, {"examples_seen": 35 * B}, B) == 10 * B
    # Again, and to before the last: all that was seen since is passed over.
    back = rollback.go_back(root, Spiked(22, "another"), health, B, position=32 * B)
    assert back[:4] == (22, 10, 10 * B, 32 * B) and steps_in(tmp_path) == [10]
    assert rollback.kept_rollbacks(root, 10) == [back]  # the first is undone with its steps
    back = rollback.go_back(root, Spiked(11, "a third"), health, B, position=33 * B)
    assert back[:4] == (11, 0, 0, 33 * B) and steps_in(tmp_path) == []
    with pytest.raises(UserError, match=r"step 12: the last, after 1 rollbacks already"):
        rollback.kept_rollbacks(root, 0)
        one = Health(max_rollbacks=1)
        rollback.go_back(root, Spiked(12, "the last"), one, B, position=40 * B)


@pytest.mark.slow
def test_a_poisoned_batch_is_passed_over_and_again_after_a_kill(tiny_config, tmp_path, monkeypatch):
    plain = build.training_batches
    (tmp_path / "no_splits.py").write_text(
        "import runpy\n"
        "def get_config(arg=''):\n"
        f"    config = runpy.run_path({str(tiny_config)!r})['get_config']()\n"
        "    del config.evaluate.splits['concept']\n"
        "    return config\n"
    )

    def poisoned(plan, start, on_bad):
        rng = np.random.default_rng(0)
        for batch in plain(plan, start, on_bad):
            if POISONED in batch["position"]:
                batch["tokens"] = rng.integers(3, 320, batch["tokens"].shape).astype(np.int32)
            yield batch

    def without(plan, start, on_bad):
        """The data as if the batches of steps 13 to 15 were not there."""
        for batch in plain(plan, start, on_bad):
            if not 12 * B <= batch["position"][0] < 15 * B:
                yield batch

    def run(workdir, batches, *flags):
        monkeypatch.setattr(build, "training_batches", batches)
        config = [f"--config={tmp_path}/no_splits.py", f"--workdir={workdir}"]
        assert cli.main(["train", *config, *FLAGS, *flags]) == 0
        return load_params(workdir).params

    expected = run(tmp_path / "without", without)
    found = run(tmp_path / "run", poisoned, "--config.health.spike_action=rollback")
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    (back,) = read_rollbacks(tmp_path / "run")
    assert back[:4] == (15, 12, 12 * B, 15 * B) and back.reason.startswith("loss=")
    assert train_losses(tmp_path / "run") == train_losses(tmp_path / "without")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert {line["train/rollbacks"] for line in lines if line["step"] in range(13, 25)} == {1}
    assert [line["step"] for line in lines] == list(range(1, 25))
    spent = json.loads((tmp_path / "run" / "summary.json").read_text())["time_spent"]
    assert spent["launches"] == 2 and spent["seconds"]["lost"] > 0
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    discard_after(epath.Path(tmp_path / "cut" / "checkpoints"), 12)
    again = run(tmp_path / "cut", poisoned, "--config.health.spike_action=rollback")
    jax.tree.map(np.testing.assert_array_equal, again, expected)
    assert read_rollbacks(tmp_path / "cut") == [back]
