import json
import zlib

import fsspec
import pytest

from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.sources import open_source
from capjax.errors import UserError

URLS = [f"http://lh6.ggpht.com/{i}=s640?x,y" for i in range(4)]


@pytest.fixture
def cc3m(tmp_path):
    """Four rows; the images of rows 0 and 3 were to be had."""
    rows = [f'a "very" typical {i}\t{url}' for i, url in enumerate(URLS)]
    (tmp_path / "Train_GCC-training.tsv").write_text("\n".join(rows) + "\n")
    (tmp_path / "images").mkdir()
    for row in (0, 3):
        (tmp_path / "images" / f"{row}.jpg").write_bytes(b"%d" % row)
    return tmp_path / "Train_GCC-training.tsv"


def test_cc3m_without_the_images_that_are_gone(cc3m):
    source = open_source(f"conceptual:{cc3m}")
    assert [source[i] for i in range(len(source))] == [
        Example(
            f"{row}.jpg",
            b"%d" % row,
            (Caption(f'a "very" typical {row}', "caption"),),
            metadata={"url": URLS[row]},
        )
        for row in (0, 3)
    ]
    assert "2 images, 2 captions, 2 images not on disk" in repr(source)


def test_cc12m_has_the_url_first(tmp_path):
    (tmp_path / "cc12m.tsv").write_text(f"{URLS[0]}\t<PERSON> was the first\n{URLS[1]}\tsecond")
    (tmp_path / "got" / "00").mkdir(parents=True)
    (tmp_path / "got" / "00" / "00000001.webp").write_bytes(b"1")
    source = open_source(f"conceptual:{tmp_path}/cc12m.tsv?images=got&name=00/{{row:08d}}")
    assert len(source) == 1
    assert source[0].key == "00/00000001.webp"
    assert source[0].captions == (Caption("second", "caption"),)


def test_names_with_the_checksum_of_the_url(cc3m):
    checksum = zlib.crc32(URLS[1].encode())
    (cc3m.parent / "images" / f"1_{checksum}").write_bytes(b"one")  # that tool adds no suffix
    source = open_source(f"conceptual:{cc3m}?name={{row}}_{{crc32}}")
    assert [source[i].image for i in range(len(source))] == [b"one"]


def test_damaged_lines_keep_their_place(cc3m):
    cc3m.write_bytes(cc3m.read_bytes() + b"one field\n" + b"caf\xe9\t" + URLS[0].encode() + b"\n")
    (cc3m.parent / "images" / "5.jpg").write_bytes(b"5")
    source = open_source(f"conceptual:{cc3m}")
    for index, reason in ((2, "line 5: expected 2 fields, got 1"), (3, "UTF-8")):
        with pytest.raises(CorruptRecord, match=reason):
            source[index]


def test_conceptual_on_a_remote_store(cc3m):
    fsspec.filesystem("memory").put(str(cc3m.parent), "/cc3m", recursive=True)
    source = open_source(f"conceptual:memory://cc3m/{cc3m.name}")
    assert [source[i].image for i in range(len(source))] == [b"0", b"3"]


@pytest.mark.parametrize(
    ("text", "query", "reason"),
    [
        ("caption\turl\n", "", r"without a header; the first is \['caption', 'url'\]"),
        (f"x\t{URLS[0]}\n", "?name={line}", r"name='\{line\}': expected"),
        (f"x\t{URLS[0]}\n", "?name={row", "expected the names"),
        (f"x\t{URLS[0]}\n", "?name=none_{row}", "1 images not on disk"),
        ("", "", "no usable row"),
    ],
)
def test_conceptual_wrong_as_a_whole_is_refused(cc3m, text, query, reason):
    cc3m.write_text(text)
    with pytest.raises(UserError, match=reason):
        open_source(f"conceptual:{cc3m}{query}")


def redcaps_entry(key, caption):
    return {
        "image_id": key,
        "author": "djasz1",
        "url": "https://i.redd.it/ho0wntksivy21.jpg",
        "raw_caption": caption.upper(),
        "caption": caption,
        "subreddit": "abandoned",
        "score": 72,
        "created_utc": 1557352920,
        "permalink": "/r/abandoned/comments/bpzj7r/",
        "crosspost_parents": None,
    }


def test_redcaps_reads_every_annotation_file(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images" / "abandoned").mkdir(parents=True)
    for year, key in ((2017, "a1"), (2018, "b2")):
        entries = [redcaps_entry(key, f"found {key}"), redcaps_entry(f"{key}x", "gone")]
        (tmp_path / "annotations" / f"abandoned_{year}.json").write_text(
            json.dumps({"info": {"url": "https://redcaps.xyz"}, "annotations": [*entries, {}]})
        )
        (tmp_path / "images" / "abandoned" / f"{key}.jpg").write_bytes(key.encode())
    source = open_source(f"redcaps:{tmp_path}/annotations/*.json")
    assert len(source) == 4
    assert source[2].key == "b2"
    assert source[2].captions == (Caption("found b2", "caption"),)
    assert source[2].metadata["raw_caption"] == "FOUND B2"
    assert source[2].metadata["score"] == 72
    with pytest.raises(CorruptRecord, match="no image_id"):
        source[1]
    assert "2 damaged rows, 2 images not on disk" in repr(source)
    (tmp_path / "annotations" / "other.json").write_text('{"annotations": 1}')
    with pytest.raises(UserError, match="list of objects as 'annotations'"):
        open_source(f"redcaps:{tmp_path}/annotations/*.json")
