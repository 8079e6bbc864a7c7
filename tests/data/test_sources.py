import json
import os
import pickle

import pytest

from capjax.data.records import ArrayRecordSource, Caption, CorruptRecord, Example, write_shards
from capjax.data.sources import (
    EMOJI_SPLITS,
    SOURCE_NAMES,
    ImageDirectory,
    Subset,
    open_source,
)
from capjax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Images at two depths, sidecars, and things that are none of either."""
    root = tmp_path / "photos"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / "b.PNG").write_bytes(b"B")
    (root / "a.jpg").write_bytes(b"A")
    (root / "a.txt").write_text("A small dog\n  on grass. \n", "utf-8")
    (root / "deep" / "c.jpeg").write_bytes(b"C")
    (root / "deep" / "c.txt").write_text(" \n", "utf-8")
    (root / "deep" / "er" / "d.webp").write_bytes(b"D")
    (root / "deep" / "e.gif").write_bytes(b"E")
    (root / "deep" / "f.bmp").write_bytes(b"F")
    (root / ".hidden" / "g.png").write_bytes(b"G")
    (root / "._a.jpg").write_bytes(b"resource fork")
    (root / "notes.md").write_text("no image")
    return root


def test_directory_gives_its_images_in_order_with_sidecar_captions(folder):
    source = open_source(folder)
    keys = ["a.jpg", "b.PNG", "deep/c.jpeg", "deep/e.gif", "deep/er/d.webp", "deep/f.bmp"]
    assert [source[i].key for i in range(len(source))] == keys
    assert source[0] == Example("a.jpg", b"A", (Caption("A small dog on grass.", "sidecar"),))
    assert source[2] == Example("deep/c.jpeg", b"C")
    assert "6 images" in repr(source)


def test_directory_of_img2dataset_has_metadata(tmp_path):
    """Its output_format="files": image, caption and metadata in a folder, a table beside that."""
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    metadata = {
        "url": "http://x/y.jpg",
        "key": "000000000",
        "status": "success",
        "error_message": None,
        "width": 256,
        "exif": "{}",
        "sha256": "ab",
    }
    for i, text in enumerate(["A dog ", None, "A cat"]):
        path = tmp_path / "00000" / f"{i:09d}.jpg"
        path.write_bytes(b"J")
        path.with_suffix(".txt").write_text(text or "")
        path.with_suffix(".json").write_text(json.dumps({"caption": text, **metadata}))
    (tmp_path / "00000" / "000000002.txt").unlink()
    source = open_source(tmp_path)
    assert source[0] == Example(
        "00000/000000000.jpg", b"J", (Caption("A dog", "sidecar"),), metadata=metadata
    )
    assert source[1].captions == ()
    assert source[2].captions == (Caption("A cat", "sidecar"),)


def test_json_sidecar_of_another_make(folder):
    for text, metadata in (("[1]", {}), ('{"shapes": [1]}', {"shapes": [1]})):
        (folder / "a.json").write_text(text)
        captions = (Caption("A small dog on grass.", "sidecar"),)
        assert open_source(folder)[0] == Example("a.jpg", b"A", captions, metadata=metadata)
    for text in ('{"caption": ', '{"caption": "\\ud800"}', "[" * 100_000):
        (folder / "a.json").write_text(text)
        with pytest.raises(CorruptRecord):
            open_source(folder)[0]


def test_source_of_images_pickles(folder):
    source = pickle.loads(pickle.dumps(open_source(str(folder))))
    assert [source[i].image for i in range(len(source))] == [b"A", b"B", b"C", b"E", b"D", b"F"]


def test_single_image_is_a_source_of_one(folder):
    source = open_source(folder / "b.PNG")
    assert len(source) == 1
    assert source[0] == Example("b.PNG", b"B")


def test_links_are_followed_once(folder):
    (folder / "deep" / "up").symlink_to(folder)
    (folder.parent / "more").mkdir()
    (folder.parent / "more" / "z.png").write_bytes(b"Z")
    (folder / "linked").symlink_to(folder.parent / "more")
    source = open_source(folder)
    assert isinstance(source, ImageDirectory)
    assert "linked/z.png" in source.keys
    assert len(source) == 7


@pytest.mark.parametrize("index", [-1, 6])
def test_image_index_outside_is_refused(folder, index):
    with pytest.raises(IndexError, match="0 <= index < 6"):
        open_source(folder)[index]


def test_image_that_cannot_be_read_is_corrupt(folder):
    source = open_source(folder)
    (folder / "a.jpg").unlink()
    (folder / "b.PNG").write_bytes(b"")
    (folder / "deep" / "c.txt").write_bytes(b"\xff\xfe")
    for index, reason in [(0, "No such file"), (1, "empty"), (2, "utf-8")]:
        with pytest.raises(CorruptRecord, match=reason) as caught:
            source[index]
        assert caught.value.index == index
        assert str(folder) in caught.value.shard


def test_shards_are_found_by_file_glob_and_directory(tmp_path):
    examples = [Example(f"k{i}", b"x") for i in range(5)]
    paths = write_shards(examples, tmp_path, "part", shard_size=2)
    for name in (tmp_path, tmp_path / "part-*", f"{tmp_path}/part-0000[0-2]*.array_record"):
        source = open_source(name)
        assert [source[i] for i in range(len(source))] == examples
    one = open_source(paths[1])
    assert [one[i].key for i in range(len(one))] == ["k2", "k3"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("emoji:trian", "did you mean 'emoji:train'"),
        ("emoji:validation", "emoji:val"),
        ("emoji", "expected one of emoji:train, emoji:val, emoji:composition"),
        ("emojis:style", "did you mean 'emoji:style'"),
        ("no/such/directory", "no source 'no/such/directory'"),
        ("no/such/*.array_record", "existing directory"),
        ("", "no source ''"),
    ],
)
def test_unknown_source_is_refused_with_the_names(name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        open_source(name)
    assert "\n" not in str(caught.value)


def test_directory_without_images_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("no image")
    with pytest.raises(UserError, match=r"no images in .*\.png") as caught:
        open_source(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "arrays.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="expected an image"):
        open_source(tmp_path / "arrays.npz")


def test_unreadable_directory_is_refused(folder, monkeypatch):
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, who may read all
    with pytest.raises(UserError, match="er: Permission denied"):
        open_source(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every directory")
def test_directory_without_permission_is_refused(folder):
    (folder / "deep").chmod(0)
    try:
        with pytest.raises(UserError, match="Permission denied"):
            open_source(folder)
    finally:
        (folder / "deep").chmod(0o755)


def test_source_names_are_the_splits():
    assert tuple(f"emoji:{split}" for split in EMOJI_SPLITS) == SOURCE_NAMES


def test_styles_choose_examples():
    whole = open_source("emoji:composition")
    parts = [open_source("emoji:composition", styles=styles) for styles in (("fluent",), "noto")]
    assert sum(map(len, parts)) == len(whole)
    for part, style in zip(parts, ("fluent", "noto"), strict=True):
        assert {part[i].metadata["style"] for i in range(len(part))} == {style}
    assert len(open_source("emoji:composition", styles=("noto", "fluent"))) == len(whole)
    copy = pickle.loads(pickle.dumps(parts[0]))
    assert isinstance(copy, Subset)
    assert copy[5] == parts[0][5]
    assert repr(copy).startswith("Subset(ArrayRecordSource(")
    with pytest.raises(IndexError):
        copy[len(copy)]


def test_flags_can_be_left_out():
    whole = open_source("emoji:style")
    plain = open_source("emoji:style", flags=False)
    groups = [plain[i].metadata["group"] for i in range(len(plain))]
    assert "Flags" not in groups
    assert len(set(groups)) == 9
    assert 200 < len(whole) - len(plain) < 300


@pytest.mark.parametrize(
    ("name", "styles"),
    [("emoji:train", ("twemoji",)), ("emoji:style", ("fluent",)), ("emoji:val", ())],
)
def test_unknown_styles_are_refused_with_the_valid_ones(name, styles):
    with pytest.raises(UserError, match=f"styles=.* of '{name}': expected some of"):
        open_source(name, styles=styles)


def test_options_of_emoji_are_refused_elsewhere(folder):
    with pytest.raises(UserError, match="no `styles` or `flags`"):
        open_source(folder, styles=("fluent",))


def test_missing_corpus_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("capjax.data.sources.EMOJI_DIRECTORY", tmp_path)
    with pytest.raises(UserError, match=r"build_emoji_corpus\.py"):
        open_source("emoji:train")


def test_embedded_source_is_array_record():
    assert isinstance(open_source("emoji:composition"), ArrayRecordSource)
