"""The statistics of sources for people: as text, and as one HTML page with charts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np

from capjax.data.stats import Shared, Stats, quantiles

_BARS = 24
_WIDTH, _HEIGHT = 480, 120  # of a chart's bars
_QUANTILES = ("least", "1 %", "median", "99 %", "most")
_LISTED = 8


def facts(stats: Stats) -> list[tuple[str, str]]:
    """(name, value) of everything that is one line."""
    read = stats.num_read
    looked = "" if read == stats.num_examples else f", {read:,} of them looked at"
    rows = [("examples", f"{stats.num_examples:,}{looked}")]
    rows += [(reason, share(count, read)) for reason, count in stats.bad.most_common()]
    captions = len(stats.words)
    rows += [
        ("captions", f"{captions:,}"),
        ("without a caption", share(int((stats.captions_per_image == 0).sum()), read)),
        ("repeated captions", share(stats.repeated_captions.count, captions)),
        ("repeated images", share(stats.repeated_images, read)),
        ("repeated keys", share(stats.repeated_keys, read)),
        ("formats", _listed(stats.formats)),
        ("languages", _listed(stats.languages)),
        ("caption sources", _listed(stats.caption_sources)),
    ]
    if (tokens := stats.tokens) is not None:
        rows += [
            (f"cut at text_length={tokens.text_length}", share(tokens.truncated, captions)),
            ("pieces that are single bytes", share(tokens.byte_pieces, tokens.pieces)),
            ("pieces that are unknown", share(tokens.unknown_pieces, tokens.pieces)),
        ]
    return rows


def distributions(stats: Stats) -> list[tuple[str, np.ndarray]]:
    """(name, numbers) of everything that is a distribution."""
    found = [
        ("captions an image", stats.captions_per_image),
        ("words a caption", stats.words),
        ("shorter side, pixels", np.minimum(stats.widths, stats.heights)),
        ("width / height", stats.widths / np.maximum(stats.heights, 1)),
        ("bytes an image", stats.sizes),
    ]
    if stats.tokens is not None:
        found.append(("tokens a caption", stats.tokens.lengths))
    return [(name, values) for name, values in found if len(values)]


def share(count: int, total: int) -> str:
    """`1,200 (0.4 %)`."""
    return f"{count:,} ({100 * count / total:.3g} %)" if count and total else f"{count:,}"


def _listed(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name or '(none)'} {count}" for name, count in counts.most_common(_LISTED))
    more = f", and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    return (shown or "none") + more


def text_report(stats: Stats) -> str:
    """A source in some lines."""
    rows = facts(stats)
    width = max(len(name) for name, _ in rows)
    lines = [stats.name, *(f"  {name:<{width}}  {value}" for name, value in rows)]
    lines.append(f"  {'':<{width}}" + "".join(f"{column:>10}" for column in _QUANTILES))
    for name, values in distributions(stats):
        cells = "".join(f"{value:>10.4g}" for value in quantiles(values))
        lines.append(f"  {name:<{width}}{cells}")
    for text, count in stats.repeated_captions.commonest:
        lines.append(f"  {count:,} times: {text:.70}")
    return "\n".join(lines)


def warnings(found: Sequence[Shared]) -> list[str]:
    """A line for every two sources that share something."""
    return [
        f"warning: {leak.images} images and {leak.keys} keys of {leak.second} are in {leak.first} "
        f"too, as {', '.join(leak.some)}"
        for leak in found
        if leak.images or leak.keys
    ]


def histogram(values: np.ndarray) -> list[tuple[str, int]]:
    """(lower edge, count) of at most 24 bars; numbers beyond the 99.5 % are in the last."""
    is_whole = values.dtype.kind == "i"
    low, high = float(values.min()), float(np.quantile(values, 0.995, method="nearest"))
    if is_whole:
        step = max(1, -(-int(high - low + 1) // _BARS))
        edges = np.arange(low, high + step + 1, step)[: _BARS + 1]
    else:
        edges = np.linspace(low, max(high, low + 1e-9), _BARS + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return [(f"{edge:.4g}", int(count)) for edge, count in zip(edges, counts, strict=False)]


def html_page(all_stats: Sequence[Stats], found: Sequence[Shared]) -> str:
    """One page without outside parts and without scripts."""
    sections: list[dict[str, Any]] = [
        {
            "name": stats.name,
            "facts": facts(stats),
            "charts": [_chart(name, values) for name, values in distributions(stats)],
            "commonest": stats.repeated_captions.commonest,
        }
        for stats in all_stats
    ]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_PAGE).render(sections=sections, warnings=warnings(found))


def _chart(name: str, values: np.ndarray) -> dict[str, Any]:
    """A title, a line of numbers, and bars; no bars where all numbers are the same."""
    numbers = quantiles(values)
    if numbers[0] == numbers[-1]:
        return {"title": name, "numbers": f"all {numbers[0]:.4g}", "bars": []}
    said = ", ".join(f"{of}: {x:.4g}" for of, x in zip(_QUANTILES, numbers, strict=True))
    return {"title": name, "numbers": said, "bars": _placed(histogram(values))}


def _placed(bars: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """The bars in a drawing; one of few numbers is a line, and not nothing."""
    width, most = _WIDTH / len(bars), max(count for _, count in bars)
    every = -(-len(bars) // 8)
    heights = [max(_HEIGHT * count / most, 2 * (count > 0)) for _, count in bars]
    return [
        {
            "x": f"{i * width:.1f}",
            "width": f"{max(width - 1, 1):.1f}",
            "y": f"{_HEIGHT - height:.1f}",
            "height": f"{height:.1f}",
            "title": f"from {label}: {count:,}",
            "label": label if i % every == 0 else "",
        }
        for i, ((label, count), height) in enumerate(zip(bars, heights, strict=True))
    ]


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Sources in numbers</title>
<style>
:root { color-scheme: light dark }
body { font: 15px/1.4 system-ui, sans-serif; margin: auto; max-width: 72rem; padding: 1rem }
.charts { display: grid; gap: 1.5rem; margin: 1.5rem 0 }
.charts { grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)) }
figure { margin: 0 } figcaption { font-weight: 600 }
figcaption small { display: block; font-weight: 400; margin-bottom: .4rem; opacity: .75 }
svg { width: 100% } rect { fill: #3b82f6 } text { fill: currentColor; font-size: 15px }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; overflow-wrap: anywhere }
.number { font-variant-numeric: tabular-nums; text-align: right }
.warning { border-left: 4px solid #d9480f; padding-left: .6rem }
</style>
<h1>Sources in numbers</h1>
{% for warning in warnings %}
<p class="warning">{{ warning }}</p>
{% endfor %}
{% for section in sections %}
<h2>{{ section.name }}</h2>
<table>
{% for name, value in section.facts %}
<tr><td>{{ name }}</td><td>{{ value }}</td></tr>
{% endfor %}
</table>
<div class="charts">
{% for chart in section.charts %}
<figure><figcaption>{{ chart.title }}<small>{{ chart.numbers }}</small></figcaption>
{% if chart.bars %}
<svg viewBox="0 0 480 140" role="img" aria-label="{{ chart.title }}: {{ chart.numbers }}">
{% for bar in chart.bars %}
<rect x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar.height }}">\
<title>{{ bar.title }}</title></rect>
{% if bar.label %}<text x="{{ bar.x }}" y="136">{{ bar.label }}</text>
{% endif %}
{% endfor %}
</svg>
{% endif %}
</figure>
{% endfor %}
</div>
{% if section.commonest %}
<h3>Captions that occur most often</h3>
<table>
{% for text, count in section.commonest %}
<tr><td class="number">{{ "{:,}".format(count) }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% endfor %}
</html>
"""
