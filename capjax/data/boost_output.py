"""The directory of boosted captions: whose it is, whether it is finished, and its files."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from capjax.data.boost_answers import Answers
from capjax.data.boost_example import FAILED, KINDS, BoostSettings, Make
from capjax.data.prepare import Report, reasons
from capjax.data.prepare_output import MANIFEST
from capjax.data.prepare_parts import atomic
from capjax.data.records import (
    SHARD_SUFFIX,
    ArrayRecordSource,
    CorruptRecord,
    Example,
    write_shards,
)
from capjax.data.sources import Source
from capjax.errors import UserError

ANSWERS = "answers.jsonl"
REJECTED = "rejected.jsonl"
_UNREADABLE = "unreadable record"


def make_directory(output: Path) -> None:
    """Raises `UserError` where it cannot be made, or holds something else."""
    is_ours = (output / ANSWERS).exists()
    if output.exists() and not is_ours and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output}: expected a new or an empty directory; choose another")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output={output}: {error.strerror}; choose another") from error


def finished(output: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest where every request was answered. Raises `UserError` where it is of others."""
    path = output / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text("utf-8"))
        old = {**manifest["source"], **manifest["settings"]}
        failed = sum(manifest["rejected"].get(f"{kind}: {FAILED}", 0) for kind in KINDS)
        sizes = {output / shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of `capjax data boost`; choose another output") from error
    new = {**identity["source"], **identity["settings"]}
    if changed := [field for field in new if new[field] != old.get(field)]:
        raise UserError(
            f"output={output} holds captions of another {', '.join(changed)}; choose another "
            f"output, and copy {ANSWERS} there to use its answers again"
        )
    is_whole = all(x.is_file() and x.stat().st_size == size for x, size in sizes.items())
    return manifest if is_whole and not failed else None


def write_output(
    source: Source,
    make: Make,
    answers: Answers,
    output: Path,
    settings: BoostSettings,
    report: Callable[[Report], None],
) -> dict[str, Any]:
    """Writes the shards and `rejected.jsonl`; returns what the manifest says of them."""
    for old in (output / MANIFEST, *output.glob(f"*{SHARD_SUFFIX}"), *output.glob(".*.partial")):
        old.unlink(missing_ok=True)
    captions: Counter[str] = Counter()
    problems: Counter[str] = Counter()

    def examples(rejected: TextIO) -> Iterator[Example]:
        for index in range(len(source)):
            try:
                example = source[index]
            except CorruptRecord as error:
                problems[_UNREADABLE] += 1
                _write_line(
                    rejected, {"index": index, "problem": _UNREADABLE, "answer": str(error)}
                )
                continue
            new = []
            for kind, caption, problem, answer in make(example, answers.known):
                if caption is not None:
                    new.append(caption)
                    continue
                problems[f"{kind}: {problem}"] += 1
                fields = {"key": example.key, "kind": kind, "problem": problem, "answer": answer}
                _write_line(rejected, {"index": index, **fields})
            new = list(dict.fromkeys(new))  # variants may be equal
            captions.update(caption.source for caption in new)
            old = (caption for caption in example.captions if caption.source not in KINDS)
            yield example._replace(captions=(*old, *new))
            report(Report("shards", index + 1, len(source), problems))

    with atomic(output / REJECTED) as temporary, temporary.open("w", encoding="utf-8") as file:
        paths = write_shards(examples(file), output, settings.split, settings.shard_size)
    if not captions:
        for path in paths:
            path.unlink()
        raise UserError(
            f"no caption was made of {source!r}: {reasons(problems)}; see {output / REJECTED}, and "
            "try another model or prompt"
        )
    shards = [_facts(path) for path in paths]
    return {
        "examples": {"in": len(source), "out": sum(shard["examples"] for shard in shards)},
        "captions": dict(sorted(captions.items())),
        "rejected": dict(sorted(problems.items())),
        "shards": shards,
    }


def _write_line(file: TextIO, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")


def _facts(shard: Path) -> dict[str, Any]:
    with shard.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    num_examples = len(ArrayRecordSource(shard))
    size = shard.stat().st_size
    return {"name": shard.name, "examples": num_examples, "bytes": size, "sha256": digest}
