"""Runs as `capjax train` and `capjax evaluate` leave them, in small."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from capjax.data.sources import open_source
from capjax.evaluation.attention import WordMaps, write_word_maps
from capjax.evaluation.measured import Measured, write_measured

SCRIPT = "<script>document.title = 'broken'</script>"
NUM_IMAGES = 30


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """`make_run(directory, shift=0.0)` writes a run there whose figures are moved by `shift`.

    Its split `concept` has 30 captions, of which the first is a script, every even one is exact,
    and every third is not what finds its image.
    """
    source = open_source("emoji:concept")
    examples = [source[index] for index in range(NUM_IMAGES)]
    keys = tuple(example.key for example in examples)

    def measured(shift: float, scale: float) -> Measured:
        number = np.arange(NUM_IMAGES, dtype=float)
        wrong = number % 3 == 0
        cider = (number / 10 + shift) / scale
        return Measured(
            metrics={
                "cider_d": float(cider.mean()),
                "caption_to_image_r1": 0.5 + 0.1 * scale + shift,
                "distinct_ratio": 1.0,
            },
            items={
                "cider_d": np.where(number == 7, np.nan, cider),
                "caption_to_image_rank": np.where(wrong, 5.0, 1.0),
                "nearest_key": np.roll(np.array(keys, object), 1),
                "image_to_text_rank": np.where(number == 4, 2.0, 1.0),
                "image_to_text_nearest": np.full(NUM_IMAGES, "another text", object),
            },
            keys=keys,
            intervals={"cider_d": (cider.mean() - 0.25, cider.mean() + 0.25)},
            skipped={"spice": "its parser <is> not here"},
            notes={"guidance_scale": scale, "tokenizer": "ptb"},
        )

    def make(directory: Path, shift: float = 0.0) -> Path:
        (directory / "captions").mkdir(parents=True)
        (directory / "evaluations").mkdir()
        (directory / "attention").mkdir()
        (directory / "config.json").write_text(json.dumps({"name": "a test", "seed": shift}))
        (directory / "summary.json").write_text(
            json.dumps({"steps": 40, "num_params": 1832256, "data_wait_fraction": 0.0123})
        )
        lines = [{"step": s, "wall_s": 3.0 * s, "train/loss": 5 / s + shift} for s in range(1, 41)]
        for step in (20, 40):
            lines.append(
                {
                    "step": step,
                    "wall_s": 3.0 * step,
                    "eval/concept/exact_match": step / 100 + shift,
                    "eval/concept/loss": 1.5,
                }
            )
        (directory / "metrics.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"step"'
        )
        captions = [f"caption {index}" for index in range(NUM_IMAGES)]
        captions[0] = SCRIPT
        if shift:
            captions[1] = "another caption"
        records = [
            {
                "key": example.key,
                "source": "emoji:concept",
                "index": index,
                "caption": captions[index],
                "references": [example.captions[0].text],
                "exact": index % 2 == 0,
                "unigram_f1": 0.25,
                "logprob": -1.0,
                "num_tokens": 3,
            }
            for index, example in enumerate(examples)
        ]
        (directory / "captions" / "concept.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        for name, scale in {"concept": 1.0, "concept@2": 2.0}.items():
            write_measured(directory / "evaluations" / f"{name}.json", measured(shift, scale))
        maps = {
            key: WordMaps(caption.split(), (2, 3), np.eye(6, dtype=np.uint8)[:2] * 255)
            for key, caption in zip(keys, captions, strict=True)
            if len(caption.split()) == 2
        }
        write_word_maps(directory / "attention" / "concept.json", maps)
        return directory

    return make


@pytest.fixture(scope="session")
def make_reinforced(make_run) -> Callable[..., Path]:
    """`make_reinforced(directory, judge=...)` makes such a run one of 40 steps of reinforcement.

    Its rewards are `cider_d` and the user's `colours`; there are two alarms, at steps 3 and 20,
    and captions of two images at steps 20 and 40.
    """

    def make(directory: Path, judge: str = "caption_to_image_r1") -> Path:
        make_run(directory)
        config = {"name": "a test", "policy": {}, "alarms": {"judge_metric": judge}}
        (directory / "config.json").write_text(json.dumps(config))
        names = ("reward", "reward_cider_d", "reward_colours", "reward_std", "kl")
        names += ("caption_tokens", "repetition", "unfinished")
        lines = [
            {"step": step, "wall_s": 3.0 * step} | {f"train/{name}": step / 40 for name in names}
            for step in range(1, 41)
        ]
        lines += [
            {"step": step, "wall_s": 3.0 * step, f"eval/{split}/{judge}": step / 80}
            for step in (20, 40)
            for split in ("concept", "val")
        ]
        alarms = [
            {"step": 3, "alarm": "step 3: captions have <b>9.0</b> tokens, 4.0 at first"},
            {"step": 20, "alarm": "step 20: 31% of the pairs of tokens in captions are repeated"},
        ]
        captions = json_lines(directory / "captions" / "concept.jsonl")[:2]
        said = [
            {"step": step, "key": captions[i]["key"], "caption": caption}
            for step in (20, 40)
            for i, caption in enumerate((SCRIPT, f"said at {step}"))
        ]
        (directory / "captions" / "over_time").mkdir()
        write_json_lines(directory / "metrics.jsonl", lines)
        write_json_lines(directory / "alarms.jsonl", alarms)
        write_json_lines(directory / "captions" / "over_time" / "concept.jsonl", said)
        return directory

    return make


def json_lines(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json_lines(path: Path, lines: list) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
