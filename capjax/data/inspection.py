"""Looking at a source: training pairs as they reach the model, token lengths, a contact sheet."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from capjax.data.augmentation import Augment, augment_image
from capjax.data.captions import CaptionChoice, NoCaption, caption_texts, choose_captions
from capjax.data.decode import ImageError, decode_image
from capjax.data.images import ImagePreprocessing
from capjax.data.mixture import Mixture
from capjax.data.records import CorruptRecord
from capjax.data.sources import Source, block_size
from capjax.data.stream import block_example_index, position_rng
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError


class Pair(NamedTuple):
    """A training pair: `image` uint8 [S, S, 3], or None and an `error` where it cannot be used."""

    key: str
    text: str
    num_tokens: int
    image: np.ndarray | None
    error: str


def source_texts(source: Source, choice: CaptionChoice, max_examples: int) -> list[str]:
    """The captions that training can draw, of at most `max_examples` evenly spread examples.

    Unreadable records are passed over. Raises `UserError` where no caption is left, with the
    caption sources that there are.
    """
    count = min(max_examples, len(source))
    texts: list[str] = []
    names: set[str] = set()
    for i in range(count):
        index = i * len(source) // count
        try:
            example = source[index]
        except CorruptRecord:
            continue
        names.update(caption.source for caption in example.captions)
        dataset = source.name_at(index) if isinstance(source, Mixture) else ""
        texts += caption_texts(example, choice, dataset)
    if not texts:
        have = (
            f"its captions are of {', '.join(map(repr, sorted(names)))}" if names else "it has none"
        )
        wanted = f" of the sources {', '.join(choice.sources)}" if choice.sources else ""
        raise UserError(f"no caption{wanted} in {source!r}: {have}")
    return texts


def first_pairs(
    source: Source,
    tokenizer: Tokenizer,
    count: int,
    *,
    preprocessing: ImagePreprocessing,
    augment: Augment,
    choice: CaptionChoice,
    seed: int,
) -> list[Pair]:
    """The first pairs of the training stream, bad examples shown instead of replaced."""
    return [
        _pair(source, tokenizer, position, preprocessing, augment, choice, seed)
        for position in range(count)
    ]


def _pair(
    source: Source,
    tokenizer: Tokenizer,
    position: int,
    preprocessing: ImagePreprocessing,
    augment: Augment,
    choice: CaptionChoice,
    seed: int,
) -> Pair:
    index = block_example_index(seed, position, len(source), block_size(source))
    key = f"example {index}"
    try:
        example = source[index]
        key = example.key
        image = decode_image(example.image)
        rng = position_rng(seed, position)
        text = choose_captions(example, choice, rng)[0]
    except (CorruptRecord, ImageError, NoCaption) as error:
        return Pair(key, "", 0, None, str(error))
    image = augment_image(image, text, preprocessing, augment, rng)
    return Pair(key, text, tokenizer.count(text), image, "")


def pair_table(pairs: Sequence[Pair]) -> str:
    """Key, number of tokens and caption, a line each."""
    width = max(len("key"), *(len(pair.key) for pair in pairs))
    lines = [f"{'key':<{width}}  tokens  caption"]
    for pair in pairs:
        caption = pair.text or f"cannot be used: {pair.error}"
        lines.append(f"{pair.key:<{width}}  {pair.num_tokens:>6}  {caption}")
    return "\n".join(lines)


def length_table(lengths: Iterable[int], max_rows: int = 20) -> str:
    """A histogram of numbers of tokens, and the text lengths that hold 90, 99 and 100 % whole."""
    counts = Counter(lengths)
    total, longest = counts.total(), max(counts)
    step = -(-longest // max_rows)
    bins = Counter(dict.fromkeys(range(1, longest + 1, step), 0))
    for length, count in counts.items():
        bins[(length - 1) // step * step + 1] += count
    lines = [f"tokens of {total} captions, with the end:"]
    for start, count in sorted(bins.items()):
        name = f"{start}" if step == 1 else f"{start}-{start + step - 1}"
        bar = "#" * -(-40 * count // max(bins.values()))
        lines.append(f"{name:>9}  {count:>8}  {bar}".rstrip())
    ordered = np.repeat(sorted(counts), [counts[length] for length in sorted(counts)])
    holds = [f"{ordered[-(-total * q // 100) - 1]} holds {q} %" for q in (90, 99, 100)]
    return "\n".join([*lines, f"text_length: {', '.join(holds)}"])


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.4 system-ui, sans-serif; margin: auto; max-width: 72rem; padding: 1rem }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }}
figure {{ margin: 0 }}
img {{ width: 100%; image-rendering: pixelated; border: 1px solid #8884 }}
figcaption small {{ display: block; opacity: .7; overflow-wrap: anywhere }}
pre {{ overflow-x: auto }}
</style>
<h1>{title}</h1>
<p>{settings}</p>
<main>
{tiles}
</main>
<pre>{lengths}</pre>
</html>
"""
_TILE = """<figure>{picture}<figcaption>{text}<small>{key} · {num_tokens} tokens</small>\
</figcaption></figure>"""


def contact_sheet(pairs: Sequence[Pair], title: str, settings: str, lengths: str) -> str:
    """One HTML page without outside parts: the pairs as the model sees them, and the lengths."""
    tiles = [
        _TILE.format(
            picture=_picture(pair),
            text=html.escape(pair.text or f"cannot be used: {pair.error}"),
            key=html.escape(pair.key),
            num_tokens=pair.num_tokens,
        )
        for pair in pairs
    ]
    return _PAGE.format(
        title=html.escape(title),
        settings=html.escape(settings),
        tiles="\n".join(tiles),
        lengths=html.escape(lengths),
    )


def _picture(pair: Pair) -> str:
    if pair.image is None:
        return ""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pair.image)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(pair.text)}" src="data:image/png;base64,{data}">'
