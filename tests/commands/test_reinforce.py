"""`capjax reinforce` as its user runs it: trained, killed and resumed, on several devices."""

import json
import shutil
import socket

import jax
import numpy as np
import pytest
from etils import epath

import capjax
from capjax.checkpoint import load_params, step_directory
from capjax.commands import settings
from capjax.commands.reinforce_data import HostScores
from capjax.commands.reinforce_grammar import (
    BEGINNING,
    check_grammar_beginning,
    write_grammar_beginning,
)
from capjax.commands.reinforce_parts import build_policy, build_rewards
from capjax.data.sources import open_source
from capjax.data.tokenizer import Tokenizer
from capjax.decoding.loaded_model import LoadedModel
from capjax.errors import UserError
from capjax.rl.reward_terms import ClipScore, Grammar, Rewards
from tests.commands.conftest import REPOSITORY, finish, start, train_losses
from tests.evaluation import tiny

TINY = '''
"""Reinforcement, shrunk."""
from ml_collections import ConfigDict
import runpy

def get_config(arg="self_retrieval"):
    config = runpy.run_path({path!r})["get_config"](arg)
    config.batch_size = 16
    config.total_steps = 4
    config.sampling.num_samples = 3
    config.data.source = "emoji:concept"
    config.data.styles = ("fluent",)
    config.captions.sources = ("tts",)
    config.optimizer.warmup_steps = 0
    config.checkpoint.every_steps = 2
    config.log_every_steps = 1
    config.evaluate.update(every_steps=0, batch_size=16, max_examples=16)
    config.evaluate.splits = ConfigDict({{"concept": "emoji:concept"}})
    config.tensorboard = False
    return config
'''
REWARD = '''
def reward(images, captions, references):
    """Long captions of bright images."""
    assert len(images) == len(captions) == len(references)
    return [[len(text) / 100 + image.mean() / 255 for text in texts]
            for image, texts in zip(images, captions)]
'''
TOWER = (
    "--config.rewards.grammar.weight=0.1",
    "--config.rewards.grammar.train_tower=True",
    "--config.rewards.grammar.tower.steps=4",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config):
    """A folder with a captioner, towers with the same and with another tokenizer, the config."""
    root = tmp_path_factory.mktemp("reinforce")
    (root / "tiny.py").write_text(
        TINY.format(path=str(REPOSITORY / "configs" / "emoji_reinforce.py"))
    )
    (root / "reward.py").write_text(REWARD)
    towers = (
        "--config.objective.captioning.weight=0",
        "--config.objective.contrastive.weight=1",
        "--config.model.pool=map",
        "--config.model.text_depth=1",
    )
    short = ("--config.total_steps=3", "--config.checkpoint.every_steps=0")
    train = ("train", f"--config={tiny_config}", *short)
    jobs = [
        start(*train, f"--workdir={root}/captioner"),
        start(*train, f"--workdir={root}/towers", *towers),
        start(
            *train, f"--workdir={root}/others", *towers, "--config.data.tokenizer.vocab_size=340"
        ),
    ]
    for job in jobs:
        finish(job)
    return root


def reinforce(runs, workdir, *flags, arg="self_retrieval", devices=1):
    return start(
        "reinforce",
        f"--config={runs}/tiny.py:{arg}",
        f"--checkpoint={runs}/captioner",
        f"--workdir={workdir}",
        *flags,
        devices=devices,
    )


