"""Every objective as its user runs it: trained, evaluated again, used and reported."""

import json
import re

import jax
import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict

import capjax
from capjax.commands import build
from capjax.commands.evaluators import Evaluation
from capjax.commands.measures import Probes, open_measures
from capjax.commands.models import build_objectives
from capjax.data.sources import open_source
from capjax.errors import UserError
from capjax.evaluation.measured import read_measured
from capjax.mesh import MeshShape, make_mesh
from capjax.reporting.page import write_report
from tests.commands.conftest import REPOSITORY, finish, start

SHRUNK = '''
"""An objective on the embedded corpus, shrunk."""
from ml_collections import ConfigDict
import runpy

def get_config(arg=""):
    config = runpy.run_path({path!r})["get_config"](arg)
    config.batch_size = 32
    config.total_steps = 40
    config.data.text_length = 8
    config.data.styles = ("fluent",)
    config.data.tokenizer.vocab_size = 320
    config.preprocessing.image_size = 16
    config.model.update(patch_size=8, width=32, depth=1, num_heads=2, mlp_dim=64)
    config.model.update(decoder_depth=2, text_depth=1, caption_queries=4)
    config.optimizer.update(warmup_steps=4, cooldown_steps=0)
    config.checkpoint.every_steps = 0
    config.log_every_steps = 1
    config.evaluate.update(every_steps=0, batch_size=32, max_examples=64)
    config.evaluate.splits = ConfigDict({{"concept": "emoji:concept"}})
    config.tensorboard = False
    return config
'''
CAPTIONS = {"exact_match", "unigram_f1", "caption_loss", "shuffled_images_loss"}
RETRIEVAL = {"image_to_text_r1", "text_to_image_r1", "image_to_text_r5", "text_to_image_r10"}
MEASURED = {
    "icmlm": CAPTIONS | {"parallel_loss"},
    "clip": RETRIEVAL,
    "coca": CAPTIONS | RETRIEVAL,
    "siglip_cappa": CAPTIONS | RETRIEVAL,
}


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "shrunk.py"
    path.write_text(SHRUNK.format(path=str(REPOSITORY / "configs" / "emoji_objectives.py")))
    return path


def metric_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def evaluate_everything(workdir, measured):
    """A run that has captions and towers, which here judge themselves."""
    asked = ("--probes", "--composition=emoji_pairs", f"--judge={workdir}", "--attention=4")
    asked += ("--guidance_scales=1,2", "--max_examples=48", "--tokenizer=treebank")
    asked += ("--lexicon=emoji", "--judge_prompt=")
    said = finish(start("evaluate", f"--workdir={workdir}", *asked))
    files = {path.stem: read_measured(path) for path in (workdir / "evaluations").glob("*.json")}
    assert files.keys() == {"concept", "concept@2", "concept@probes", "test_emoji_pairs"}
    plain, guided = files["concept"], files["concept@2"]
    assert (plain.notes["guidance_scale"], guided.notes["guidance_scale"]) == (1, 2)
    shared = {
        "chair_s",
        "mention_recall",
        "cider_d",
        "exact_match",
        "clip_score",
        "caption_to_image_r1",
    }
    assert shared <= guided.metrics.keys() and shared <= plain.metrics.keys()
    assert len(guided.keys) == len(guided.items["cider_d"]) == 48
    own = {name.rpartition("/")[2] for name in measured}
    assert {"retrieval_images", "caption_loss", "knn_top1"} <= own
    assert plain.notes["step"] == 40 and plain.notes["references_distinct_ratio"] > 0.5
    assert {"retrieval_images", "caption_loss"} <= plain.metrics.keys()
    probes = files["concept@probes"].metrics
    assert {"knn_top1", "linear_probe_top1", "zeroshot_top1", "majority_top1"} <= probes.keys()
    last = metric_lines(workdir)
    assert last[-2]["eval/concept/knn_top1"] == probes["knn_top1"]
    pairs = files["test_emoji_pairs"].metrics
    assert all(last[-1][f"eval/test_emoji_pairs/{name}"] == x for name, x in pairs.items())
    assert all(name in said for name in ("cider_d", "knn_top1", "clip_score"))
    assert len(json.loads((workdir / "attention" / "concept.json").read_text())) == 4
    guided_file = workdir / "captions" / "guided" / "concept@2.jsonl"
    assert len(guided_file.read_text().splitlines()) == 48


