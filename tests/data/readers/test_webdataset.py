import io
import json
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import webdataset
from PIL import Image
from webdataset import tariterators

from capjax.data.augmentation import Augment
from capjax.data.images import ImagePreprocessing
from capjax.data.pipeline import Reading, train_batches
from capjax.data.readers.tar_index import image_of
from capjax.data.readers.webdataset import WebDataset
from capjax.data.records import Caption, CorruptRecord, Example
from capjax.data.sources import Source, open_source
from capjax.data.tokenizer import Tokenizer
from capjax.errors import UserError


def write_tar(path, members, form=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) pairs, or of TarInfo for what is no file."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(i, **more):
    """What webdataset's writers take; the bytes are no real image, which nothing here decodes."""
    return {"__key__": f"{i:05d}", "jpg": b"image %d" % i, "txt": f"caption {i}", **more}


def write_samples(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for one in samples:
            writer.write(one)
    return path


def oracle(*paths):
    """The samples as webdataset's own reader has them."""
    samples = []
    for path in paths:
        with Path(path).open("rb") as file:
            members = ({**one, "__url__": ""} for one in tariterators.tar_file_iterator(file))
            samples += tariterators.group_by_keys(members)
    return samples


def all_of(source):
    return [source[i] for i in range(len(source))]


@pytest.fixture
def tars(tmp_path):
    """Three tars of 4, 4 and 2 samples, as webdataset's own writer makes them."""
    pattern = str(tmp_path / "%05d.tar")
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            writer.write(sample(i, json={"width": i}, npy=b"never read", pyd={"a": i}))
    return tmp_path


def test_reads_what_webdataset_reads(tars):
    source = open_source(f"webdataset:{tars}/{{00000..00002}}.tar")
    assert isinstance(source, Source)
    read = all_of(source)
    theirs = oracle(*sorted(tars.glob("*.tar")))
    assert [(x["jpg"], x["txt"].decode(), x["__key__"]) for x in theirs] == [
        (x.image, x.captions[0].text, x.key.partition("/")[2]) for x in read
    ]
    assert read[5] == Example(
        "00001/00005", b"image 5", (Caption("caption 5", "txt"),), metadata={"width": 5}
    )
    assert repr(source) == f"WebDataset('{tars}/00000.tar', +2 files; 10 examples)"


def test_paths_globs_and_suffix(tars):
    whole = all_of(open_source(f"webdataset:{tars}/*.tar"))
    assert len(whole) == 10
    assert all_of(open_source(f"{tars}/*.tar")) == whole
    assert all_of(open_source(f"{tars}/00002.tar")) == whole[8:]


def test_pickles_and_threads_share_it(tars):
    source = pickle.loads(pickle.dumps(open_source(f"{tars}/*.tar")))
    expected = all_of(source)
    with ThreadPoolExecutor(8) as pool:
        rows = [i % 10 for i in range(500)]
        assert list(pool.map(source.__getitem__, rows)) == [expected[i] for i in rows]
    for index in (-1, 10):
        with pytest.raises(IndexError, match="0 <= index < 10"):
            source[index]


def captions_of(tmp_path, record, options="", text=None):
    members = [("a.jpg", b"x"), ("a.json", json.dumps(record).encode())]
    members += [("a.txt", text.encode())] if text is not None else []
    path = write_tar(tmp_path / "x.tar", members)
    return [
        tuple(caption)[:2] for caption in open_source(f"webdataset:{path}{options}")[0].captions
    ]


def test_captions_come_from_the_fields_asked_for(tmp_path):
    record = {"caption": "from json", "alt": ["one", " two\n", 3, ""], "in": {"er": "deep"}}
    text = " of the\n text "
    assert captions_of(tmp_path, record, text=text) == [("of the text", "txt")]
    assert captions_of(tmp_path, record) == [("from json", "json.caption")]
    assert captions_of(tmp_path, record, text=" ") == [("from json", "json.caption")]
    several = {"captions": ["p", "q"]}
    assert captions_of(tmp_path, several) == [("p", "json.captions"), ("q", "json.captions")]
    options = "?captions=json.alt,txt,json.in.er,json.no"
    assert captions_of(tmp_path, record, options, text) == [
        ("one", "json.alt"),
        ("two", "json.alt"),
        ("of the text", "txt"),
        ("deep", "json.in.er"),
    ]
    assert captions_of(tmp_path, {"caption": None}) == []


def test_output_of_img2dataset(tmp_path):
    """Its keys, its JSON of scalars, and the .txt that repeats the caption."""
    record = {
        "caption": "a dog", "url": "http://x/y.jpg", "key": "000000000", "status": "success",
        "error_message": None, "width": 256, "height": 170, "original_width": 640,
        "exif": '{"Image Orientation": "Horizontal"}', "sha256": "9f86", "similarity": 0.3,
    }  # fmt: skip
    one = {"__key__": "000000000", "jpg": b"x", "txt": "a dog", "json": record}
    source = open_source(write_samples(tmp_path / "00000.tar", [one]))
    assert source[0] == Example(
        "00000/000000000", b"x", (Caption("a dog", "txt"),), metadata=record
    )


def test_members_are_grouped_as_webdataset_groups(tmp_path):
    members = [
        ("./dir.v2/a.JPG", b"a"), ("./dir.v2/a.Txt", b"A"), ("b.image.jpg", b"b"),
        ("b.seg.png", b"not this"), ("c.cls", b"3"), ("no-extension", b"y"), (".hidden", b"z"),
        ("__meta__", b"m"), ("__index__/x.jpg", b"m"), ("d.webp", b"d"), ("d.jpeg", b"this"),
        ("e.txt", b"no image"), ("f.png", b"f"), ("g.gif", b"other image"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "x.tar", members)
    read = {example.key: example.image for example in all_of(open_source(path))}
    assert read == {"x/dir.v2/a": b"a", "x/b": b"b", "x/d": b"this", "x/f": b"f"}
    theirs = {one["__key__"] for one in oracle(path) if image_of(one)}
    assert theirs == {"./dir.v2/a", "b", "d", "f"}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(tmp_path, form):
    names = [f"{'folder/' * 20}{'n' * 90}{i}.jpg" for i in range(3)] + ["plain.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 5000 + ".jpg", "наклейка.jpg"]
    read = all_of(
        open_source(write_tar(tmp_path / "t.tar", [(n, n.encode()) for n in names], form))
    )
    assert [x.image.decode() for x in read] == names
    assert [x.key for x in read] == ["t/" + name.removesuffix(".jpg") for name in names]


def test_sizes_of_pax_and_gnu_headers(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "5", "comment": "x" * 700}
    path = write_tar(tmp_path / "x.tar", [(info, b"12345"), ("b.jpg", b"b")])
    content = bytearray(path.read_bytes())
    header = content.index(b"b.jpg")
    content[header + 124 : header + 136] = b"\x80" + (1).to_bytes(11, "big")
    content[header + 148 : header + 156] = b" " * 8
    total = sum(content[header : header + 512])
    content[header + 148 : header + 156] = b"%06o\0 " % total
    path.write_bytes(content)
    assert [x.image for x in all_of(open_source(path))] == [b"12345", b"b"]


def test_members_that_are_no_files_or_lead_elsewhere(tmp_path):
    def special(name, kind, link=""):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info, b""

    (tmp_path / "in").mkdir()
    path = write_tar(
        tmp_path / "in" / "x.tar",
        [
            special("dir.jpg", tarfile.DIRTYPE),
            ("../../up.jpg", b"up"),
            ("/etc/abs.jpg", b"abs"),
            special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            special("hard.jpg", tarfile.LNKTYPE, "../../up.jpg"),
            special("device.jpg", tarfile.CHRTYPE),
            special("pipe.jpg", tarfile.FIFOTYPE),
            ("ok.jpg", b"ok"),
        ],
    )
    read = all_of(open_source(path))
    assert [(x.key, x.image) for x in read] == [
        ("x/up", b"up"), ("x/etc/abs", b"abs"), ("x/ok", b"ok"),
    ]  # fmt: skip
    assert {p.name for p in tmp_path.rglob("*")} == {"in", "x.tar", ".capjax-index", "x.tar.index"}


def test_pickles_are_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (tmp_path / "exploded").touch, ()

    bomb = pickle.dumps(Bomb())
    kinds = ("pkl", "pickle", "pyd", "pth", "npy", "npz")
    members = [("a.jpg", b"x"), *((f"a.{kind}", bomb) for kind in kinds)]
    assert open_source(write_tar(tmp_path / "x.tar", members))[0] == Example("x/a", b"x")
    assert not (tmp_path / "exploded").exists()


def test_keys_are_unique_whatever_the_tars_hold(tmp_path):
    members = [
        ("a.jpg", b"1"),
        ("b.jpg", b"2"),
        ("a.jpg", b"3"),
        ("a.jpg", b"4"),
        ("a#2.jpg", b"5"),
    ]
    for name in ("one/0.tar", "two/0.tar", "two/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, members)
    keys = [x.key for x in all_of(open_source(f"webdataset:{tmp_path}/*/*.tar"))]
    assert keys[:5] == ["one/0/a", "one/0/b", "one/0/a#2", "one/0/a#3", "one/0/a#2#2"]
    assert len(set(keys)) == 15


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", b"")], "its jpg has 0 bytes"),
        ([("a.jpg", b"x"), ("a.json", b"{")], "Expecting property name"),
        ([("a.jpg", b"x"), ("a.json", b"[1]")], "no object"),
        ([("a.jpg", b"x"), ("a.json", b"[" * 100_000)], "recursion"),
        ([("a.jpg", b"x"), ("a.json", b'{"a":' + b"9" * 9999 + b"}")], "digits"),
        ([("a.jpg", b"x"), ("a.txt", b"\xff\xfe")], "utf-8"),
        ([("a.jpg", b"x"), ("a.txt", b" " * (1 << 24) + b"x")], "its txt has 16777217 bytes"),
    ],
)
def test_record_that_cannot_be_read_is_corrupt(tmp_path, members, reason):
    path = write_tar(tmp_path / "x.tar", [("ok.jpg", b"x"), *members])
    source = open_source(path)
    assert source[0].key == "x/ok"
    with pytest.raises(CorruptRecord, match=reason) as caught:
        source[1]
    assert (caught.value.shard, caught.value.index) == (str(path), 1)


def test_metadata_fits_a_record(tmp_path):
    record = '{"n": 99999999999999999999, "s": "\\ud800", "l": [1], "f": 1.5, "t": true, "z": null}'
    path = write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.json", record.encode())])
    metadata = open_source(path)[0].metadata
    assert metadata == {"n": "99999999999999999999", "s": "?", "f": 1.5, "t": True, "z": None}


def test_truncated_tar_is_read_as_far_as_it_is_whole(tars):
    path = tars / "00001.tar"
    content = path.read_bytes()
    whole = all_of(open_source(path))
    cut = content.index(b"00006.jpg")
    path.write_bytes(content[: cut + 512 + 3])
    with pytest.warns(
        UserWarning, match=r"1 of 3 tars are damaged .*00001\.tar from byte"
    ) as warned:
        source = open_source(f"{tars}/*.tar")
    assert len(warned) == 1
    assert isinstance(source, WebDataset)
    assert all_of(source)[4:6] == whole[:2]
    assert len(source) == 8
    assert list(source.damage) == [str(path)]
    assert "1 damaged" in repr(source)
    with pytest.warns(UserWarning, match="damaged"):  # from the kept index too
        open_source(path)


def test_tar_without_end_mark_keeps_its_last_sample(tars):
    path = tars / "00002.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(512 * 18, b"\0"))
    with pytest.warns(UserWarning, match="no end mark"):
        assert len(open_source(path)) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no end mark"),
        (b"garbage" * 1000, "checksum|no number"),
        (b"\x1f\x8b" + bytes(2000), "decompress it"),
        (bytes(10240), "no sample with an image"),
    ],
)
def test_what_is_no_tar_is_refused(tmp_path, content, reason):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        open_source(tmp_path / "x.tar")
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("captions=caption", "'caption' names no captions"),
        ("captions=json", "'json' names no captions"),
        ("captions=txt,", "'' names no captions"),
        ("block=0", "block=0: expected a whole number of samples"),
        ("block=many", "block=many"),
        ("caption=txt", "did you mean 'captions'"),
    ],
)
def test_impossible_options_are_refused(tars, options, reason):
    with pytest.raises(UserError, match=reason):
        open_source(f"webdataset:{tars}/*.tar?{options}")


