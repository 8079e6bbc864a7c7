"""The work of `capjax caption`, put together: a checkpoint, a source, and a file or a directory."""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from capjax.checkpoint import find_steps, step_directory
from capjax.checkpoint.files import read_metadata, sha256
from capjax.data.prepare_output import probe
from capjax.data.sources import Source
from capjax.decoding.corpus import Filters, row_reader
from capjax.decoding.corpus_files import ShardDirectory
from capjax.decoding.corpus_meter import Meter
from capjax.decoding.corpus_run import captioned_ranges, write_file, write_shards
from capjax.decoding.corpus_share import Share
from capjax.decoding.load import LoadedModel, load
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh
from capjax.training.progress import Progress


def to_file(
    args: argparse.Namespace,
    source: Source,
    options: DecodingOptions,
    filters: Filters,
    output: Path,
) -> None:
    """Writes one file of JSON lines."""
    loaded, count = _load(args), _count(args, source)
    starts = range(0, count, args.shard_size)
    ranges = [(start, min(start + args.shard_size, count)) for start in starts]
    captioning = _Captioning(args, source, options, filters, loaded)
    with captioning.ranges(ranges, count) as (records, meter):
        write_file(output, records, meter)
    if meter.counts["errors"] == count:
        raise UserError(
            f"none of the {count} images in {args.input} can be read ({meter.first_error})"
        )
    _report(output, meter.counts, meter)


def to_directory(
    args: argparse.Namespace,
    source: Source,
    options: DecodingOptions,
    filters: Filters,
    output: Path,
    share: Share,
) -> None:
    """Writes this process's share of the shards, and the manifest where they are now complete."""
    loaded, count = _load(args), _count(args, source)
    captioning = _Captioning(args, source, options, filters, loaded)
    job = {
        "checkpoint": {"step": loaded.step, "sha256": _digest(args.checkpoint, loaded.step)},
        "input": {"address": args.input, "num_records": count, "probe": probe(source)},
        "options": dataclasses.asdict(options),
        "filters": dataclasses.asdict(filters),
        **{
            name: getattr(args, name)
            for name in ("prefix", "seed", "dedupe", "batch_size", "shard_size", "format")
        },
    }
    sizes = {"num_records": count, "shard_size": args.shard_size, "kind": args.format}
    with ShardDirectory(output, job, options, **sizes, share=share) as directory:
        missing, meter = directory.missing(), None
        if missing:
            ranges = [directory.bounds(number) for number in missing]
            with captioning.ranges(ranges, count) as (records, meter):
                write_shards(directory, missing, records, meter)
        manifest = directory.finish()
    if manifest is None:
        print(
            f"share {share.process_id} of {share.num_processes} of {output} is complete "
            f"({len(directory.own_shards())} of {directory.num_shards} shards); "
            "manifest.json comes with the last"
        )
        return
    _report(output, manifest["counts"], meter)


class _Captioning:
    """What the two kinds of output share: the checked options, the reader, the progress."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: Source,
        options: DecodingOptions,
        filters: Filters,
        loaded: LoadedModel,
    ) -> None:
        """Raises `UserError` for options that the model does not take."""
        self._args, self._filters, self._loaded, self._options = args, filters, loaded, options
        self._read = row_reader(source, loaded.pixels, args.dedupe)
        self._batch_size = args.batch_size * jax.local_device_count()
        self._stream(())

    @contextlib.contextmanager
    def ranges(self, ranges: Sequence[tuple[int, int]], total: int) -> Iterator[tuple]:
        """The records of the ranges, and the meter that counts them."""
        mine = sum(stop - start for start, stop in ranges)
        with Progress() as progress:
            meter = Meter(
                total,
                mine,
                self._batch_size,
                price_per_hour=self._args.price_per_hour,
                show=progress.show,
            )

            def caption(rows):
                records = self._stream(rows)
                if meter.counts["records"]:
                    return records
                with progress.doing("compiling, first batch"):
                    first = list(itertools.islice(records, 1))
                return itertools.chain(first, records)

            yield (
                captioned_ranges(
                    ranges, self._read, caption, self._filters, meter, ahead=2 * self._batch_size
                ),
                meter,
            )

    def _stream(self, rows) -> Iterator[dict[str, Any]]:
        return self._loaded.stream(
            rows,
            self._options,
            seed=self._args.seed,
            batch_size=self._batch_size,
            prefix=self._args.prefix,
            all_full=Path(self._args.output).suffix != ".jsonl",
        )


def _load(args: argparse.Namespace) -> LoadedModel:
    """The model on this process's devices, which share each batch."""
    if jax.local_device_count() == 1:
        return load(args.checkpoint, args.step)
    mesh = make_mesh(MeshShape(), devices=jax.local_devices())
    return load(args.checkpoint, args.step, mesh)


def _count(args: argparse.Namespace, source: Source) -> int:
    count = min(len(source), args.limit or len(source))
    if not count:
        raise UserError(f"--input={args.input} has no examples; name a source that has some")
    return count


def _digest(checkpoint: str, step: int) -> str:
    """A hash of what makes captions what they are: parameters, tokenizer, preprocessing."""
    metadata = read_metadata(step_directory(find_steps(checkpoint)[0], step))
    names = ("arrays", "tokenizer_sha256", "preprocessing")
    parts = [metadata[name] for name in names]
    return sha256(json.dumps(parts, sort_keys=True).encode())


def _report(output: Path, counts: dict[str, int], meter: Meter | None) -> None:
    parts = [f"{counts['captions']} captions in {output}"]
    if counts["errors"]:
        first = f" (first: {meter.first_error})" if meter and meter.first_error else ""
        parts.append(f"{counts['errors']} images cannot be read{first}")
    for name in ("filtered", "duplicates"):
        if counts[name]:
            parts.append(f"{counts[name]} {name}")
    print("; ".join(parts))
    if meter and (summary := meter.summary()):
        print(summary)
