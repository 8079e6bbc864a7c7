import datetime
import decimal
import pickle
import sys
import threading

import fsspec
import pytest

from capjax.data.readers.parquet import ParquetRows
from capjax.data.records import (
    Caption,
    CorruptRecord,
    Example,
    decode_example,
    encode_example,
)
from capjax.data.sources import Source, open_source
from capjax.errors import UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def write(path, columns, rows_of_group=2, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, row_group_size=rows_of_group, **options)
    return str(path)


def examples(source):
    return [source[i] for i in range(len(source))]


def shard(number, failed=()):
    """What img2dataset writes with output_format="parquet", in its order of columns."""
    keys = [f"{number:05d}{i:04d}" for i in range(5)]
    gone = [i in failed for i in range(5)]
    return {
        "url": [f"http://x/{key}.jpg" for key in keys],
        "caption": [f" a photo of {key}" for key in keys],
        "key": keys,
        "status": ["failed_to_download" if no else "success" for no in gone],
        "error_message": ["HTTP Error 404" if no else None for no in gone],
        "width": pa.array([None if no else 256 for no in gone], pa.int32()),
        "height": pa.array([None if no else 256 for no in gone], pa.int32()),
        "original_width": pa.array([None if no else 640 for no in gone], pa.int32()),
        "original_height": pa.array([None if no else 480 for no in gone], pa.int32()),
        "exif": [None if no else "{}" for no in gone],
        "sha256": [None if no else "ab" for no in gone],
        "jpg": [None if no else key.encode() for key, no in zip(keys, gone, strict=True)],
    }


def test_img2dataset_shards_without_what_failed(tmp_path):
    write(tmp_path / "00000.parquet", shard(0, failed=[1, 2]))
    write(tmp_path / "00001.parquet", shard(1, failed=[4]))
    sources = [
        open_source(name)
        for name in (
            f"{tmp_path}/*.parquet",
            f"{tmp_path}/{{00000..00001}}.parquet",
            f"parquet:{tmp_path}",
        )
    ]
    for source in sources:
        assert isinstance(source, Source)
        keys = "000000000 000000003 000000004 000010000 000010001 000010002 000010003"
        assert [example.key for example in examples(source)] == keys.split()
    example = sources[0][2]
    assert example.image == b"000000004"
    assert example.captions == (Caption("a photo of 000000004", "caption"),)
    assert example.metadata["original_width"] == 640
    assert "7 images in 2 files, 3 rows without status success" in repr(sources[0])
    assert examples(pickle.loads(pickle.dumps(sources[0]))) == examples(sources[0])
    assert decode_example(encode_example(example)) == example
    with pytest.raises(IndexError, match="0 <= index < 7"):
        sources[0][7]


def test_hugging_face_images(tmp_path):
    """A struct of bytes and path, several captions, no keys: FILE:ROW is the key."""
    when = datetime.datetime(2024, 1, 2)
    for name in ("test/x-00000-of-00001", "train/x-00000-of-00001"):
        image = [{"bytes": f"{name}{i}".encode(), "path": f"{i}.jpg"} for i in range(3)]
        columns = {
            "image": image,
            "captions": [["one", " two "], [], None],
            "when": [when] * 3,
            "price": [decimal.Decimal("1.5")] * 3,
            "tags": [[("a", 1)]] * 3,
        }
        types = {"tags": pa.map_(pa.string(), pa.int32())}
        arrays = {key: pa.array(value, types.get(key)) for key, value in columns.items()}
        write(tmp_path / f"{name}.parquet", arrays)
    source = open_source(f"parquet:{tmp_path}")
    assert source[0] == Example(
        "test/x-00000-of-00001.parquet:0",
        b"test/x-00000-of-000010",
        (Caption("one", "captions"), Caption("two", "captions")),
        metadata={"when": str(when), "price": "1.5", "tags": [["a", 1]]},
    )
    assert source[5].key == "train/x-00000-of-00001.parquet:2"
    assert source[5].captions == ()
    assert open_source(f"{tmp_path}/test/*.parquet")[1].key == "x-00000-of-00001.parquet:1"


