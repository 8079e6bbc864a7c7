"""The table of docs/objectives.md: objectives compared on the embedded corpus at equal cost.

    for name in cap cappa clip siglip coca; do
        capjax train --config=emoji_objectives:$name --workdir=runs/$name \
            --config.total_steps=1500 --config.optimizer.cooldown_steps=750
        capjax evaluate --workdir=runs/$name --probes
    done
    python tools/matched_comparison.py runs/cap runs/cappa runs/clip runs/siglip runs/coca

Prints a row of a Markdown table for each run, on one split. Probes and losses are read from what
`capjax evaluate` wrote. Retrieval is by the run's towers, or, where it has none, by likelihood:
each image among all distinct captions of the split by log p(caption | image), each caption among
all images. Where captions repeat, only another caption is a rival.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import capjax
from capjax.data.captions import clean_text
from capjax.data.sources import open_source
from capjax.evaluation.measured import read_measured

COLUMNS = {
    "image to text R@1": "image_to_text_r1",
    "text to image R@1": "text_to_image_r1",
    "k-NN": "knn_top1",
    "linear probe": "linear_probe_top1",
    "10-shot": "fewshot_10_top1",
    "zero-shot": "zeroshot_top1",
    "zero-shot by likelihood": "zeroshot_likelihood_top1",
    "caption loss": "caption_loss",
}


def likelihood_retrieval(workdir: Path, split: str, source: str) -> dict[str, float]:
    """Recall at 1 both ways by the captioner's likelihood; a tie is a miss."""
    model = capjax.load(workdir)
    examples = open_source(model.config["evaluate"]["splits"].get(split, f"{source}:{split}"))
    wanted = model.config["captions"]["sources"]
    texts, images = [], []
    for index in range(len(examples)):
        example = examples[index]
        captions = [c.text for c in example.captions if c.source in wanted or not wanted]
        texts.append(clean_text(captions[0], model.config["captions"]["lower"]))
        images.append(example.image)
    distinct, caption_N = np.unique(texts, return_inverse=True)
    score_NM = model.classify(images, distinct.tolist(), batch_size=16)
    own_N = score_NM[np.arange(len(texts)), caption_N]
    hits_N = (score_NM >= own_N[:, None]).sum(1) == 1
    is_own_NM = caption_N[:, None] == np.arange(len(distinct))[None]
    best_M = np.where(is_own_NM, score_NM, -np.inf).max(0)
    rivals_M = np.where(is_own_NM, -np.inf, score_NM).max(0)
    return {
        "image_to_text_r1": float(hits_N.mean()),
        "text_to_image_r1": float((best_M > rivals_M).mean()),
    }


def figures(workdir: Path, split: str) -> dict[str, float]:
    """All that is known of a run on a split."""
    found: dict[str, float] = {}
    for name in (split, f"{split}@probes"):
        path = workdir / "evaluations" / f"{name}.json"
        if path.exists():
            found |= read_measured(path).metrics
    if "image_to_text_r1" not in found:
        found |= likelihood_retrieval(workdir, split, "emoji")
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", nargs="+", type=Path)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    print("| run | steps | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for workdir in args.workdirs:
        steps = json.loads((workdir / "summary.json").read_text())["steps"]
        found = figures(workdir, args.split)
        cells = [
            "" if found.get(name) is None else f"{found[name]:.3f}" for name in COLUMNS.values()
        ]
        print(f"| {workdir.name} | {steps} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
