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
from capjax.decoding.load import load
from capjax.decoding.options import DecodingOptions
from capjax.errors import UserError
from capjax.mesh import MeshShape, make_mesh
from capjax.training.progress import Progress
from capjax.training.storage import warn

_OF_THE_JOB = ("prefix", "seed", "dedupe", "batch_size", "shard_size", "format")


class CaptionJob:
    """A checkpoint on this process's devices, and what it is to caption and how."""

    def __init__(
        self,
        args: argparse.Namespace,
        source: Source,
        options: DecodingOptions,
        filters: Filters,
        all_full: bool,
    ) -> None:
        """Raises `UserError` for a source without examples, and options beyond the model."""
        self.args, self.source, self.options, self.filters = args, source, options, filters
        self.all_full = all_full
        self.count = min(len(source), args.limit or len(source))
        if not self.count:
            raise UserError(f"--input={args.input} has no examples; name a source that has some")
        num_devices = jax.local_device_count()
        mesh = make_mesh(MeshShape(), devices=jax.local_devices()) if num_devices > 1 else None
        self.loaded = load(args.checkpoint, args.step, mesh)
        self.batch_size = args.batch_size * num_devices
        self.stream(())  # checks what it is given
        if options.is_guided and not self.loaded.has_null_image:
            warn("guidance of a model trained without image_dropout: captions are often bad")

    def stream(self, rows) -> Iterator[dict[str, Any]]:
        """The records of `rows`, as `LoadedModel.stream` completes them."""
        return self.loaded.stream(
            rows,
            self.options,
            seed=self.args.seed,
            batch_size=self.batch_size,
            prefix=self.args.prefix,
            all_full=self.all_full,
        )

    def to_file(self, output: Path) -> None:
        """Writes one file of JSON lines."""
        starts = range(0, self.count, self.args.shard_size)
        ranges = [(start, min(start + self.args.shard_size, self.count)) for start in starts]
        with self._captioned(ranges) as (records, meter):
            write_file(output, records, meter)
        self._report(output, meter.counts, meter)

    def to_directory(self, output: Path, share: Share) -> None:
        """Writes this process's share of the shards, and the manifest where all are there."""
        sizes = {"num_records": self.count, "shard_size": self.args.shard_size}
        form = {"kind": self.args.format, "share": share}
        with ShardDirectory(output, self._identity(), self.options, **sizes, **form) as directory:
            missing, meter = directory.missing(), None
            if missing:
                ranges = [directory.bounds(number) for number in missing]
                with self._captioned(ranges) as (records, meter):
                    write_shards(directory, missing, records, meter)
            manifest = directory.finish()
        if manifest is not None:
            self._report(output, manifest["counts"], meter)
            return
        print(
            f"share {share.process_id} of {share.num_processes} of {output} is complete "
            f"({len(share.of(directory.num_shards))} of {directory.num_shards} shards); "
            "manifest.json comes with the last"
        )

    def _identity(self) -> dict[str, Any]:
        """All that a record depends on."""
        step = self.loaded.step
        metadata = read_metadata(step_directory(find_steps(self.args.checkpoint)[0], step))
        parts = [metadata[name] for name in ("arrays", "tokenizer_sha256", "preprocessing")]
        digest = sha256(json.dumps(parts, sort_keys=True).encode())
        return {
            "checkpoint": {"step": step, "sha256": digest},
            "input": {
                "address": self.args.input,
                "num_records": self.count,
                "probe": probe(self.source),
            },
            "options": dataclasses.asdict(self.options),
            "filters": dataclasses.asdict(self.filters),
            **{name: getattr(self.args, name) for name in _OF_THE_JOB},
        }

    @contextlib.contextmanager
    def _captioned(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[Iterator, Meter]]:
        """The records of the ranges, and the meter that counts them."""
        mine = sum(stop - start for start, stop in ranges)
        price = self.args.price_per_hour
        read = row_reader(self.source, self.loaded.pixels, self.args.dedupe)
        with Progress() as progress:
            meter = Meter(
                self.count, mine, self.batch_size, price_per_hour=price, show=progress.show
            )

            def caption(rows):
                records = self.stream(rows)
                if meter.counts["records"]:
                    return records
                with progress.doing("compiling, first batch"):
                    first = list(itertools.islice(records, 1))
                return itertools.chain(first, records)

            ahead = 2 * self.batch_size
            yield captioned_ranges(ranges, read, caption, self.filters, meter, ahead=ahead), meter

    def _report(self, output: Path, counts: dict[str, int], meter: Meter | None) -> None:
        """Prints what was made. Raises `UserError` where no image could be read."""
        first = f" (first: {meter.first_error})" if meter and meter.first_error else ""
        if counts["errors"] == counts["records"]:
            raise UserError(
                f"none of the {counts['records']} images in {self.args.input} can be read{first}"
            )
        parts = [f"{counts['captions']} captions in {output}"]
        if counts["errors"]:
            parts.append(f"{counts['errors']} images cannot be read{first}")
        parts += [f"{counts[name]} {name}" for name in ("filtered", "duplicates") if counts[name]]
        # A key may be a file name of any bytes.
        print("; ".join(parts).encode(errors="backslashreplace").decode())
        if meter and (summary := meter.summary()):
            print(summary)
