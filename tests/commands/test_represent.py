"""All ways of classifying together: on any mesh, and for models that lack a part."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from capjax.commands.represent import label_names, represent
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.evaluation.measured import read_measured
from capjax.models.image_encoder import ImageEncoderConfig
from capjax.models.image_tower import ImageTower
from capjax.models.towers import Towers
from tests.evaluation.tiny import (
    EIGHT,
    ONE,
    PREPROCESSING,
    UNLABELLED,
    LabelledImages,
    params,
    readable,
    tokenizer,
    towers,
)

TRAIN, TEST = ("train", LabelledImages(40)), ("test", LabelledImages(21, seed=1))
NAMES = ["dark", ["grey", "a grey"], "bright", "unseen"]
WAYS = (
    *("majority", "knn", "linear_probe", "fewshot_1", "fewshot_4"),
    *("zeroshot", "zeroshot_likelihood", "zeroshot_likelihood_minus_prior", "zeroshot_prior"),
)


def model(**fields) -> LoadedModel:
    config = {"objective": {"coca": {"weight": 1.0, "image_dropout": 0.1}}}
    return dataclasses.replace(
        LoadedModel(towers(), params(), tokenizer(), PREPROCESSING, config, step=3), **fields
    )


def measured(loaded, test=TEST, **options):
    return represent(
        loaded,
        TRAIN,
        test,
        NAMES,
        batch_size=8,
        shots=(1, 4),
        k=5,
        num_seeds=2,
        penalties=(1.0, 0.1),
        **options,
    )


def test_every_way_on_one_device_and_eight(tmp_path):
    one = measured(model().on_mesh(ONE))
    eight = measured(model().on_mesh(EIGHT), directory=epath.Path(tmp_path))
    assert set(one.metrics) == {f"{way}_{x}" for way in WAYS for x in ("top1", "class_mean")}
    kept = [index for index in readable(21) if index != UNLABELLED]
    assert one.keys == eight.keys == tuple(f"b/{index:03d}" for index in kept)
    for name, value in one.metrics.items():
        assert eight.metrics[name] == value, name
        low, high = one.intervals[name]
        assert low <= value <= high
        if name.endswith("top1"):
            assert one.items[name].mean() == pytest.approx(value)
    labels = (np.array(kept) + 1) % 3
    for name, items in one.items.items():
        means = [items[labels == label].mean() for label in range(3)]
        class_mean = one.metrics[name.removesuffix("top1") + "class_mean"]
        assert class_mean == pytest.approx(np.mean(means))
    # Of the training images that count 12 are of class 0, 12 of class 1 and 13 of class 2.
    assert one.metrics["majority_top1"] == pytest.approx(np.mean(labels == 2))
    assert one.metrics["linear_probe_top1"] > 0.8  # the brightness says it
    assert one.metrics["knn_top1"] > 0.6
    assert one.notes["represent"]["majority"]["unreadable"] == 4
    assert one.notes["represent"]["fewshot_1"]["classes_with_fewer"] == 1
    assert not one.skipped


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from etils import epath
from capjax.evaluation import features
from capjax.evaluation.measured import write_measured
from tests.commands.test_represent import EIGHT, PREPROCESSING, TEST, measured, model
directory, loaded = epath.Path(sys.argv[3]), model().on_mesh(EIGHT)
found = measured(loaded, directory=directory)
features.map_images = None  # from here on there are those that were kept
again = features.frozen_features(
    loaded.towers, loaded.params, TEST, PREPROCESSING, mesh=EIGHT, directory=directory
)
assert len(again.keys) == 19 and again.unreadable == 2
write_measured(directory.parent / f"{sys.argv[2]}.json", found)
"""


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROCESS, str(port)]
    processes = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path / "features")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    alone = measured(model().on_mesh(EIGHT))
    for index in range(2):
        found = read_measured(tmp_path / f"{index}.json")
        assert found.metrics == alone.metrics and found.keys == alone.keys
    assert len(list((tmp_path / "features").iterdir())) == 3  # of training, of the test twice


def test_the_test_set_has_no_part_in_any_choice():
    notes = [
        measured(model().on_mesh(ONE), test=test).notes["represent"]["linear_probe"]
        for test in (TEST, ("other", LabelledImages(11, seed=5)))
    ]
    assert notes[0] == notes[1]


def test_what_a_model_lacks_is_skipped_and_said():
    coca = dataclasses.asdict(towers().coca.config)
    names = [field.name for field in dataclasses.fields(ImageEncoderConfig)]
    config = ImageEncoderConfig(**{name: coca[name] for name in names})
    encoder = Towers(image_encoder=ImageTower(config))
    alone = measured(model(towers=encoder, params={"encoder": params()["encoder"]}).on_mesh(ONE))
    assert set(alone.skipped) == {"zeroshot_top1", "zeroshot_likelihood_top1"}
    assert "knn_top1" in alone.metrics
    blind = measured(model(config={}).on_mesh(ONE))
    assert set(blind.skipped) == {"zeroshot_likelihood_minus_prior_top1"}


def test_labels_and_their_names():
    with pytest.raises(UserError, match="train has labels from 0 to 2: expected 0 to 1"):
        represent(model(), TRAIN, TEST, ["one", "two"], batch_size=8)
    assert label_names("emoji:train")[9] == "Component"
    with pytest.raises(UserError, match="does not say what its labels mean"):
        label_names("photos/")


def test_names_from_a_file(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("cat\nsea lion\n")
    assert label_names("photos/", str(file)) == ["cat", "sea lion"]
    file.write_text("cat\n\ndog\n")
    with pytest.raises(UserError, match="the name of a class in every line"):
        label_names("photos/", str(file))
    with pytest.raises(UserError, match="expected a text file"):
        label_names("photos/", str(tmp_path / "missing.txt"))
