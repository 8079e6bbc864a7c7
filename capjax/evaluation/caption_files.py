"""Captions and references as files hold them: JSON lines of any tool, and COCO's own two forms.

A record names its image by `key` (or `image_id`, or `id`), its captions by `candidates`, `captions`
or `caption`, and what they are compared with by `references`. So the files of `capjax caption` and
`captions/<split>.jsonl` of a run are read as they are.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from capjax.errors import UserError

_KEYS = ("key", "image_id", "id")
_CAPTIONS = ("candidates", "captions", "caption")
_TEXT = ("caption", "text")


class CaptionSet(NamedTuple):
    """Captions of N images, in the order of the file.

    candidates: of each image at least one caption, the best first.
    references: of each image, or None where no image has any.
    left_out: why images are missing, with how many.
    """

    keys: tuple[str, ...]
    candidates: list[list[str]]
    references: list[list[str]] | None
    left_out: dict[str, int]

    def at(self, keys: tuple[str, ...]) -> "CaptionSet":
        """The captions of some of its images, in the order of `keys`."""
        place = {key: index for index, key in enumerate(self.keys)}
        rows = [place[key] for key in keys]
        known = self.references
        return CaptionSet(
            keys,
            [self.candidates[row] for row in rows],
            None if known is None else [known[row] for row in rows],
            self.left_out,
        )


def read_captions(path: epath.PathLike, references: epath.PathLike | None = None) -> CaptionSet:
    """The captions of a file, or of every `*.jsonl` of a directory, beside their references.

    Args:
      path: JSON lines; or a JSON list of records, as COCO's results are.
      references: another such file, of which the captions are the references where it names no
        others; or COCO's `captions_val2014.json`. Default: those in `path`.

    Images that lack a caption (as those that failed to decode), or a reference where others have
    some, are left out and counted. Raises `UserError` for a file that is not of this form, a key
    that comes twice, or where nothing is left.
    """
    known = None if references is None else _references(references)
    kept: dict[str, tuple[list[str], list[str]]] = {}
    seen: set[str] = set()
    for where, record in _records(path):
        key = _key(where, record)
        if key in seen:
            raise UserError(f"{where}: {key} comes twice; expected one record an image")
        seen.add(key)
        if candidates := _texts(where, record, _CAPTIONS):
            own = _texts(where, record, ("references",))
            kept[key] = (candidates, own if known is None else known.get(key, []))
    if not kept:
        raise UserError(f"{path}: no captions; expected records with {' or '.join(_CAPTIONS)}")
    has_references = [key for key, (_, texts) in kept.items() if texts]
    if references is not None and not has_references:
        raise UserError(
            f"{references}: no references for the captions of {path}: keys there are such as "
            f"{next(iter(known or ['none']))}, here {next(iter(kept))}"
        )
    keys = tuple(has_references or kept)
    left_out = {"no caption": len(seen) - len(kept), "no reference": len(kept) - len(keys)}
    return CaptionSet(
        keys,
        [kept[key][0] for key in keys],
        [kept[key][1] for key in keys] if has_references else None,
        {reason: count for reason, count in left_out.items() if count},
    )


def _references(path: epath.PathLike) -> dict[str, list[str]]:
    """Of each key its references; a key may come several times, as in COCO's annotations."""
    found: dict[str, list[str]] = {}
    for where, record in _records(path):
        texts = _texts(where, record, ("references", *_CAPTIONS))
        found.setdefault(_key(where, record), []).extend(texts)
    return found


def _records(path: epath.PathLike) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record, after where it is."""
    root = epath.Path(path).expanduser()
    files = sorted(root.glob("*.jsonl")) if root.is_dir() else [root]
    if not files:
        raise UserError(f"{path}: no *.jsonl in this directory")
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{file}: cannot be read ({reason}); expected JSON lines") from error
        for where, record in _parsed(str(file), text):
            if not isinstance(record, dict):
                raise UserError(f"{where}: expected an object with a key, got {str(record)[:60]}")
            yield where, record


def _parsed(name: str, text: str) -> Iterator[tuple[str, Any]]:
    """Records of a JSON list, of COCO's annotations, or of lines."""
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        # The id of an annotation is not that of its image.
        whole = whole["annotations"]
    if isinstance(whole, list):
        yield from ((f"{name}, record {n}", record) for n, record in enumerate(whole, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{name}:{number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"{name}:{number}: not JSON ({error})") from error


def _key(where: str, record: dict[str, Any]) -> str:
    for name in _KEYS:
        if record.get(name) is not None:
            return str(record[name])
    raise UserError(f"{where}: no {' or '.join(_KEYS)}; expected one to name the image")


def _texts(where: str, record: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """The texts under the first of `names` that the record has: a string, or a list of them."""
    for name in names:
        value = record.get(name)
        if value is None:
            continue
        listed = value if isinstance(value, list) else [value]
        texts = [_text(item) for item in listed]
        if None in texts:
            raise UserError(f"{where}: {name}: expected a text or a list of texts, got {value!r}")
        return [text for text in texts if text is not None]
    return []


def _text(item: Any) -> str | None:
    """A caption as a string, or as the object that `capjax` and COCO make of it."""
    if isinstance(item, dict):
        item = next((item[name] for name in _TEXT if name in item), None)
    return item if isinstance(item, str) else None