def test_options_name_columns(tmp_path):
    path = write(tmp_path / "t.parquet", {"b": [b"B"], "s": ["cat"], "l": ["a cat"], "n": [7]})
    source = open_source(f"{path}?image=b&caption=s,l&key=n")
    assert source[0] == Example("7", b"B", (Caption("cat", "s"), Caption("a cat", "l")))


def test_paths_of_images(tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.jpg").write_bytes(b"A")
    table = {"filepath": ["a.jpg", "b.jpg"], "text": ["x", "y"], "status": ["success", "failed"]}
    path = write(tmp_path / "t.parquet", table)
    source = open_source(f"{path}?images=img")
    assert examples(source) == [
        Example("a.jpg", b"A", (Caption("x", "text"),), metadata={"status": "success"})
    ]
    write(tmp_path / "t.parquet", {"filepath": ["../../a.jpg"], "text": ["x"]})
    with pytest.raises(UserError, match="leaves the directory"):
        open_source(f"{path}?images=img")


def test_remote_files(tmp_path):
    path = write(tmp_path / "t.parquet", shard(0))
    fsspec.filesystem("memory").put(path, "/parquet/deep/t.parquet")
    for address in ("memory://parquet/deep/t.parquet", "parquet:memory://parquet"):
        assert examples(open_source(address)) == examples(open_source(path))


def test_row_groups_are_read_once_and_dropped_by_size(tmp_path, monkeypatch):
    columns = {"image": [b"x" * 400_000] * 8, "caption": ["c"] * 8}
    path = write(tmp_path / "t.parquet", columns, compression="none", use_dictionary=False)
    source = open_source(f"{path}?cache_megabytes=2")
    assert isinstance(source, ParquetRows)
    assert source.block_size == 2
    reads = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda self, group, **more: reads.append(group) or read(self, group, **more),
    )
    for i in (0, 1, 2, 3, 0, 7, 6, 1, 2):
        assert len(source[i].image) == 400_000
    assert reads == [0, 1, 3, 1]


def test_threads_share_a_source(tmp_path):
    columns = {"image": [b"%d" % i for i in range(200)], "caption": ["c"] * 200}
    source = open_source(write(tmp_path / "t.parquet", columns, rows_of_group=10))
    wrong = []

    def read(step):
        wrong.extend(i for i in range(0, 200, step) if source[i].image != b"%d" % i)

    threads = [threading.Thread(target=read, args=(step,)) for step in (1, 3, 7, 11)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("columns", "query", "reason"),
    [
        ({"url": ["u"], "caption": ["c"]}, "", r"which column is the image\?.*'url', 'caption'"),
        ({"jpg": [b"x"]}, "", r"which column is the caption"),
        ({"jpg": [b"x"], "caption": ["c"]}, "?image=jpeg", "image='jpeg' is no column.*jpg"),
        ({"jpg": [1], "caption": ["c"]}, "", "'jpg' is of type int64; expected bytes"),
        ({"jpg": [b"x"], "caption": [{"raw": "c"}]}, "", "'caption' is of type struct"),
        ({"jpg": [b"x"], "caption": ["c"], "key": [0.5]}, "", "'key' is of type double"),
        ({"jpg": [b"x"] * 2, "caption": ["c"] * 2, "key": ["k"] * 2}, "", "'k' is that of two"),
        ({"jpg": [b"x"], "caption": ["c"], "status": ["failed"]}, "", "none of its 1 rows"),
        ({"jpg": pa.array([], pa.binary()), "caption": pa.array([], pa.string())}, "", "0 rows"),
        ({"jpg": [b"x"], "caption": ["c"]}, "?cache_megabytes=-1", "cache_megabytes='-1'"),
        ({"jpg": [b"x" * 9], "caption": ["c"]}, "?cache_megabytes=0", "row_group_size=100"),
    ],
)
def test_parquet_wrong_as_a_whole_is_refused(tmp_path, columns, query, reason):
    path = write(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=reason):
        open_source(path + query)


