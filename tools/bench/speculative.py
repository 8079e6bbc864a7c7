"""Captions a second of a trained CapPa model: greedy search, with refilled slots, and with drafts.

    capjax train --config=emoji_cappa --workdir=runs/cappa
    python tools/bench/speculative.py --checkpoint=runs/cappa --source=emoji:composition

Ways of writing the same captions, taking turns on images that are already encoded:

    greedy       one token a pass, the batch in step until its longest caption ends
    slots        the same, a caption that is done making room for the next image
    draft N      the parallel mode drafts, N tokens are verified a pass; and with slots

Prints for each: tokens a pass (of captions under way), whether the captions are greedy's, captions
a second in wall time and CPU time, and the ratio to greedy's.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from capjax.data.sources import open_source
from capjax.decoding import speculative
from capjax.decoding.generate import generate
from capjax.decoding.load import load
from capjax.decoding.options import DecodingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="of a model with a parallel mode")
    parser.add_argument("--source", default="emoji:composition")
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--draft_lengths", type=int, nargs="+", default=[1, 2, 3, 5, 13])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    loaded, source = load(args.checkpoint), open_source(args.source)
    model, params = loaded.towers.captioner, loaded.params
    if model is None or model.config.mask_token is False:
        raise SystemExit(f"--checkpoint={args.checkpoint}: expected a captioner with a mask token")
    rows = np.linspace(0, len(source) - 1, min(args.num_images, len(source))).astype(int)
    pixels = [loaded.pixels(source[int(row)].image) for row in rows]
    images = jnp.stack([image for image in pixels if isinstance(image, np.ndarray)])
    count = len(images)
    memory_BPD = jax.jit(model.encode)(params, images)

    asked = {"greedy": DecodingOptions(), "slots": DecodingOptions(num_slots=args.slots)}
    for length in args.draft_lengths:
        asked[f"draft {length}"] = DecodingOptions(draft_length=length)
        asked[f"draft {length}, slots"] = DecodingOptions(draft_length=length, num_slots=args.slots)

    write = functools.partial(generate, model, params, memory_BPD)
    calls = {
        name: functools.partial(lambda options: jax.block_until_ready(write(options)), options)
        for name, options in asked.items()
    }
    expected = np.asarray(calls["greedy"]().tokens_BSL)
    lengths = (expected[:, 0] != 0).sum(1)
    print(f"{count} images of {args.source}: {lengths.mean():.2f} tokens, at most {lengths.max()}")
    timings = alternate(calls, args.rounds)
    base = timings["greedy"]
    print("way                 tokens/pass  same  captions/s    x  captions/CPU s    x")
    for name, time in timings.items():
        same = (np.asarray(calls[name]().tokens_BSL) == expected).all((1, 2)).sum()
        passes = "       1.00"
        if asked[name].draft_length:
            written = speculative.write_by_rows(
                model,
                params,
                memory_BPD,
                jnp.arange(count),
                jnp.ones(count, bool),
                jax.random.key(0),
                model.config.text_length,
                asked[name],
            )
            passes = f"{float(written.num_B.sum() / written.num_passes_B.sum()):11.2f}"
        print(
            f"{name:19} {passes}  {same:4}  {count / time.wall_s:10.0f} "
            f"{base.wall_s / time.wall_s:4.2f}  {count / time.cpu_s:14.0f} "
            f"{base.cpu_s / time.cpu_s:4.2f}"
        )


if __name__ == "__main__":
    main()
