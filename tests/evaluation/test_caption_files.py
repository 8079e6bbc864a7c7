"""Files of captions in the forms that tools write."""

import json

import pytest

from capjax.errors import UserError
from capjax.evaluation.caption_files import read_captions


def write(path, records):
    """JSON lines, or JSON where the path says so."""
    is_lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if is_lines else json.dumps(records))
    return path


def test_a_file_of_candidates_and_references(tmp_path):
    found = read_captions(
        write(
            tmp_path / "a.jsonl",
            [
                {"key": "p", "candidates": ["a cat", "one cat"], "references": ["the cat"]},
                {"key": "q", "candidates": "a\u2028dog", "references": "the dog"},
            ],
        )
    )
    assert found == (
        ("p", "q"),
        [["a cat", "one cat"], ["a\u2028dog"]],
        [["the cat"], ["the dog"]],
        {},
    )
    assert found.at(("q",)).candidates == [["a\u2028dog"]]


def test_what_capjax_caption_writes_of_a_corpus(tmp_path):
    best = {"caption": "a cat", "logprob": -1.0, "num_tokens": 3, "finish": "end"}
    records = [
        {"key": "p", **best, "captions": [best, best | {"caption": "a dog"}], "references": ["x"]},
        {"key": "q", "error": "not an image"},
        {"key": "r", "caption": ""},
    ]
    for number, record in enumerate(records):
        write(tmp_path / f"captions-{number:05d}-of-00003.jsonl", [record])
    (tmp_path / "manifest.json").write_text("{}")
    found = read_captions(tmp_path)
    assert found == (("p",), [["a cat", "a dog"]], [["x"]], {"no caption": 1, "no reference": 1})
    assert read_captions(tmp_path / "captions-00002-of-00003.jsonl").references is None


def test_results_and_annotations_of_coco(tmp_path):
    results = [{"image_id": 0, "caption": "a cat"}, {"image_id": 9, "caption": "a dog"}]
    annotations = [
        {"id": 1, "image_id": 9, "caption": "the dog"},
        {"id": 2, "image_id": 0, "caption": "the cat"},
        {"id": 3, "image_id": 9, "caption": "one dog"},
        {"id": 7, "image_id": 1, "caption": "a bird"},
    ]
    found = read_captions(
        write(tmp_path / "results.json", results),
        write(tmp_path / "gold.json", {"images": [], "annotations": annotations}),
    )
    assert found.keys == ("0", "9")
    assert found.references == [["the cat"], ["the dog", "one dog"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no captions; expected records with candidates or captions or caption"),
        ('{"key": 1, "caption": "a"}\n{nope', ":2: not JSON"),
        ('{"caption": "a"}', ":1: no key or image_id or id"),
        ('{"key": 1, "caption": "a"}\n\n{"key": "1", "caption": "b"}', ":3: 1 comes twice"),
        ('{"key": 1, "caption": 5}', ":1: caption: expected a text or a list of texts, got 5"),
        ('["a"]', "record 1: expected an object with a key, got a"),
        ("3", ":1: expected an object with a key, got 3"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path, text, said):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        read_captions(tmp_path / "a.jsonl")


def test_paths_and_keys_that_do_not_fit_are_said(tmp_path):
    with pytest.raises(UserError, match=r"no \*\.jsonl in this directory"):
        read_captions(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path / "none.jsonl")
    captions = write(tmp_path / "a.jsonl", [{"key": "p", "caption": "a"}])
    with pytest.raises(UserError, match="keys there are such as q, here p"):
        read_captions(captions, write(tmp_path / "b.jsonl", [{"key": "q", "caption": "b"}]))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        read_captions(tmp_path / "b.jsonl")