def test_missing_tar_is_refused(tars):
    with pytest.raises(UserError, match=r"no file .*00003\.tar"):
        open_source(f"webdataset:{tars}/{{00000..00003}}.tar")


def test_tar_changed_behind_the_index_gives_corrupt_records(tars):
    source = open_source(f"{tars}/*.tar")
    write_samples(tars / "00001.tar", [sample(i, json={"more": "x" * 5000}) for i in range(4)])
    assert source[0].image == b"image 0"
    with pytest.raises(CorruptRecord, match="changed since it was indexed"):
        source[4]
    (tars / "00002.tar").unlink()
    with pytest.raises(CorruptRecord, match="No such file"):
        source[9]


def test_remote_tars_are_read_by_blocks(tars, tmp_path):
    remote = f"memory://{tmp_path.name}"
    for path in tars.glob("*.tar"):
        fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    options = f"cache={tmp_path}/cache&block=3"
    source = open_source(f"webdataset:{remote}/{{00000..00002}}.tar?{options}")
    local = open_source(f"{tars}/*.tar")
    assert isinstance(source, WebDataset)
    assert all_of(source) == all_of(local)
    assert source.blocks.reads == 6, "0-2 3 | 4-5 6-7 | 8 9: blocks end with their tar"
    again = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(again.__getitem__, [5] * 50)) == [local[5]] * 50
    assert again.blocks.reads == 1
    assert open_source(f"webdataset:{remote}/*.tar?cache={tmp_path}/cache").block_size == 256


def test_training_reads_each_block_of_a_remote_tar_once_an_epoch(tmp_path):
    """All the way: the batches' order is by blocks, and each example comes once."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    path = tmp_path / "x.tar"
    write_tar(path, [(f"{i:03d}.{end}", data) for i in range(240) for end, data in
                     (("png", buffer.getvalue()), ("txt", b"caption %d" % i))])  # fmt: skip
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/x.tar", path.read_bytes())
    source = open_source(f"memory://{tmp_path.name}/x.tar?block=8&cache={tmp_path}/cache")
    seen = []

    class Recorded:
        block_size = 8

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            seen.append(index)
            return source[index]

    with train_batches(
        Recorded(),
        Tokenizer.train([f"caption {i}" for i in range(100)], 300),
        preprocessing=ImagePreprocessing(8),
        augment=Augment(),
        text_length=16,
        batch_size=8,
        seed=3,
        reading=Reading(num_threads=0, cache_megabytes=0),
    ) as batches:
        for _ in range(30):
            next(batches)
    assert sorted(seen) == list(range(240))
    assert source.blocks.reads == 30
