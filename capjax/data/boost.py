"""Boosting captions: those that people wrote, blended into one by a language model.

Every example keeps its captions and gets one of the source "blend", made of them, and, where a
dense caption of its image is known, one of the source "holistic": the blend with what that adds.

First every answer is asked for and kept (`answers.jsonl`), then the shards are written from what is
kept. So the same call goes on after any kill, nothing is asked twice, and the shards depend on the
source, the settings and the answers alone. `manifest.json` comes last.
"""

import dataclasses
import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from capjax.data.boost_answers import Answers
from capjax.data.boost_endpoint import Chat
from capjax.data.boost_example import FAILED, Answer, BoostSettings, Made, Make, boosted
from capjax.data.boost_output import ANSWERS, finished, make_directory, write_output
from capjax.data.prepare import Report
from capjax.data.prepare_output import MANIFEST, probe, write_json
from capjax.data.records import CorruptRecord, Example
from capjax.data.sources import Source
from capjax.errors import UserError

_AHEAD = 4  # examples under way for each request at once


class Boosted(NamedTuple):
    """The manifest; what was asked for it now: requests, tokens read and written; and how many
    lines of the answers were damaged, so that they were asked for again."""

    manifest: dict[str, Any]
    num_asked: int
    num_prompt_tokens: int
    num_tokens: int
    num_damaged: int


def boost(
    source: Source,
    name: str,
    output: Path,
    settings: BoostSettings,
    chat: Chat,
    *,
    dense: Mapping[str, str] | None = None,
    concurrency: int = 8,
    max_failures: int = 100,
    report: Callable[[Report], None] = lambda _: None,
) -> Boosted:
    """Writes the boosted shards of `source`, called `name`, to a directory, or goes on with it.

    Args:
      chat: it is stopped in the end.
      dense: captions of images by key; None: no holistic captions.
      concurrency: requests at once; it changes no byte.
      max_failures: requests that may stay without an answer. Their examples keep the captions that
        they have, and the next call asks again.

    Raises `UserError` beyond `max_failures`, where no caption can be made, where another process
    writes `output`, or where that holds something else.
    """
    if not len(source):
        raise UserError(f"{source!r} has 0 examples: expected at least one")
    plain = {**dataclasses.asdict(settings), "sources": list(settings.sources)}
    identity = {
        "source": {"name": name, "num_examples": len(source), "probe": probe(source)},
        "settings": {**plain, "dense_sha256": dense and _sha256(dense)},
    }
    make_directory(output)
    with Answers(output / ANSWERS) as answers:
        manifest = finished(output, identity)
        if manifest is None:

            def make(example: Example, answer: Answer) -> list[Made]:
                return list(boosted(example, settings, dense, answer))

            _ask_all(source, make, answers, chat, concurrency, max_failures, report)
            manifest = identity | write_output(source, make, answers, output, settings, report)
            write_json(output / MANIFEST, manifest)
        return Boosted(
            manifest,
            answers.num_asked,
            answers.num_prompt_tokens,
            answers.num_tokens,
            answers.num_damaged,
        )


def _sha256(dense: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dense, sort_keys=True).encode()).hexdigest()


def _ask_all(
    source: Source,
    make: Make,
    answers: Answers,
    chat: Chat,
    concurrency: int,
    max_failures: int,
    report: Callable[[Report], None],
) -> None:
    problems: Counter[str] = Counter()
    waiting: deque[Future[list[Made]]] = deque()
    done = 0

    def work(index: int) -> list[Made]:
        try:
            example = source[index]
        except CorruptRecord:
            return []
        return make(example, lambda body: answers.get(body, chat.ask))

    def take() -> None:
        nonlocal done
        for made in waiting.popleft().result():
            problems.update([made.problem] if made.problem else [])
            if made.problem == FAILED and problems[FAILED] > max_failures:
                raise UserError(
                    f"{problems[FAILED]} requests were not answered, more than "
                    f"max_failures={max_failures} allows; the last: {made.answer}; run the same "
                    "command again, which goes on from here"
                )
        done += 1
        report(Report("captions", done, len(source), problems))

    pool = ThreadPoolExecutor(concurrency)
    try:
        for index in range(len(source)):
            waiting.append(pool.submit(work, index))
            if len(waiting) >= _AHEAD * concurrency:
                take()
        while waiting:
            take()
    finally:
        chat.stop()
        pool.shutdown(cancel_futures=True)  # what has been sent is answered, and kept