def lines_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "towers", "flags"),
    [
        ("self_retrieval", "towers", TOWER),
        (
            "cider",
            "towers",
            (
                "--config.rewards.cider_d.on=device",
                "--config.sampling.num_updates=2",
                "--config.policy.algorithm=grpo",
            ),
        ),
        (
            "both",
            "others",
            (
                "--config.policy.algorithm=scst",
                "--config.rewards.ref_clip_score.weight=0.5",
                "--config.rewards.self_retrieval.num_negatives=3",
                "--config.policy.likelihood_weight=0.1",
                "--config.sampling.prefix=2",
                "--config.captions.templates=2 {caption}",
            ),
        ),
    ],
)
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(runs, tmp_path, arg, towers, flags):
    flags = (*flags, f"--towers={runs}/{towers}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(reinforce(runs, whole, *flags, arg=arg))
    shutil.copytree(whole, cut)  # and lose what came after the second step
    shutil.rmtree(step_directory(epath.Path(cut / "checkpoints"), 4))
    output = finish(reinforce(runs, cut, *flags, arg=arg))
    assert "resuming after step 2" in output and "learns grammar" not in output
    assert train_losses(whole) == train_losses(cut)
    params, again = (load_params(path).params for path in (whole, cut))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    rewards = [line["train/reward"] for line in lines_of(whole)]
    assert len(rewards) == 4 and np.isfinite(rewards).all()
    captioner, lines = capjax.load(whole), (whole / "captions/concept.jsonl").read_text()
    found = [json.loads(line) for line in lines.splitlines()[:3]]
    source = open_source(found[0]["source"])
    prefix = captioner.config["sampling"]["prefix"]
    images = [source[line["index"]].image for line in found]
    again = captioner.caption_records(images, prefix=prefix)
    for line, record in zip(found, again, strict=True):
        assert record["caption"].removeprefix(prefix).lstrip() == line["caption"]
        assert record["logprob"] == pytest.approx(line["logprob"], abs=1e-3)


@pytest.mark.slow
def test_eight_devices_and_rewards_of_ones_own(runs, tmp_path):
    flags = (
        f"--config.rewards.functions.bright={runs}/reward.py",
        "--config.rewards.repetition.weight=0.1",
        "--config.rewards.grammar.weight=0.1",
        "--config.lora.rank=2",
        "--config.policy.kl_weight=0",
        "--config.optimizer.learning_rate=1e-4",
        f"--towers={runs}/others",
    )
    found = []
    for devices in (1, 8):
        workdir = tmp_path / str(devices)
        finish(reinforce(runs, workdir, *flags, devices=devices))
        found.append(lines_of(workdir))
    for one, eight in zip(*found, strict=True):
        for name in ("train/reward_bright", "train/reward", "train/caption_tokens", "train/loss"):
            assert one[name] == pytest.approx(eight[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
def test_two_processes_learn_as_one(runs, tmp_path):
    """Parameters split between them, and rewards of the host, each of its own rows'."""
    flags = (f"--towers={runs}/others", "--config.policy.algorithm=scst", "--config.mesh.fsdp=2")
    flags += ("--config.optimizer.learning_rate=1e-4", *TOWER)
    flags += ("--config.total_steps=2", "--config.checkpoint.every_steps=0")
    flags += ("--config.sampling.prefix=2",)
    one, two = tmp_path / "one", tmp_path / "two"
    finish(reinforce(runs, one, *flags, arg="both", devices=2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = (*flags, f"--coordinator=127.0.0.1:{port}", "--num_processes=2")
    jobs = [
        reinforce(runs, two, *together, f"--process_id={i}", arg="both", devices=1)
        for i in range(2)
    ]
    for job in jobs:
        finish(job)
    for line, other in zip(lines_of(one), lines_of(two), strict=True):
        for name in ("train/reward", "train/reward_cider_d", "train/caption_tokens", "train/loss"):
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--config.policy.algorithm=sct",), "policy.algorithm='sct'"),
        (("--config.policy.kl_estimator=k1",), "kl_in_reward"),
        (("--config.rewards.self_retrieval.weight=0",), "every weight is 0"),
        (("--config.rewards.self_retrieval.among=bags",), "rewards.self_retrieval.among='bags'"),
        (("--config.rewards.length.weight=1",), "rewards.length.shortest"),
        (("--config.rewards.functions.length=reward.py",), "a reward has that name"),
        (("--config.rewards.self_retrieval.form=logg",), "rewards.self_retrieval.form='logg'"),
        (("--config.rewards.grammar.head=no.npz",), "there is no such file"),
        (("--config.rewards.grammar.train_tower=True",), "rewards.grammar.weight=0"),
        ((*TOWER, f"--config.rewards.grammar.head={__file__}"), "leave one of the two out"),
        (("--config.rewards.grammar.tower.steps=0",), "grammar.tower.steps=0"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, words):
    config = settings.load_config("emoji_reinforce", flags)
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        build_policy(config)
        build_rewards(config)


def test_texts_for_other_towers_need_no_references():
    towers = LoadedModel(tiny.towers(), tiny.params(), tiny.tokenizer(), tiny.PREPROCESSING, {}, 0)
    rewards = Rewards(clip_score=ClipScore(weight=1.0))
    captioner = Tokenizer.train(["the bright thing"] * 2, 275)
    tokens_BL = captioner.encode_batch(["bright thing", "the thing"], 12)
    rows = {"index": np.array([7, 2]), "mask": np.array([True, True]), "image": np.zeros(2)}
    given = HostScores(rewards, captioner, [], {}, towers, "a ")(rows, tokens_BL[:, None])
    (tokens_BJT,) = given.values()
    expected_BT = towers.text_tokens(["a bright thing", "a the thing"])
    np.testing.assert_array_equal(tokens_BJT[:, 0], expected_BT)


def test_another_file_of_the_grammar_is_refused(tmp_path):
    root, term = epath.Path(tmp_path), Grammar(weight=1.0, train_tower=True)
    kept, beginnings = root / "grammar_tower.npz", root / "started_from.json"
    beginnings.write_text('{"rewards.towers": {"step": 3}}')
    kept.write_bytes(b"one")
    write_grammar_beginning(term, root, beginnings)
    then = json.loads(beginnings.read_text())
    assert then["rewards.towers"] == {"step": 3}
    check_grammar_beginning(term, root, then[BEGINNING])
    kept.write_bytes(b"other")
    write_grammar_beginning(term, root, beginnings)  # which changes nothing
    assert json.loads(beginnings.read_text()) == then
    with pytest.raises(UserError, match=r"grammar_tower\.npz is not what this run began with"):
        check_grammar_beginning(term, root, then[BEGINNING])
    kept.unlink()
    with pytest.raises(UserError, match="put that file back"):
        check_grammar_beginning(term, root, then[BEGINNING])
    check_grammar_beginning(Grammar(), root, then[BEGINNING])


@pytest.mark.slow
def test_what_is_missing_or_the_same_is_refused(runs, tmp_path):
    def refused(*flags):
        process = start(*flags)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2 and len(output.splitlines()) == 1, output
        assert not (tmp_path / "run").exists()
        return output

    base = ("reinforce", f"--config={runs}/tiny.py", f"--workdir={tmp_path}/run")
    assert "--checkpoint" in refused(*base)
    with_captioner = (*base, f"--checkpoint={runs}/captioner")
    assert "--towers" in refused(*with_captioner)
    assert "no contrastive towers" in refused(*with_captioner, f"--towers={runs}/captioner")
    assert "needs a captioner" in refused(*base, f"--checkpoint={runs}/towers")
    judged = (f"--towers={runs}/towers", f"--config.evaluate.judge={runs}/towers")
    assert "judges nothing" in refused(*with_captioner, *judged)
    long = (f"--towers={runs}/towers", "--config.sampling.max_length=9")
    assert "sampling.max_length=9" in refused(*with_captioner, *long)
    train = ("train", f"--config={runs}/tiny.py", f"--workdir={tmp_path}/run")
    assert "capjax reinforce" in refused(*train)
