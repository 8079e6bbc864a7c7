"""Captions a second: capjax and Hugging Face's VisionEncoderDecoder at the same sizes.

    python tools/bench/decode.py --rounds=3
    python tools/bench/decode.py --size=L/14 --image_size=224 --decoder_depth=12 --dtypes=bfloat16 \
        --batch_size=512      # on a GPU; and with --batch_size=16

Random weights write exactly `--new_tokens` tokens a caption from images on the device. Modes:

    encode     the image encoder alone
    greedy     with a key/value cache
    beam4      four beams
    guided     greedy with classifier-free guidance (capjax only)
    sample8    eight draws an image, top_p .9 (capjax only)

In each round every framework and type runs in a process of its own, where the modes take turns.
Prints a JSON line for each, then ratios of medians over rounds, in wall time and CPU-seconds:
Hugging Face's time over capjax's, and each mode's over that of greedy.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from peers import Job
from timing import alternate


def ours(job: Job, new_tokens: int) -> tuple[dict[str, Callable], dict[str, Any]]:
    """(what to call by mode, facts) of capjax."""
    import jax
    import jax.numpy as jnp
    from peers.ours import captioner

    from capjax.decoding.generate import generate
    from capjax.decoding.options import DecodingOptions

    model = captioner(job)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    shape = (job.batch_size, job.image_size, job.image_size, 3)
    images = jnp.asarray(rng.integers(0, 256, shape, np.uint8))
    encode = jax.jit(model.encode)

    def run(**fields) -> Callable:
        options = DecodingOptions(max_length=new_tokens, min_length=new_tokens, **fields)
        return lambda: jax.block_until_ready(generate(model, params, images, options))

    calls = {
        "encode": lambda: jax.block_until_ready(encode(params, images)),
        "greedy": run(),
        "beam4": run(num_beams=4),
        "guided": run(guidance_scale=1.5),
        "sample8": run(temperature=1.0, top_p=0.9, num_captions=8),
    }
    return calls, {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def hugging_face(job: Job, new_tokens: int) -> tuple[dict[str, Callable], dict[str, Any]]:
    """The same of transformers on torch, eager."""
    import torch
    import transformers
    from peers.hugging_face import vision_encoder_decoder

    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = vision_encoder_decoder(job._replace(text_length=new_tokens + 8))
    model = model.eval().to(device, getattr(torch, job.dtype))
    model.generation_config.update(decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
    shape = (job.batch_size, 3, job.image_size, job.image_size)
    pixels = (torch.rand(shape, device=device) * 2 - 1).to(getattr(torch, job.dtype))
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}

    def waited(call: Callable) -> Callable:
        def run() -> None:
            with torch.inference_mode():
                call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def generate(num_beams: int) -> Callable:
        return waited(
            lambda: model.generate(
                pixel_values=pixels, do_sample=False, num_beams=num_beams, **length
            )
        )

    calls = {
        "encode": waited(lambda: model.encoder(pixel_values=pixels)),
        "greedy": generate(1),
        "beam4": generate(4),
    }
    kind = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return calls, {"torch": torch.__version__, "device": kind}


def measure(peer: str, job: Job, new_tokens: int, steps: int) -> dict[str, Any]:
    """One line: what each mode took, and captions a second."""
    calls, facts = {"ours": ours, "hugging_face": hugging_face}[peer](job, new_tokens)
    timings = alternate(calls, steps, warmup=1)
    return {
        "peer": peer,
        "dtype": job.dtype,
        "size": job.size,
        "image_size": job.image_size,
        "batch_size": job.batch_size,
        "new_tokens": new_tokens,
        "wall_s": {mode: round(time.wall_s, 4) for mode, time in timings.items()},
        "cpu_s": {mode: round(time.cpu_s, 4) for mode, time in timings.items()},
        "images_per_s": {
            mode: round(job.batch_size / time.wall_s, 2) for mode, time in timings.items()
        },
        **facts,
    }


def ratios(lines: list[dict[str, Any]]) -> list[str]:
    """The table: medians over rounds."""
    found: dict[tuple, list[float]] = {}
    for line in lines:
        for clock, (mode, value) in itertools.chain(
            (("wall_s", item) for item in line["wall_s"].items()),
            (("cpu_s", item) for item in line["cpu_s"].items()),
        ):
            found.setdefault((line["dtype"], line["peer"], mode, clock), []).append(value)
    medians = {key: statistics.median(values) for key, values in found.items()}
    rows = ["dtype     peer          mode     wall s   CPU s    x greedy  CPU    HF/this  CPU"]
    for dtype, peer, mode, clock in medians:
        if clock != "wall_s":
            continue
        cells = [medians[dtype, peer, mode, clock] for clock in ("wall_s", "cpu_s")]
        greedy = [medians[dtype, peer, "greedy", clock] for clock in ("wall_s", "cpu_s")]
        other = [medians.get((dtype, "hugging_face", mode, clock)) for clock in ("wall_s", "cpu_s")]
        beside = [f"{o / c:7.2f}" if o else "      -" for o, c in zip(other, cells, strict=True)]
        times = [f"{c / g:8.2f}" for c, g in zip(cells, greedy, strict=True)]
        rows.append(
            f"{dtype:9} {peer:13} {mode:8} {cells[0]:7.3f} {cells[1]:7.3f} "
            f"{times[0]} {times[1]} {beside[0]} {beside[1]}"
        )
    return rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="S/16")
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--decoder_depth", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--peers", default="ours,hugging_face")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--here", action="store_true", help="one entry, in this process")
    args = parser.parse_args()
    dtypes, peers = args.dtypes.split(","), args.peers.split(",")
    if args.here:
        job = Job(
            size=args.size,
            image_size=args.image_size,
            decoder_depth=args.decoder_depth,
            vocab_size=args.vocab_size,
            batch_size=args.batch_size,
            text_length=args.new_tokens,
            dtype=dtypes[0],
            variant="unrolled",
        )
        print(json.dumps(measure(peers[0], job, args.new_tokens, args.steps)), flush=True)
        return
    lines = []
    for _, dtype, peer in itertools.product(range(args.rounds), dtypes, peers):
        command = [sys.executable, *sys.argv, f"--dtypes={dtype}", f"--peers={peer}", "--here"]
        made = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        print(made.stdout, end="", flush=True)
        lines.append(json.loads(made.stdout.splitlines()[-1]))
    print("\n".join(ratios(lines)))


if __name__ == "__main__":
    main()
