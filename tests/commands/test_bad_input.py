"""Everything a user can get wrong: one line, status 2, no compile, and nothing is left behind."""

import dataclasses
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from capjax import cli
from capjax.checkpoint import Checkpointer, load_params
from capjax.commands import build, settings
from capjax.commands.summary import run_info
from capjax.data.tokenizer import Tokenizer
from capjax.training.workdir import open_workdir

TEXTS = ["a red cat", "a blue dog on a mat", "two green birds"]
COMPILED = "/jax/core/compile/backend_compile_duration"  # told of each program, kept on disk or not

OVERRIDES = [
    ("total_step=3", "did you mean total_steps"),
    ("total_steps=many", "total_steps=many: expected a whole number"),
    ("total_steps=0", "total_steps=0"),
    ("total_epochs=1", "both set"),
    ("batch_size=12", "batch_size=12 does not divide"),
    ("batch_size=0", "batch_size=0"),
    ("mesh.data=3", "mesh"),
    ("mesh.fsdp=-1", "only one axis may be -1"),
    ("model.num_heads=5", "multiple"),
    ("model.variant=B/16", "changes nothing"),
    ("model.variant=Z/16", "variant='Z/16': no size is called 'Z'"),
    ("model.patch_size=7", "patch_size=7"),
    ("model.posemb=rope", "posemb"),
    ("model.dtype=float16", "dtype"),
    ("model.remat=some", "remat"),
    ("model.width=262144", "of each device, which has"),
    ("data.source=emoji:trian", "did you mean"),
    ("data.source=/no/such/place", "/no/such/place"),
    ("data.source=s4://bucket/shards", "s4://bucket/shards"),
    ("data.source={d}/empty", "{d}/empty"),
    ("data.text_length=1", "text_length=1"),
    ("data.bad_budget=-1", "data.bad_budget=-1.0: expected at least 0"),
    ("data.tokenizer.path={d}/notes.txt", "notes.txt': not a SentencePiece model"),
    ("data.tokenizer.path=/no/tokenizer.model", "/no/tokenizer.model"),
    ("captions.weights=1,2", "captions.weights"),
    ("captions.datasets.web.lower=false", "data.mixture has no such source"),
    ("preprocessing.mode=squeeze", "mode"),
    ("preprocessing.image_size=0", "image_size=0"),
    ("augment.crop_scale=0.5,2", "crop_scale"),
    ("augment.color_jitter=2", "color_jitter"),
    ("reading.num_threads=-1", "num_threads"),
    ("objective.captioning.parallel_fraction=1.5", "parallel_fraction"),
    ("objective.captioning.weight=0", "objective"),
    ("objective.captionning.weight=1", "did you mean"),
    ("optimizer.name=adamm", "optimizer.name"),
    ("optimizer.learning_rate=-1", "learning_rate"),
    ("optimizer.learning_rate=nan", "learning_rate"),
    ("optimizer.schedule=step", "schedule"),
    ("optimizer.warmup_steps=1000", "warmup"),
    ("accumulation_steps=5", "accumulation_steps"),
    ("evaluate.splits.concept=/no/split", "/no/split"),
    ("evaluate.batch_size=3", "evaluate.batch_size"),
    ("checkpoint.keep=0", "checkpoint.keep=0: expected at least 1"),
    ("checkpoint.keep_every_steps=-1", "checkpoint.keep_every_steps=-1: expected at least 0"),
    ("checkpoint.best_mode=most", "expected max or min"),
    ("checkpoint.best_metric=eval/val/cider", "expected a metric of what is evaluated, eval/conc"),
    ("checkpoint.best_metric=eval/concept/loss", "evaluate.every_steps=0 must be a multiple of"),
    ("warm_start.path={d}/nothing", "{d}/nothing"),
    ("warm_start.path={d}/damaged", "no good checkpoint in {d}/damaged"),
    ("warm_start.path={d}/captioner", "another tokenizer"),
    ("log_every_steps=0", "log_every_steps"),
]
NEW = "--workdir={d}/new"
TRAIN = f"train --config={{d}}/tiny.py {NEW}"
REINFORCE = f"reinforce --config=emoji_reinforce {NEW}"
FROM = f"{REINFORCE} --checkpoint={{d}}"
CAPTION = "caption --checkpoint={d}/captioner --input={d}/photos --output={d}/new.jsonl"
LINES = [
    ("", "name a command"),
    ("trian", "did you mean train"),
    # a config and its flags
    (f"train {NEW}", "--config"),
    ("train --config={d}/tiny.py", "--workdir"),
    (f"{TRAIN} --worksdir=x", "did you mean --workdir"),
    (f"{TRAIN} --config.batch_size", "has no value"),
    (f"train --config=emoji_quikstart {NEW}", "did you mean emoji_quickstart"),
    (f"train --config={{d}}/none.py {NEW}", "none.py"),
    (f"train --config={{d}}/broken.py {NEW}", "broken.py"),
    (f"train --config={{d}}/empty.py {NEW}", "get_config"),
    (f"train --config=emoji_reinforce {NEW}", "capjax reinforce"),
    # workdirs
    ("train --config={d}/tiny.py --workdir={d}/notes.txt", "notes.txt is a file"),
    ("train --config={d}/tiny.py --workdir={d}/notes.txt/run", "notes.txt"),
    ("train --config={d}/tiny.py --workdir=/proc/run", "/proc/run"),
    ("train --config={d}/tiny.py --workdir={d}/other", "another configuration (batch_size"),
    ("train --config={d}/tiny.py --workdir={d}/torn", "config.json is damaged"),
    ("train --config={d}/tiny.py --workdir={d}/half", "no config.json"),
    ("train --config={d}/tiny.py --workdir={d}/locked", "is being written by process"),
    # processes and devices
    (f"{TRAIN} --num_processes=2", "give all three"),
    (f"{TRAIN} --process_id=0", "give all three"),
    (f"{TRAIN} --coordinator=a:1 --num_processes=2 --process_id=2", "the id from 0 to"),
    (f"{TRAIN} --coordinator=a --num_processes=2 --process_id=0", "expected HOST:PORT"),
    (f"{TRAIN} --coordinator=a:99999 --num_processes=2 --process_id=0", "expected HOST:PORT"),
    (f"{TRAIN} --num_cpu_devices=0", "--num_cpu_devices=0: expected at least 1"),
    (f"{TRAIN} --compile_cache=/proc/x", "--compile_cache=/proc/x: cannot write there"),
    # the other commands
    (REINFORCE, "--checkpoint=DIR"),
    (f"{FROM}/nothing", "{d}/nothing"),
    (f"{FROM}/damaged", "no good checkpoint"),
    (f"{FROM}/captioner", "batch_size=60 does not divide"),
    (f"{FROM}/captioner --config.batch_size=64", "--towers"),
    (
        f"{REINFORCE} --checkpoint={{d}}/captioner --config.policy.algorithm=sct",
        "did you mean scst",
    ),
    (f"reinforce --config={{d}}/tiny.py {NEW}", "one of `capjax train`"),
    (f"{CAPTION} --checkpoint={{d}}/nothing", "no checkpoint in"),
    (f"{CAPTION} --checkpoint={{d}}/damaged", "no good checkpoint"),
    (f"{CAPTION} --step=9", "step=9"),
    (f"{CAPTION} --input={{d}}/nothing", "{d}/nothing"),
    (f"{CAPTION} --input={{d}}/empty", "no images in"),
    (f"{CAPTION} --output={{d}}/empty/no/x.jsonl", "there is no directory"),
    (f"{CAPTION} --output=/proc/run/shards", "/proc/run/shards"),
    (f"{CAPTION} --temperature=-1", "temperature=-1.0: expected 0"),
    (f"{CAPTION} --max_length=99", "max_length=99: expected 1 to 8"),
    (f"{CAPTION} --process_id=2 --num_processes=2", "--process_id=2"),
    ("evaluate --workdir={d}/nothing", "{d}/nothing"),
    ("evaluate --workdir={d}/captioner --split=emoji:val", "NAME=SOURCE"),
    ("evaluate --workdir={d}/damaged --split=v=emoji:val", "no good checkpoint"),
    ("evaluate --captions={d}/nothing.jsonl --references={d}/notes.txt", "notes.txt:1: not JSON"),
    ("evaluate --compare {d}/captioner {d}/nothing", "no *.jsonl in this directory"),
    ("report --workdir={d}/nothing", "{d}/nothing"),
    ("report --workdir={d}/empty", "{d}/empty"),
    ("checkpoint list {d}/nothing", "{d}/nothing"),
    ("checkpoint verify {d}/empty", "{d}/empty"),
    ("convert --input={d}/no.npz --output={d}/new", "no.npz"),
    ("convert --input={d}/damaged --output={d}/new.npz", "no good checkpoint"),
    ("serve --checkpoint={d}/nothing", "no checkpoint in"),
    ("serve --checkpoint={d}/captioner --port=99999", "port=99999"),
    ("plan --config={d}/tiny.py --topology=v9:8x8", "v9"),
    ("config show emoji_quikstart", "did you mean emoji_quickstart"),
    ("data prepare {d}/nothing --output={d}/new", "{d}/nothing"),
    ("data prepare emoji:val --output={d}/notes.txt", "notes.txt"),
    ("data stats s4://bucket/x", "s4://bucket/x"),
    ("data tokenizer emoji:val --vocab_size=10 --output={d}/new.model", "vocab_size=10"),
    ("data boost --input=emoji:val --output={d}/new --model=m --endpoint=ftp://x", "ftp://x"),
    ("doctor --workdir={d}/notes.txt", "notes.txt"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_config):
    """A folder with a config, two runs that were not trained, and what is no run."""
    root = tmp_path_factory.mktemp("place")
    words, others = (Tokenizer.train(x, 290) for x in (TEXTS, [x[::-1] for x in TEXTS]))
    assert words.vocab_size == others.vocab_size and words != others
    (root / "words.model").write_bytes(words.model_bytes)
    (root / "tiny.py").write_text(
        f"import runpy\n\ndef get_config():\n"
        f"    config = runpy.run_path({str(tiny_config)!r})['get_config']()\n"
        f"    config.data.tokenizer.path = {str(root / 'words.model')!r}\n    return config\n"
    )
    (root / "broken.py").write_text("def get_config(:\n")
    (root / "empty.py").write_text("x = 1\n")
    (root / "notes.txt").write_text("notes")
    for name in ("empty", "photos", "torn", "half/checkpoints"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (20, 24), "red").save(root / "photos" / "a.png")
    (root / "torn" / "config.json").write_text("{")

    config = settings.load_config(str(root / "tiny.py"))
    plan = build.build_run(config, str(root / "new"))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), plan.towers.abstract_params())
    info = dataclasses.replace(run_info(plan), tokenizer_model=others.model_bytes)
    with Checkpointer(root / "captioner" / "checkpoints", info) as checkpointer:
        checkpointer.save(3, {"params": jax.device_put(params)}, {"examples_seen": 0})
    load_params(root / "captioner")  # the digests of what is read are programs, of no model
    shutil.copytree(root / "captioner", root / "damaged")
    for path in (root / "damaged").rglob("state/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    resolved = settings.resolved_dict(config)
    open_workdir(root / "other", resolved | {"batch_size": 8}).close()
    with open_workdir(root / "locked", resolved):
        yield root


@pytest.fixture(scope="module")
def compiled():
    """A list that grows by each program which JAX compiles or finds in its cache."""
    found = []

    def hear(event: str, *_, **__) -> None:
        if event == COMPILED:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(hear)
    yield found
    jax.monitoring.unregister_event_duration_listener(hear)


def contents(directory: Path) -> dict[Path, bytes | None]:
    """Every file below with its bytes, and every directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in directory.rglob("*")}


def test_what_compiles_is_heard(compiled):
    before = len(compiled)
    jax.jit(lambda x: 3 * x)(np.ones(3, np.float32))
    assert len(compiled) > before


@pytest.mark.parametrize(
    ("line", "words"),
    [*LINES, *((f"{TRAIN} --config.{override}", words) for override, words in OVERRIDES)],
    ids=lambda text: text.replace(TRAIN, "train").replace("{d}/", ""),
)
def test_bad_input_is_one_line_and_leaves_nothing(line, words, place, compiled, capsys):
    before, num_compiled = contents(place), len(compiled)
    status = cli.main([word.format(d=place) for word in shlex.split(line)])
    printed = capsys.readouterr()
    assert status == 2, printed.err
    assert printed.err.startswith("capjax: error: ")
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert words.format(d=place) in printed.err
    assert not printed.out
    assert len(compiled) == num_compiled
    assert contents(place) == before


def test_too_little_disk(place, compiled, capsys, monkeypatch):
    before, num_compiled = contents(place), len(compiled)
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert cli.main([word.format(d=place) for word in TRAIN.split()]) == 2
    assert "free" in capsys.readouterr().err
    assert len(compiled) == num_compiled and contents(place) == before
