"""Classes scored as a tree of their names' tokens, against one full decoder pass a class.

    python tools/bench/class_scoring.py --names=FILE --tokenizer=FILE --prompt="a photo of a {}"

Names are the lines of a file, by default captions of the embedded corpus, and the tokenizer is by
default trained on those. The model is a CapPa with random weights, S/16 at 128 px with six decoder
layers and 32,000 pieces where flags say nothing else. Images are encoded beforehand for all alike:

    tree         `score_tree`: every node of the tree once an image
    passes       a pass a class in `lax.map`, texts padded to the longest of the names
    whole        the same, padded to the model's text length, as captions are
    rows         `score_tokens` of 32 classes side by side: memory projected once for those

Prints a JSON line for each, of seconds for all classes and all images (the medians of calls that
take turns; `passes` and `whole` are timed on `--sample` classes and scaled up), and one with the
ratios to `tree` and the largest difference of a class's score.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from capjax.data.sources import open_source
from capjax.data.tokenizer import PAD_ID, Tokenizer
from capjax.decoding.classify import score_tree
from capjax.decoding.score import score, score_tokens, total
from capjax.decoding.token_tree import CHUNK, build_tree
from capjax.models.captioner import Captioner, CaptionerConfig
from capjax.models.presets import variant

ROWS = 32


def class_texts(args: argparse.Namespace) -> tuple[list[str], Tokenizer]:
    """The names in their prompt, and what cuts them to tokens."""
    if args.names:
        names = Path(args.names).read_text().splitlines()
    else:
        source = open_source("emoji:train")
        found = (c.text.lower() for i in range(len(source)) for c in source[i].captions)
        names = list(dict.fromkeys(found))
    texts = [args.prompt.format(name) for name in names[: args.classes]]
    if args.tokenizer:
        return texts, Tokenizer.from_file(args.tokenizer)
    return texts, Tokenizer.train(names, args.vocab_size)


def random_params(model: Captioner):
    """Initial parameters with a head that is not zero."""
    params = model.init(jax.random.key(0))
    head = params["decoder"]["head"]
    kernel = jax.random.normal(jax.random.key(1), head["kernel"].shape) * 0.05
    return params | {"decoder": params["decoder"] | {"head": head | {"kernel": kernel}}}


@functools.partial(jax.jit, static_argnums=0)
def passes(model: Captioner, params, memory_BPD, labels_TL):
    """[T, B]: a pass for every class, one after the other."""
    batch = len(memory_BPD)

    def one(labels_L):
        labels_BL = jnp.broadcast_to(labels_L[None], (batch, len(labels_L)))
        return score(model, params, memory_BPD, labels_BL)

    return jax.lax.map(one, labels_TL)


def by_rows(model: Captioner, params, memory_BPD, labels_TL) -> np.ndarray:
    """[B, T]."""
    found = []
    for start in range(0, len(labels_TL), ROWS):
        part = labels_TL[start : start + ROWS]
        labels_BSL = jnp.broadcast_to(part[None], (len(memory_BPD), *part.shape))
        found.append(total(np.asarray(score_tokens(model, params, memory_BPD, labels_BSL))))
    return np.concatenate(found, axis=1)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", default="", help="file of class names, one a line")
    parser.add_argument("--tokenizer", default="", help="SentencePiece model")
    parser.add_argument("--prompt", default="{}", help='text of a class, such as "a photo of a {}"')
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=50, help="classes that `passes` is timed on")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--size", default="S/16")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--decoder_depth", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--text_length", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="nodes read at a time")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    texts, tokenizer = class_texts(args)
    whole_TL = tokenizer.encode_batch(texts, args.text_length)
    labels_TL = whole_TL[:, : int((whole_TL != PAD_ID).sum(1).max())]
    model = Captioner(
        CaptionerConfig(
            **variant(args.size),
            image_size=args.image_size,
            decoder_depth=args.decoder_depth,
            vocab_size=args.vocab_size,
            text_length=args.text_length,
            dtype=args.dtype,
        )
    )
    params = random_params(model)
    shape = (args.batch_size, args.image_size, args.image_size, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    memory = jax.jit(model.encode)(params, images)
    tree = jax.tree.map(jnp.asarray, build_tree(labels_TL, args.chunk))
    some = [jnp.asarray(x[:: max(1, len(x) // args.sample)]) for x in (labels_TL, whole_TL)]

    calls = {
        "tree": lambda: jax.block_until_ready(score_tree(model, params, memory, tree)),
        "passes": lambda: jax.block_until_ready(passes(model, params, memory, some[0])),
        "whole": lambda: jax.block_until_ready(passes(model, params, memory, some[1])),
        "rows": lambda: by_rows(model, params, memory, some[0]),
    }
    timings = alternate(calls, args.rounds, warmup=1)
    scale = dict.fromkeys(calls, len(texts) / len(some[0])) | {"tree": 1.0}
    seconds = {
        name: {"wall_s": timing.wall_s * scale[name], "cpu_s": timing.cpu_s * scale[name]}
        for name, timing in timings.items()
    }
    for name, timing in seconds.items():
        print(json.dumps({"entry": name} | {k: round(v, 2) for k, v in timing.items()}))
    found = np.asarray(passes(model, params, memory, some[0])).T
    step = max(1, len(texts) // args.sample)
    ours = total(np.asarray(score_tree(model, params, memory, tree)))[:, ::step]
    print(
        json.dumps(
            {
                "classes": len(texts),
                "tokens": int((labels_TL != PAD_ID).sum()),
                "longest": labels_TL.shape[1],
                "nodes": int(tree.is_node_XC.sum()),
                "chunks": list(tree.token_XC.shape),
                "max_difference": float(np.abs(found - ours).max()),
            }
            | {
                f"{name}_over_tree_{unit}": round(seconds[name][unit] / seconds["tree"][unit], 2)
                for name in ("passes", "whole", "rows")
                for unit in ("wall_s", "cpu_s")
            }
        )
    )


if __name__ == "__main__":
    main()