def test_files_that_do_not_agree_are_refused(tmp_path):
    write(tmp_path / "a.parquet", {"image": [b"x"], "caption": ["c"]})
    write(tmp_path / "b.parquet", {"image": [b"x"]})
    with pytest.raises(UserError, match=r"b\.parquet: no column 'caption'"):
        open_source(f"parquet:{tmp_path}")
    write(tmp_path / "b.parquet", {"image": ["x.jpg"], "caption": ["c"]})
    with pytest.raises(UserError, match="bytes in some files and paths in others"):
        open_source(f"parquet:{tmp_path}")
    write(tmp_path / "b.parquet", {"image": [b"x"], "caption": ["c"], "status": ["success"]})
    assert len(open_source(f"parquet:{tmp_path}")) == 2
    write(tmp_path / "a.parquet", {"image": [b"x"], "caption": ["c"], "status": ["failed"]})
    write(tmp_path / "b.parquet", {"image": [b"x"], "caption": ["c"]})
    assert len(open_source(f"parquet:{tmp_path}")) == 1


def test_directory_with_the_suffix(tmp_path):
    write(tmp_path / "set.parquet" / "part-0.parquet", shard(0))
    assert len(open_source(tmp_path / "set.parquet")) == 5


def test_types_of_keys_may_differ_between_files(tmp_path):
    for name, keys in (
        ("a", [1, 2]),
        ("b", ["3", "4"]),
        ("c", pa.array(["5", "6"]).dictionary_encode()),
    ):
        table = {"image": [b"x"] * 2, "caption": ["c"] * 2, "key": keys}
        write(tmp_path / f"{name}.parquet", table)
    source = open_source(f"parquet:{tmp_path}")
    assert [example.key for example in examples(source)] == ["1", "2", "3", "4", "5", "6"]
    write(tmp_path / "d.parquet", {"image": [b"x"], "caption": ["c"], "key": ["2"]})
    with pytest.raises(UserError, match="'2' is that of two rows"):
        open_source(f"parquet:{tmp_path}")


def test_file_of_another_format_or_none_is_refused(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_source(tmp_path / "t.parquet")
    for name in (f"{tmp_path}/none.parquet", f"parquet:{tmp_path}/nowhere"):
        with pytest.raises(UserError, match="no file"):
            open_source(name)


def test_records_that_cannot_be_read_are_corrupt(tmp_path):
    columns = {"jpg": [b"a", b"", None, b"d"], "caption": list("abcd"), "key": ["k", "l", "m", ""]}
    path = write(tmp_path / "t.parquet", columns)
    source = open_source(path)
    for index, reason in ((1, "no image bytes"), (2, "no image bytes"), (3, "no key")):
        with pytest.raises(CorruptRecord, match=reason) as caught:
            source[index]
        assert (caught.value.shard, caught.value.index) == (path, index)
    write(tmp_path / "t.parquet", {name: values[:2] for name, values in columns.items()})
    with pytest.raises(CorruptRecord):
        open_source(path) and source[3]


def test_remote_row_groups_are_read_again_where_a_read_fails(tmp_path, failing):
    path = write(tmp_path / "t.parquet", {"jpg": [b"a", b"b"], "caption": ["x", "y"]})
    fsspec.filesystem("memory").put(path, "/failing.parquet")
    pauses = failing(2, ConnectionResetError())
    source = open_source("memory://failing.parquet")
    assert len(pauses) == 2
    failing(3, TimeoutError())
    assert source[1].image == b"b"


def test_damaged_pages_are_corrupt_records(tmp_path):
    columns = {"jpg": [bytes(range(200)) * 9] * 4, "caption": ["some words"] * 4}
    path = tmp_path / "t.parquet"
    write(path, columns, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[8:60] = b"\xff" * 52
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(CorruptRecord):
        source[0]
    assert source[3].captions[0].text == "some words"


def test_without_pyarrow_the_way_out_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "t.parquet", shard(0))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'capjax\[parquet\]'"):
        open_source(path)
