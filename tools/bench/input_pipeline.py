"""Reading JPEGs: ours beside PIL, Grain, webdataset with torch, and tf.data; one or two threads.

    python tools/bench/input_pipeline.py --photos=DIR

Photos are random crops of the pictures below DIR with noise, as JPEGs of 4:2:0 and quality 93
(without --photos: waves with noise, which say less). All entries read the same files and take
turns. Prints JSON lines and tables: images/s, images per CPU-second, and their ratio to the first
entry of a table. "Alone" is decoding and resizing in a loop, with the error against PIL's
antialiased resize in grey levels; a pipeline makes batches. Forked workers' CPU-seconds are not
this process's: there the ratio is of images/s.
"""

import argparse
import functools
import importlib
import importlib.util
import io
import itertools
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grain
import numpy as np
from PIL import Image
from timing import Timing, alternate, medians, timed

from capjax.data import decode, resize
from capjax.data.augmentation import Augment
from capjax.data.images import ImagePreprocessing
from capjax.data.pipeline import Batches, Reading, train_batches
from capjax.data.records import Caption, Example, write_shards
from capjax.data.sources import open_source
from capjax.data.tokenizer import Tokenizer

SIZES = {"500x375": (500, 375), "1024x768": (1024, 768)}
SIDE, BATCH = 224, 32
SEEK = 1_000_000
CAPTION = "a photograph of something"


def pictures(directory: str) -> list[Image.Image]:
    """The pictures of at least 300 pixels a side below a directory, or one of waves."""
    if not directory:
        rows, columns = np.indices((1536, 2048))[..., None]
        waves = 128 + 60 * np.sin(rows / 9) * np.cos(columns / 23 + np.arange(3))
        return [Image.fromarray(np.clip(waves, 0, 255).astype(np.uint8))]
    paths = sorted(path for path in Path(directory).rglob("*") if path.suffix in (".jpg", ".png"))
    found = [Image.open(path).convert("RGB") for path in paths]
    found = [image for image in found if min(image.size) >= 300]
    if not found:
        raise SystemExit(f"--photos={directory}: no .jpg or .png of 300 pixels a side below it")
    return found


def photos(sources: list[Image.Image], size: tuple[int, int], count: int) -> list[bytes]:
    """So many random crops as noisy JPEGs."""
    made = []
    for index in range(count):
        rng = np.random.default_rng(index)
        image = sources[index % len(sources)]
        widest = min(image.width, image.height * size[0] / size[1])
        width = max(widest * rng.uniform(0.5, 1), min(size[0], widest))
        height = width * size[1] / size[0]
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
        box = (left, top, left + width, top + height)
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC, box=box), np.float32)
        pixels = pixels + rng.normal(0, 6, (size[1], size[0], 1))
        file = io.BytesIO()
        noisy = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        noisy.save(file, "JPEG", quality=93, subsampling=2)
        made.append(file.getvalue())
    return made


