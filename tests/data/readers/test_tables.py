import contextlib
import csv
import gzip
import io
import json
import pickle
import tempfile
from pathlib import Path

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capjax.data.records import Caption, CorruptRecord, Example, decode_example, encode_example
from capjax.data.sources import Source, open_source
from capjax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Images beside a table to be, and below it."""
    (tmp_path / "img").mkdir()
    for name in ("a.jpg", "b.jpg", "img/c.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def write(folder, name, text):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(folder / name)


def examples(source):
    return [source[i] for i in range(len(source))]


def test_csv_gives_images_captions_and_the_other_columns(folder):
    path = write(
        folder,
        "t.csv",
        '\ufefffile_name,caption,width\r\na.jpg," A ""red"" dog,\nasleep ",640\r\n'
        'img/c.png,"[""one"", "" two ""]",\r\n',
    )
    source = open_source(path)
    assert isinstance(source, Source)
    assert examples(source) == [
        Example(
            "a.jpg",
            b"a.jpg",
            (Caption('A "red" dog,\nasleep', "caption"),),
            metadata={"width": "640"},
        ),
        Example(
            "img/c.png",
            b"img/c.png",
            (Caption("one", "caption"), Caption("two", "caption")),
            metadata={"width": ""},
        ),
    ]
    assert repr(source) == f"csv({path!r}; 2 images, 3 captions)"
    assert examples(pickle.loads(pickle.dumps(source))) == examples(source)
    with pytest.raises(IndexError, match="0 <= index < 2"):
        source[2]


def test_options_name_columns_images_and_key(folder):
    path = write(folder, "t.tsv", "id\tf\tshort\tlong\n7\tc.png\tcat\ta cat\n8\tno.png\t\ta dog\n")
    source = open_source(f"{path}?image=f&caption=short,long&key=id&images=img")
    assert source[0] == Example(
        "7", b"img/c.png", (Caption("cat", "short"), Caption("a cat", "long"))
    )
    assert "3 captions" in repr(source)
    with pytest.raises(CorruptRecord, match=r"no\.png.*FileNotFoundError") as caught:
        source[1]
    assert caught.value.index == 1


def test_neighbouring_rows_of_an_image_are_one_example(folder):
    text = "image|caption_number|caption\na.jpg|0|one\na.jpg|1|two\nb.jpg|0|three\n"
    source = open_source(f"csv:{write(folder, 'results.csv', text)}?delimiter=|")
    assert [[c.text for c in example.captions] for example in examples(source)] == [
        ["one", "two"],
        ["three"],
    ]
    assert source[0].metadata == {"caption_number": "0"}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz"])
def test_json_lines_and_lists(folder, suffix):
    items = [
        {"image": "a.jpg", "captions": ["one", " "], "score": 0.5, "tags": ["x", {"y": None}]},
        {"image": "b.jpg", "key": 3},
    ]
    text = "\ufeff" + "\n\n".join(map(json.dumps, items))
    data = (json.dumps(items) if suffix == ".json" else text).encode()
    path = write(folder, f"t{suffix}", gzip.compress(data) if suffix.endswith("gz") else data)
    assert examples(open_source(f"jsonl:{path}")) == [
        Example(
            "a.jpg",
            b"a.jpg",
            (Caption("one", "captions"),),
            metadata={"score": 0.5, "tags": ["x", {"y": None}]},
        ),
        Example("b.jpg", b"b.jpg", metadata={"key": 3}),
    ]


def test_damaged_rows_keep_their_place(folder):
    lines = [
        b"image,caption",
        b"a.jpg,fine",
        b"b.jpg,caf\xe9",
        b"b.jpg,too,many",
        b'b.jpg,"quote"d',
        b",no image",
        b"b.jpg,fine",
    ]
    source = open_source(write(folder, "t.csv", b"\n".join(lines)))
    reasons = {1: "UTF-8", 2: "3 fields", 3: "line 5: .* expected after", 4: "no image path"}
    for index, reason in reasons.items():
        with pytest.raises(CorruptRecord, match=reason):
            source[index]
    assert source[5].key == "b.jpg"
    assert "4 damaged rows" in repr(source)


def test_damaged_json_lines_keep_their_place(folder):
    lines = [
        b'{"image": "a.jpg", "caption": "x"}',
        b'{"image": "b.jpg", "caption": "caf\xe9"}',
        b'{"image": ',
        b"[1]",
        b"[" * 100_000,
        b'{"image": "b.jpg", "caption": "\\ud800"}',
        b'{"image": "a.jpg", "caption": "y", "n": 1' + b"0" * 30 + b"}",
        b'{"image": 7}',
        b'{"image": "b.jpg", "caption": "y", "\\udfff": 1}',
    ]
    source = open_source(write(folder, "t.jsonl", b"\n".join(lines)))
    assert source[0].key == "a.jpg"
    for index in range(1, len(lines)):
        with pytest.raises(CorruptRecord, match=r"record \d cannot be read"):
            source[index]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("t.csv", "", "header line"),
        ("t.csv", "image,caption\n", "no usable row among 0"),
        ("t.csv", "image,caption\n,x\n,y\n", "no usable row among 2; the first: line 2"),
        ("t.csv", "url,caption\na.jpg,x\n", r"which column is the image\? .*'url', 'caption'"),
        ("t.csv", "image,words\na.jpg,x\n", r"which column is the caption\?.*\?caption="),
        ("t.csv?caption=wrds", "image,words\na.jpg,x\n", "caption='wrds'.*did you mean words"),
        ("t.csv?key=id", "image,caption\na.jpg,x\n", "key='id' is no column"),
        ("t.csv?image=caption", "image,caption\na.jpg,x\n", r"which column is the caption"),
        ("t.csv?key=caption", "image,caption\na.jpg,x\n", "one column is two things"),
        ("t.csv", "image,image,caption\na.jpg,b,x\n", "'image' is there twice"),
        ("t.csv", b"image,caption\xff\na.jpg,x\n", "not UTF-8"),
        ("t.csv", '"image,caption\na.jpg,x\n', "quote opened in the record at line 1"),
        ("t.csv", 'image,caption\na.jpg,"x\nb.jpg,y\n', "quote .* line 2 is not closed"),
        ("t.csv?delimiter=ab", "image,caption\n", "delimiter='ab'.*one character"),
        ("t.csv", "image,caption\nno.jpg,x\n", r"none of the 1 images.*'no\.jpg'.*\?images="),
        ("t.csv?images=nowhere", "image,caption\na.jpg,x\n", "nowhere"),
        ("t.csv", "image,caption\na.jpg,x\nb.jpg,y\na.jpg,z\n", r"'a\.jpg' is that of row 0"),
        ("t.csv", "image,caption\nimg/../../a.jpg,x\n", "leaves the directory of the images"),
        ("t.jsonl", "[1]\n", "expected JSON objects"),
        ("t.jsonl", "\n", "no usable row among 0"),
        ("t.jsonl.gz", gzip.compress(b'{"image": "a.jpg"}' * 99, mtime=0)[:-9], "cannot read"),
        ("t.jsonl.gz", "not gzip", "cannot read"),
    ],
)
def test_table_wrong_as_a_whole_is_refused(folder, name, text, reason):
    path = write(folder, name.partition("?")[0], text)
    with pytest.raises(UserError, match=reason) as caught:
        open_source(path + name[len(name.partition("?")[0]) :])
    assert "\n" not in str(caught.value)


def test_json_list_of_another_make_is_refused(folder):
    for text, reason in (("{}", "got a dict"), ("[", "not JSON"), ("[1]", "JSON objects")):
        with pytest.raises(UserError, match=reason):
            open_source(f"jsonl:{write(folder, 't.json', text)}")


def test_missing_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="no file"):
        open_source(f"{tmp_path}/t.csv")


def test_empty_caption_option_means_none(folder):
    source = open_source(write(folder, "t.csv", "image,words\na.jpg,x\n") + "?caption=")
    assert source[0] == Example("a.jpg", b"a.jpg", metadata={"words": "x"})


def test_paths_of_the_table(folder):
    """Dots within the directory and absolute paths are read; a device is not."""
    text = f"image,caption\nimg/../a.jpg,x\n{folder}/b.jpg,y\n/dev/zero,z\n"
    source = open_source(write(folder, "t.csv", text))
    assert [source[i].image for i in range(2)] == [b"a.jpg", b"b.jpg"]
    with pytest.raises(CorruptRecord, match="not a regular file"):
        source[2]


def test_images_are_found_from_above_the_table_and_from_here(folder, monkeypatch):
    (folder / "lists").mkdir()
    path = write(folder, "lists/t.csv", "image,caption\nc.png,x\n")
    assert open_source(f"{path}?images=img")[0].key == "c.png"
    monkeypatch.chdir(folder)
    assert open_source("lists/t.csv?images=img")[0].image == b"img/c.png"


def test_remote_tables_and_images():
    system = fsspec.filesystem("memory")
    system.pipe("/bucket/lists/t.csv", b"image,caption\na.jpg,x\n")
    system.pipe("/bucket/photos/a.jpg", b"A")
    source = open_source("memory://bucket/lists/t.csv?images=photos")
    assert source[0] == Example("a.jpg", b"A", (Caption("x", "caption"),))


@contextlib.contextmanager
def table(name, data):
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, name).write_bytes(data)
        Path(directory, "a.jpg").write_bytes(b"A")
        yield f"{directory}/{name}"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5))
def test_any_text_survives_csv(rows):
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["id", "image", "caption", "other"])
    for i, (caption, other) in enumerate(rows):
        writer.writerow([i, "a.jpg", "." + caption + ".", other])
    with table("t.csv", out.getvalue().encode()) as path:
        source = open_source(f"{path}?key=id")
        assert [
            (example.key, example.captions[0].text, example.metadata["other"])
            for example in examples(source)
        ] == [(str(i), f".{caption}.", other) for i, (caption, other) in enumerate(rows)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=5), st.booleans())
def test_any_text_survives_json_lines(rows, ascii_only):
    items = [
        {"id": i, "image": "a.jpg", "caption": f".{caption}.", "other": other}
        for i, (caption, other) in enumerate(rows)
    ]
    lines = "\n".join(json.dumps(item, ensure_ascii=ascii_only) for item in items)
    with table("t.jsonl", lines.encode()) as path:
        for example, item in zip(examples(open_source(f"{path}?key=id")), items, strict=True):
            assert example.captions[0].text == item["caption"]
            assert example.metadata == {"other": item["other"]}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["t.csv", "t.jsonl"]), st.binary(max_size=80))
def test_any_bytes_give_records_that_encode_or_a_stated_error(name, noise):
    head = b"image,caption\na.jpg,x\n" if name == "t.csv" else b'{"image":"a.jpg","caption":"x"}\n'
    with table(name, head + noise) as path, contextlib.suppress(UserError):
        source = open_source(path)
        for i in range(len(source)):
            with contextlib.suppress(CorruptRecord):
                assert decode_example(encode_example(source[i])) == source[i]


@pytest.mark.parametrize("text", ["[laughs] a man [sighs]", '["a", 1]', "[1, 2]", "['a', 'b']"])
def test_caption_in_brackets_stays_as_it_is(folder, text):
    path = write(folder, "t.jsonl", json.dumps({"image": "a.jpg", "caption": text}))
    assert open_source(path)[0].captions == (Caption(text, "caption"),)


def test_a_list_of_paths(folder):
    path = write(folder, "paths.txt", "a.jpg\r\n\n" + f"{folder}/b.jpg\nimg/c.png")
    source = open_source(path)
    keys = ["a.jpg", f"{folder}/b.jpg", "img/c.png"]
    assert [example.key for example in examples(source)] == keys
    assert [example.image for example in examples(source)] == [b"a.jpg", b"b.jpg", b"img/c.png"]
    assert len(open_source(f"list:{write(folder, 'paths', 'c.png')}?images=img")) == 1
    damaged = open_source(f"list:{write(folder, 'bad', b'a.jpg' + bytes([10, 255, 10]))}")
    with pytest.raises(CorruptRecord, match="line 2: not UTF-8"):
        damaged[1]
    with pytest.raises(UserError, match="none of the 1 images looked up is there"):
        open_source(write(folder, "gone.txt", "gone.jpg"))