def evaluate_on_a_mesh(workdir, directory):
    """As in training: on eight devices, under their mesh, with a judge; and what goes wrong."""
    model, split = capjax.load(workdir), ("emoji:concept", open_source("emoji:concept"))
    config = ConfigDict(model.config)
    measures = open_measures(judge=str(workdir), judge_prompt="", guidance_scales=(2.0,))
    two_names = Probes(("emoji:val", open_source("emoji:val")), ["one", "two"], 50)
    found, said = {}, []
    for shape in (MeshShape(data=1), MeshShape()):
        mesh = make_mesh(shape, jax.devices()[: None if shape.data < 0 else 1])
        evaluation = Evaluation(
            epath.Path(directory / str(shape.data)),
            mesh,
            build.build_data(config),
            build_objectives(config),
            measures._replace(probes=two_names),
            batch_size=16,
            max_examples=21,
            say=said.append,
        )
        with jax.set_mesh(mesh):
            found[shape.data] = evaluation.split("concept", split, model.on_mesh(mesh))
        part = read_measured(directory / str(shape.data) / "evaluations" / "concept@probes.json")
        assert "expected 0 to 1" in part.skipped["probes"]
    assert found[1].keys() >= {"clip_score", "cider_d", "judge_text_to_image_r1"}
    batches = {"shuffled_images_loss", "contrastive_loss"}  # which depend on the batches
    assert {k: v for k, v in found[-1].items() if k not in batches} == pytest.approx(
        {k: v for k, v in found[1].items() if k not in batches}, rel=1e-4
    )
    assert sum("probes not measured" in line for line in said) == 2


@pytest.mark.slow
# Cap, CapPa and SigLIP alone are parts of the last.
@pytest.mark.parametrize("name", ["icmlm", "clip", "coca", "siglip_cappa"])
def test_train_evaluate_use_report(name, config_path, tmp_path):
    workdir = tmp_path / name
    more = ["--config.evaluate.probes=true"] if name == "siglip_cappa" else []
    finish(start("train", f"--config={config_path}:{name}", f"--workdir={workdir}", *more))
    lines = metric_lines(workdir)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    measured = {k: v for k, v in lines[-1].items() if k.startswith("eval/concept/")}
    assert {f"eval/concept/{metric}" for metric in MEASURED[name]} <= measured.keys()
    if name in ("clip", "coca"):  # by the softmax: the sigmoid's sum would be about 32 log 2
        assert measured["eval/concept/contrastive_loss"] < 2 * np.log(32)

    if name == "coca":
        finish(start("evaluate", f"--workdir={workdir}", "--tokenizer=treebank"))
        again = metric_lines(workdir)[-1]
        assert {k: again[k] for k in measured} == pytest.approx(measured)
    if name == "siglip_cappa":
        evaluate_everything(workdir, measured)
        evaluate_on_a_mesh(workdir, tmp_path)

    model = capjax.load(workdir)
    images = [open_source("emoji:concept")[i].image for i in range(3)]
    if MEASURED[name] >= CAPTIONS:
        assert len(model.caption(images)) == 3
        assert (model.score(images, ["a cat", "a dog", "a hat"]) < 0).all()
    else:
        with pytest.raises(UserError, match=r"contrastive towers and no caption decoder"):
            model.caption(images)
    if MEASURED[name] >= RETRIEVAL:
        image_ND, text_ND = model.embed_images(images), model.embed_texts(["a cat", "a dog"])
        for x in (image_ND, text_ND):
            np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
        assert image_ND.shape[1] == text_ND.shape[1]
    else:
        with pytest.raises(UserError, match="no contrastive towers"):
            model.embed_texts(["a cat"])
    assert model.encode_image(images).shape == (3, 32)

    page = write_report([workdir]).read_text()
    assert ("text to image R@1" in page) == (MEASURED[name] >= RETRIEVAL)
    assert bool(re.search(r"exact match", page)) == (MEASURED[name] >= CAPTIONS)