def pil(data: bytes) -> np.ndarray:
    """The usual loop's uint8 [224, 224, 3]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def ours_on_pillow(data: bytes) -> np.ndarray:
    """Ours without its optional packages."""
    kept = decode._simplejpeg, resize._cykooz
    decode._simplejpeg = resize._cykooz = None
    try:
        return ImagePreprocessing(SIDE).preprocess_bytes(data)
    finally:
        decode._simplejpeg, resize._cykooz = kept


def alone(files: list[bytes], rounds: int) -> list[dict[str, Any]]:
    """Decoding and resizing in a loop, entry by entry."""
    entries: dict[str, Callable[[bytes], np.ndarray]] = {
        "PIL": pil,
        "ours": ImagePreprocessing(SIDE).preprocess_bytes,
        "ours, Pillow alone": ours_on_pillow,
    }
    calls: dict[str, Callable[[], object]] = {
        name: functools.partial(lambda entry: [entry(data) for data in files], entry)
        for name, entry in entries.items()
    }
    timings = alternate(calls, rounds, warmup=1)
    wanted = [pil(data).astype(int) for data in files]
    rows = []
    for name, timing in timings.items():
        row = rates(name, timing, len(files), timings["PIL"])
        pairs = zip(files, wanted, strict=True)
        errors = np.stack([np.abs(entries[name](data) - want) for data, want in pairs])
        row["mean_error"] = round(float(errors.mean()), 3)
        row["worst_image"] = round(float(errors.mean((1, 2, 3)).max()), 3)
        row["max_error"] = int(errors.max())
        rows.append(row)
    return rows


def rates(name: str, timing: Timing, images: int, first: Timing, wall: bool = False) -> dict:
    """A row: `wall` for the ratio of images/s."""
    ratio = first.wall_s / timing.wall_s if wall else first.cpu_s / timing.cpu_s
    return {
        "entry": name,
        "images_per_s": round(images / timing.wall_s, 1),
        "images_per_cpu_s": None if wall else round(images / timing.cpu_s, 1),
        "ratio": round(ratio, 3),
    }


def our_batches(directory: Path, threads: int, start: int = 0) -> Batches:
    """The training stream, nothing cached."""
    return train_batches(
        open_source(directory),
        Tokenizer.train([CAPTION] * 20, 300),
        preprocessing=ImagePreprocessing(SIDE),
        augment=Augment(),
        text_length=16,
        batch_size=BATCH,
        seed=0,
        start=start,
        reading=Reading(num_threads=threads, prefetch=threads, cache_megabytes=0),
    )


def bare_loop(directory: Path) -> Iterator[np.ndarray]:
    """Our records read, decoded, resized and put into batches, and nothing else."""
    source, preprocessing = open_source(directory), ImagePreprocessing(SIDE)
    order = itertools.cycle(range(len(source)))
    while True:
        batch = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
        for row in range(BATCH):
            batch[row] = preprocessing.preprocess_bytes(source[next(order)].image)
        yield batch


def pil_loop(files: list[bytes]) -> Iterator[np.ndarray]:
    """PIL on files in memory."""
    order = itertools.cycle(files)
    while True:
        yield np.stack([pil(next(order)) for _ in range(BATCH)])


def grain_with_pil(files: list[bytes], threads: int) -> Iterator[np.ndarray]:
    """Grain's usual graph on files in memory."""
    dataset = grain.MapDataset.source(files).shuffle(seed=0).repeat().map(pil)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=BATCH * threads)
    return iter(dataset.batch(BATCH).to_iter_dataset(options))


def webdataset_with_torch(tar: Path, workers: int) -> Iterator[Any]:
    """webdataset's shards through torch's loader; 0 workers: in this thread."""
    torch: Any = importlib.import_module("torch")
    webdataset: Any = importlib.import_module("webdataset")
    torch.set_num_threads(1)
    shards = [str(tar)] * max(workers, 1)
    dataset = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).repeat()
    dataset = dataset.to_tuple("jpg").map_tuple(pil).batched(BATCH)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))


def tf_data(files: list[bytes], threads: int) -> Iterator[Any]:
    """tf.data with the antialiased resize."""
    tf: Any = importlib.import_module("tensorflow")

    def image(data: Any) -> Any:
        pixels = tf.image.resize(tf.io.decode_jpeg(data, 3), (SIDE, SIDE), antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(pixels), 0, 255), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).repeat()
    dataset = dataset.map(image, num_parallel_calls=threads).batch(BATCH).prefetch(1)
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    return iter(dataset.with_options(options).as_numpy_iterator())


def pipelines(
    files: list[bytes], directory: Path, tar: Path
) -> dict[str, Callable[[], Iterator[Any]]]:
    """How to open each pipeline. Those that are not installed are named and left out."""
    found: dict[str, Callable[[], Iterator[Any]]] = {
        "bare loop of ours": lambda: bare_loop(directory),
        "ours, 1 thread": lambda: our_batches(directory, 1),
        "ours, 2 threads": lambda: our_batches(directory, 2),
        "PIL loop": lambda: pil_loop(files),
        "Grain and PIL, 1 thread": lambda: grain_with_pil(files, 1),
        "Grain and PIL, 2 threads": lambda: grain_with_pil(files, 2),
    }
    if installed("webdataset", "torch"):
        found["webdataset, torch, this thread"] = lambda: webdataset_with_torch(tar, 0)
        found["webdataset, torch, 2 workers"] = lambda: webdataset_with_torch(tar, 2)
    if installed("tensorflow"):
        found["tf.data, 1 thread"] = lambda: tf_data(files, 1)
        found["tf.data, 2 threads"] = lambda: tf_data(files, 2)
    return found


