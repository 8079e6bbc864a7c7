"""Records as the bytes of a file: JSON lines, or Parquet. The same records give the same bytes."""

import io
import json
from collections.abc import Sequence
from typing import Any

from capjax.data.readers.row_groups import import_parquet
from capjax.decoding.options import DecodingOptions

FORMATS = ("jsonl", "parquet")


def encode_records(records: Sequence[dict[str, Any]], kind: str, options: DecodingOptions) -> bytes:
    """The file of `records`, one of `FORMATS`. Raises `UserError` for Parquet without pyarrow."""
    if kind == "jsonl":
        return b"".join(json_line(record) for record in records)
    return _parquet(records, options)


def json_line(record: dict[str, Any]) -> bytes:
    """UTF-8; a record whose key is no text (a file name may be any bytes) is escaped to ASCII."""
    try:
        return json.dumps(record, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode() + b"\n"


def _parquet(records: Sequence[dict[str, Any]], options: DecodingOptions) -> bytes:
    parquet = import_parquet()
    import pyarrow as pa

    text, is_schedule = pa.string(), isinstance(options.guidance_scale, tuple)
    caption = {
        "caption": text,
        "logprob": pa.float64(),
        "num_tokens": pa.int32(),
        "finish": text,
        "filtered": text,
    }
    schema = pa.schema(
        {
            "index": pa.int64(),
            "key": text,
            "references": pa.list_(text),
            **caption,
            "guidance_scale": pa.list_(pa.float64()) if is_schedule else pa.float64(),
            "seed": pa.int64(),
            "captions": pa.list_(pa.struct(list(caption.items()))),
            "duplicate_of": text,
            "error": text,
        }
    )
    columns = [
        pa.array([_text(record.get(field.name)) for record in records], field.type)
        for field in schema
    ]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_arrays(columns, schema=schema), file)
    return file.getvalue()


def _text(value: Any) -> Any:
    """Texts that UTF-8 can hold (a file name may be any bytes); other values as they are."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
