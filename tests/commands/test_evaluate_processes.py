"""`capjax evaluate` counts alike on one device, on eight, and on two processes of two each.

Everything that is measured of a run: likelihood, captions with and without guidance, a judge,
retrieval of its own towers, probes and a test of composition, over a number of examples that no
batch divides, some of which lack an image, a caption or a label.
"""

import json
import shutil
import socket
from pathlib import Path

import pytest

from tests.commands.conftest import finish, start
from tests.commands.tiny_runs import judge, some_captions, write_run, write_source
from tests.evaluation import tiny

COUNT, BATCH_SIZE = 103, 16


def write_test(directory: Path) -> None:
    """In ImageCoDe's layout: three sets of three images."""
    sets = {}
    for number in range(3):
        folder = directory / f"set_{number}"
        folder.mkdir()
        for frame in (0, 4, 10):
            image = tiny.LabelledImages(1, 200 + 20 * number + frame)[0].image
            (folder / f"img{frame}.jpg").write_bytes(image)
        captions = some_captions(80 + number)[:3]
        sets[folder.name] = {str(at): caption.text for at, caption in enumerate(captions)}
    (directory / "imagecode.json").write_text(json.dumps(sets))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Sources, a test, a run and a judge."""
    root = tmp_path_factory.mktemp("made")
    write_source(root / "known", 40, 0)
    write_source(root / "asked", COUNT, 1)
    write_test(root)
    (root / "names.txt").write_text("dark\ngrey\nbright\n")
    write_run(root / "run", tiny.towers(), tiny.params())
    write_run(root / "judge", *judge())
    return root


def evaluate(made: Path, workdir: Path, devices: int, num_processes: int = 1) -> list[str]:
    """What each process said."""
    shutil.copytree(made / "run", workdir)
    arguments = [
        *("evaluate", f"--workdir={workdir}", f"--split=asked={made / 'asked'}"),
        *(f"--batch_size={BATCH_SIZE}", "--probes", f"--probe_source={made / 'known'}"),
        *(f"--labels={made / 'names.txt'}", f"--judge={made / 'judge'}", "--judge_prompt="),
        *("--guidance_scales=2", "--tokenizer=treebank", "--attention=2"),
        f"--composition=imagecode={made / 'imagecode.json'};{made}",
    ]
    if num_processes == 1:
        return [finish(start(*arguments, devices=devices))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}")
    processes = [
        start(*arguments, *together, f"--process_id={i}", devices=devices)
        for i in range(num_processes)
    ]
    try:
        return [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def files(workdir: Path) -> dict[str, object]:
    """All that was written but the checkpoint: by path, JSON values, or lists of them."""
    found = {}
    for path in sorted(workdir.rglob("*.json*")):
        name = str(path.relative_to(workdir))
        if name.startswith("checkpoints/"):
            continue
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else None
        found[name] = list(map(json.loads, lines)) if lines else json.loads(path.read_text())
    for line in found["metrics.jsonl"]:
        line.pop("wall_s")
    return found


def differences(found, expected, where: str = "") -> list[str]:
    """Where they differ, floats beyond their tolerance."""
    if isinstance(expected, dict) and isinstance(found, dict):
        places = [(name, found.get(name), expected.get(name)) for name in found | expected]
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        places = list(zip(range(len(found)), found, expected, strict=True))
    else:
        is_float = isinstance(expected, float) and not expected.is_integer()
        wanted = pytest.approx(expected, rel=2e-5, abs=2e-6) if is_float else expected
        return [] if found == wanted else [f"{where}: {found} != {expected}"]
    return [line for name, x, y in places for line in differences(x, y, f"{where}/{name}")]


@pytest.mark.slow
def test_everything_on_one_device_and_on_eight_of_two_processes(made, tmp_path):
    evaluate(made, tmp_path / "one", devices=1)
    first, second = evaluate(made, tmp_path / "two", devices=4, num_processes=2)
    assert "asked: 2 images cannot be read" in first and "knn_top1" in first
    assert "warning" not in second and "knn_top1" not in second
    one = files(tmp_path / "one")
    captioned = COUNT - 3  # of the others two are no images, one has no caption
    measured = one["evaluations/asked.json"]["metrics"]
    assert measured["retrieval_images"] == captioned < measured["retrieval_captions"]
    assert {"loss", "cider_d", "clip_score", "rd100_r1", "bags_3_r1"} <= measured.keys()
    assert len(one["captions/asked.jsonl"]) == captioned + 1
    found = one["evaluations/test_imagecode.json"]["metrics"]
    assert {"imagecode_r1", "imagecode_image", "imagecode_image_towers"} <= found.keys()
    assert not differences(files(tmp_path / "two"), one)
