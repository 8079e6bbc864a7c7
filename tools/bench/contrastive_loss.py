"""The contrastive losses in tiles against those on whole logits: temporary memory, and time.

    python tools/bench/contrastive_loss.py --memory=32768,65536,131072 --time=4096,8192

Prints one JSON line a loss and batch. Of value and gradients in image, text, scale and bias:

    full        the textbook's lines on the B x B logits; of the sigmoid, those of big_vision's
                `trainers/proj/image_text/siglip.py`
    checkpoint  the same lines over chunks of 1024 captions, `lax.scan` with `jax.checkpoint`
    chunked     capjax's, its metrics included

`temp_mb` are XLA's temporary bytes, known from compiling alone; `floor_mb` are the embeddings and
their gradients. `cpu_s` are seconds of this process's cores, the median of rounds in which the
three take turns, and hold on a machine that others use too; `wall_s` are not. `chunked_over_full`
and `chunked_over_checkpoint` are ratios of the two.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
from jax import lax

from capjax.objectives.contrastive import sigmoid_loss, softmax_loss

CHUNK = 1024


def full_sigmoid(image_BD, text_BD, scale, bias):
    """SigLIP's loss."""
    logits_BB = image_BD @ text_BD.T * scale + bias
    signs_BB = 2 * jnp.eye(len(logits_BB)) - 1
    return -jax.nn.log_sigmoid(signs_BB * logits_BB).sum(1).mean()


def full_softmax(image_BD, text_BD, scale, bias):
    """CLIP's loss."""
    logits_BB = image_BD @ text_BD.T * scale + bias
    over_texts_B, over_images_B = (jax.nn.logsumexp(logits_BB, axis) for axis in (1, 0))
    return ((over_texts_B + over_images_B) / 2 - jnp.diagonal(logits_BB)).mean()


def checkpoint_sigmoid(image_BD, text_BD, scale, bias):
    """SigLIP's loss, a chunk of captions at a time, the logits computed again going back."""
    rows_B1 = jnp.arange(len(image_BD))[:, None]

    @jax.checkpoint
    def chunk(total, item):
        text_CD, rows_C = item
        logits_BC = image_BD @ text_CD.T * scale + bias
        signed_BC = jnp.where(rows_B1 == rows_C[None, :], logits_BC, -logits_BC)
        return total - jax.nn.log_sigmoid(signed_BC).sum(), None

    return lax.scan(chunk, jnp.zeros(()), _chunks(text_BD))[0] / len(image_BD)


def checkpoint_softmax(image_BD, text_BD, scale, bias):
    """CLIP's loss in the same way."""

    @jax.checkpoint
    def chunk(carry, item):
        logsumexp_B, total = carry
        logits_BC = image_BD @ item[0].T * scale + bias
        logsumexp_B = jnp.logaddexp(logsumexp_B, jax.nn.logsumexp(logits_BC, 1))
        return (logsumexp_B, total + jax.nn.logsumexp(logits_BC, 0).sum()), None

    start = jnp.full(len(image_BD), -1e30), jnp.zeros(())
    (logsumexp_B, total), _ = lax.scan(chunk, start, _chunks(text_BD))
    own_B = (image_BD * text_BD).sum(1) * scale + bias
    return (logsumexp_B.mean() + total / len(image_BD)) / 2 - own_B.mean()


def _chunks(text_BD):
    B, D = text_BD.shape
    return text_BD.reshape(-1, CHUNK, D), jnp.arange(B).reshape(-1, CHUNK)


def chunked_sigmoid(image_BD, text_BD, scale, bias):
    """capjax's."""
    return sigmoid_loss(image_BD, text_BD[:, None], scale, bias)


def chunked_softmax(image_BD, text_BD, scale, bias):
    """capjax's; it knows no bias, to which the softmax is blind."""
    return softmax_loss(image_BD, text_BD[:, None], scale)


LOSSES = {
    "sigmoid": (full_sigmoid, checkpoint_sigmoid, chunked_sigmoid),
    "softmax": (full_softmax, checkpoint_softmax, chunked_softmax),
}


def steps(kind: str) -> dict[str, jax.stages.Wrapped]:
    """Value and gradients of the three forms, by name, jitted."""
    return {
        name: jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=name == "chunked"))
        for name, loss in zip(("full", "checkpoint", "chunked"), LOSSES[kind], strict=True)
    }


def memory(kind: str, batch_size: int, width: int) -> dict[str, float | None]:
    """Temporary megabytes of each form; None where the backend does not tell."""
    rows = jax.ShapeDtypeStruct((batch_size, width), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    found = {}
    for name, step in steps(kind).items():
        analysis = step.lower(rows, rows, scalar, scalar).compile().memory_analysis()
        found[name] = round(analysis.temp_size_in_bytes / 1e6, 1) if analysis else None
    return found


def seconds(kind: str, batch_size: int, width: int, rounds: int) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each form, taking turns."""
    keys = jax.random.split(jax.random.key(0), 2)
    rows = [jax.random.normal(key, (batch_size, width)) for key in keys]
    image_BD, text_BD = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in rows)
    times: dict[str, list[tuple[float, float]]] = {}
    forms = steps(kind)
    for number in range(rounds + 1):
        for name, step in forms.items():
            begin = time.process_time(), time.perf_counter()
            jax.block_until_ready(step(image_BD, text_BD, 10.0, -10.0))
            if number:  # the first round compiles
                ends = time.process_time(), time.perf_counter()
                times.setdefault(name, []).append((ends[0] - begin[0], ends[1] - begin[1]))
    return {
        unit: {name: round(statistics.median(x[i] for x in xs), 3) for name, xs in times.items()}
        for i, unit in enumerate(("cpu_s", "wall_s"))
    }


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", default="32768,65536", help="batches to compile only")
    parser.add_argument("--time", default="4096,8192", help="batches to run")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    common = {"width": args.width, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    for kind in LOSSES:
        for batch_size in map(int, filter(None, args.memory.split(","))):
            floor = 4 * batch_size * args.width * 4 / 1e6
            found = {"temp_mb": memory(kind, batch_size, args.width), "floor_mb": round(floor, 1)}
            print(json.dumps({"loss": kind, "batch_size": batch_size} | found | common), flush=True)
        for batch_size in map(int, filter(None, args.time.split(","))):
            found = seconds(kind, batch_size, args.width, args.rounds)
            line = {"loss": kind, "batch_size": batch_size} | found
            for peer in ("full", "checkpoint"):
                line[f"chunked_over_{peer}"] = {
                    unit: round(times["chunked"] / times[peer], 3) for unit, times in found.items()
                }
            print(json.dumps(line | common), flush=True)


if __name__ == "__main__":
    main()