def installed(*names: str) -> bool:
    """Whether all are; says what is left out."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out, not installed: {', '.join(missing)}")
    return not missing


def drawn(batches: Iterator[Any], count: int) -> Timing:
    """Drawing `count` batches after the first; closes them."""
    next(batches)
    timing = timed(lambda: [next(batches) for _ in range(count)])
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    return timing


def in_batches(
    entries: dict[str, Callable[[], Iterator[Any]]], count: int, rounds: int
) -> list[dict[str, Any]]:
    """Every pipeline opened anew in each round, one after another."""
    timings: dict[str, list[Timing]] = {name: [] for name in entries}
    for _ in range(rounds):
        for name, open_batches in entries.items():
            timings[name].append(drawn(open_batches(), count))
    found = {name: medians(each) for name, each in timings.items()}
    first = next(iter(found.values()))
    return [
        rates(name, timing, count * BATCH, first, wall="workers" in name)
        for name, timing in found.items()
    ]


def seconds_to_first(directory: Path, start: int) -> float:
    """From nothing to the first batch at a position."""
    begin = time.perf_counter()
    with closing(our_batches(directory, 2, start)) as batches:
        next(batches)
        return time.perf_counter() - begin


def write(files: list[bytes], directory: Path, tar: Path) -> None:
    """The same files as our shards and as one tar."""
    examples = (
        Example(key=f"{index:06d}", image=data, captions=(Caption(CAPTION),))
        for index, data in enumerate(files)
    )
    write_shards(examples, directory, "photos", 4)
    with tarfile.open(tar, "w") as archive:
        for index, data in enumerate(files):
            member = tarfile.TarInfo(f"{index:06d}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """JSON lines, and a table in Markdown."""
    for row in rows:
        print(json.dumps({"table": title, **row}))
    print(f"\n{title}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join('' if value is None else str(value) for value in row.values())} |")
    print(flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--photos", default="", help="a directory of pictures")
    parser.add_argument("--count", type=int, default=64, help="photos of each size")
    parser.add_argument("--batches", type=int, default=16, help="batches of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    used = {
        "simplejpeg": decode._simplejpeg is not None,
        "cykooz_resizer": resize._cykooz is not None,
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "photos": bool(args.photos),
    }
    print(json.dumps(used))
    sources = pictures(args.photos)
    for title, size in SIZES.items():
        files = photos(sources, size, args.count)
        kilobytes = round(sum(map(len, files)) / len(files) / 1024, 1)
        show(f"{title}, {kilobytes} KB, alone", alone(files, args.rounds))
        with tempfile.TemporaryDirectory() as scratch:
            directory, tar = Path(scratch) / "shards", Path(scratch) / "photos.tar"
            write(files, directory, tar)
            rows = in_batches(pipelines(files, directory, tar), args.batches, args.rounds)
            show(f"{title}, in batches of {BATCH}", rows)
            by_name = {row["entry"]: row for row in rows}
            one, two = by_name["ours, 1 thread"], by_name["ours, 2 threads"]
            bare = by_name["bare loop of ours"]
            overhead = bare["images_per_cpu_s"] / one["images_per_cpu_s"] - 1
            seeks = [seconds_to_first(directory, at) for at in (0, SEEK, 0, SEEK)]
            line = {
                "size": title,
                "overhead_of_one_thread": round(overhead, 4),
                "two_threads_over_one": round(two["images_per_s"] / one["images_per_s"], 3),
                "first_batch_s": round(min(seeks[0::2]), 3),
                "first_batch_at_1e6_s": round(max(seeks[1::2]), 3),
                "load": os.getloadavg()[0],
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
