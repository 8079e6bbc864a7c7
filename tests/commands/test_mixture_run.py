"""`capjax train` on a mixture with broken images: killed, resumed, weighed anew on the way."""

import json
import os
import signal

import pytest

from capjax.data.sources import open_source
from tests.commands.conftest import finish, start, train_losses
from tests.commands.test_train import wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of drawings with texts; one of them has two files that are no images."""
    root = tmp_path_factory.mktemp("folders")
    source = open_source("emoji:val")
    for i in range(60):
        example, folder = source[i], root / ("a" if i < 40 else "b")
        folder.mkdir(exist_ok=True)
        is_broken = i in (3, 11)
        (folder / f"{i:02d}.png").write_bytes(b"no image" if is_broken else example.image)
        (folder / f"{i:02d}.txt").write_text(example.captions[0].text)
    return root


@pytest.fixture
def command(folders, tiny_config):
    return [
        "train",
        f"--config={tiny_config}",
        "--config.data.source=",
        "--config.data.styles=",
        "--config.captions.sources=",
        "--config.captions.weights=",
        f"--config.data.mixture.a={folders / 'a'}",
        f"--config.data.mixture.b={folders / 'b'}",
        "--config.data.tokenizer.vocab_size=300",
        "--config.data.bad_budget=0.2",
        "--config.evaluate.every_steps=0",
    ]


def bad_records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]


def test_weights_and_bad_records_across_kills(command, tmp_path):
    first = "--config.data.schedule=0:a=3;b=1"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start(*command, first, f"--workdir={whole}"))
    records = bad_records(whole)
    assert {record["index"] for record in records} <= {3, 11}
    assert len(records) > 4
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    for line in trained:
        counted = sum(v for name, v in line.items() if name.startswith("train/bad/"))
        assert counted == sum(record["position"] < 16 * line["step"] for record in records)
    assert json.loads((whole / "summary.json").read_text())["bad_records"] == {
        "not an image": len(records)
    }

    process = start(*command, first, f"--workdir={cut}")
    wait_for_step(cut, 10, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    refused = start(*command, "--config.data.schedule=0:a=1;b=3", f"--workdir={cut}")
    assert "may only append entries" in refused.communicate()[0]
    assert refused.returncode == 2
    later = f"{first},320:a=0;b=1"  # from step 20 on
    output = finish(start(*command, later, f"--workdir={cut}"))
    assert "data.schedule" in output
    ours, theirs = train_losses(cut), train_losses(whole)
    assert [step for step in theirs if ours[step] != theirs[step]] == [21, 22, 23, 24]
    before = [record for record in records if record["position"] < 320]
    assert bad_records(cut) == before  # and none in b, from which the rest comes
