"""The training loop fed by the real pipeline, against the same loop on synthetic batches.

    python tools/bench/fed.py --size=L/14 --decoder_depth=12 --batch_size=128 --dtype=bfloat16

Photos of 500 x 375 pixels, as in web data, are made of the embedded corpus with noise, as JPEGs in
ArrayRecord shards. The loop is `capjax train`'s, the step is compiled once for both, and no decoded
image is kept. Prints one JSON line: images/s of each, their ratio, the share of time that the fed
loop waited for data, and images/s of the pipeline with nothing else to do.
"""

import argparse
import functools
import io
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from peers import Job, described, ours
from PIL import Image

from capjax.data.augmentation import Augment
from capjax.data.captions import CaptionChoice
from capjax.data.images import ImagePreprocessing
from capjax.data.inspection import source_texts
from capjax.data.pipeline import Batches, Reading, synthetic_batches, train_batches
from capjax.data.records import Example, write_shards
from capjax.data.sources import open_source
from capjax.data.tokenizer import Tokenizer
from capjax.mesh import MeshShape, make_mesh, place_batch
from capjax.training.loop import TrainSummary, train

WIDTH, HEIGHT, QUALITY = 500, 375, 93


def photo(example: Example, index: int) -> Example:
    """The example with its drawing on white as a noisy JPEG, of about 100 KB."""
    image = Image.open(io.BytesIO(example.image)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image).convert("RGB").resize((WIDTH, HEIGHT))
    noise = np.random.default_rng(index).normal(0, 8, (HEIGHT, WIDTH, 1))
    pixels = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY)
    return example._replace(key=f"photo-{index}", image=file.getvalue())


def write_photos(directory: Path, count: int) -> None:
    """Shards of so many photos."""
    source = open_source("emoji:train")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        photos = pool.map(lambda i: photo(source[i % len(source)], i), range(count))
        write_shards(photos, directory, "photos", 1 + count // 8)


def photo_batches(job: Job, directory: Path) -> Batches:
    """The training stream on all cores."""
    source = open_source(directory)
    texts = source_texts(source, CaptionChoice(), 1000)
    cores = os.cpu_count() or 1
    return train_batches(
        source,
        Tokenizer.train(texts, 1000),
        preprocessing=ImagePreprocessing(job.image_size),
        augment=Augment(),
        text_length=job.text_length,
        batch_size=job.batch_size,
        seed=0,
        reading=Reading(num_threads=cores, prefetch=2 * cores, cache_megabytes=0),
    )


def pipeline_rate(job: Job, batches: Iterator, count: int) -> float:
    """Images/s of drawing `count` batches after the first."""
    next(batches)
    begin = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return count * job.batch_size / (time.perf_counter() - begin)


def trained(job: Job, streams: list[Iterator], steps: int) -> list[TrainSummary]:
    """The loop on each of the streams, from the same initial state."""
    mesh, found = make_mesh(MeshShape(), jax.devices()[:1]), []
    with jax.set_mesh(mesh):
        model, start, step, _ = ours.build(job)
        for batches in streams:
            _, summary = train(
                start(),
                train_step=step,
                batches=batches,
                place=functools.partial(place_batch, mesh),
                total_steps=steps,
                batch_size=job.batch_size,
                flops_per_image=model.flops_per_example(),
            )
            found.append(summary)
    return found


def main() -> None:
    """Prints the line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in described(Job()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--num_photos", type=int, default=2048)
    args = parser.parse_args()
    job = Job(**{name: getattr(args, name) for name in described(Job())}, variant="fixed+unrolled")
    synthetic = synthetic_batches(
        image_size=job.image_size,
        text_length=job.text_length,
        vocab_size=job.vocab_size,
        batch_size=job.batch_size,
        seed=0,
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_photos(Path(scratch), args.num_photos)
        alone = pipeline_rate(job, photo_batches(job, Path(scratch)), args.steps // 2)
        fed = photo_batches(job, Path(scratch))
        found = trained(job, [synthetic, fed], args.steps)
    line = {
        "synthetic_images_per_s": round(found[0].images_per_s or 0, 1),
        "fed_images_per_s": round(found[1].images_per_s or 0, 1),
        "ratio": round((found[1].images_per_s or 0) / (found[0].images_per_s or 1), 4),
        "data_wait": round(found[1].data_wait_fraction, 4),
        "pipeline_images_per_s": round(alone, 1),
        "mfu_fed": found[1].mfu,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }
    print(json.dumps(line | described(job)))


if __name__ == "__main__":
    main()
