"""CIDEr-D of many captions: capjax beside pycocoevalcap, in turns, and how far they differ.

    python tools/bench/ciderd.py --images=5000 --references=5 --rounds=5

The captions are those of tests/fixtures/coco_fakecap.json.gz, images drawn with replacement, and of
their words one in five exchanged for one of a long-tailed vocabulary, so that as many n-grams are
new as among photographs. Both start from strings of tokens and count the document frequencies.
Prints one JSON line for each and one that compares them:

    ms              the median wall time, which other users of the machine lengthen
    cpu_s           the median of its seconds of this process's cores
    ratio           pycocoevalcap / capjax: of wall time, of CPU-seconds
    largest_difference   of any caption's score
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
from pycocoevalcap.cider.cider import Cider
from timing import alternate

from capjax.rewards.consensus import cider_d

FIXTURE = Path(__file__).parents[2] / "tests" / "fixtures" / "coco_fakecap.json.gz"
VOCABULARY = 20_000


def draw(num_images: int, num_references: int, seed: int) -> tuple[list[str], list[list[str]]]:
    """Candidates and references, tokens with spaces between."""
    items = json.loads(gzip.decompress(FIXTURE.read_bytes()))["items"]
    rng = np.random.default_rng(seed)

    def varied(caption: str) -> str:
        words = caption.split()
        for place in np.flatnonzero(rng.random(len(words)) < 0.2):
            words[place] = f"w{int(VOCABULARY ** rng.random())}"
        return " ".join(words)

    drawn = [items[place] for place in rng.integers(len(items), size=num_images)]
    references = [
        [varied(item["refs"][i % len(item["refs"])]) for i in range(num_references)]
        for item in drawn
    ]
    return [varied(item["cand"]) for item in drawn], references


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    candidates, references = draw(args.images, args.references, args.seed)
    theirs = dict(enumerate(references)), {i: [text] for i, text in enumerate(candidates)}
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["capjax"] = cider_d(
            [text.split() for text in candidates],
            [[text.split() for text in image] for image in references],
        )

    def peer() -> None:
        _, found["pycocoevalcap"] = Cider().compute_score(*theirs)

    times = alternate({"capjax": ours, "pycocoevalcap": peer}, args.rounds, warmup=1)
    about = {"images": args.images, "references": args.references}
    for name, timing in times.items():
        figures = {"ms": round(1e3 * timing.wall_s, 1), "cpu_s": round(timing.cpu_s, 3)}
        mean = float(found[name].mean())
        print(json.dumps({"name": name, **about, **figures, "cider_d": mean}))
    wall, cpu = (
        round(peer / ours, 2)
        for ours, peer in zip(times["capjax"], times["pycocoevalcap"], strict=True)
    )
    largest = float(np.abs(found["capjax"] - found["pycocoevalcap"]).max())
    print(json.dumps({"ratio": wall, "ratio_cpu": cpu, "largest_difference": largest}))


if __name__ == "__main__":
    main()
