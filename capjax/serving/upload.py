"""The body of a request: an image, alone or in a form. Nothing of it is written to disk."""

from typing import NamedTuple

from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request

MAX_FIELDS = 16


class Upload(NamedTuple):
    """The encoded bytes of an image, and the text fields of the form it came in."""

    image: bytes
    fields: list[tuple[str, str]]


async def read_upload(request: Request, max_bytes: int) -> Upload:
    """The image of a request: its raw body, or the one file of a multipart form.

    Raises `HTTPException` 413 beyond `max_bytes`, before they are kept, and 400 without an image.
    """
    body = await _read_body(request, max_bytes)
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        try:
            upload = _read_form(body, options.get(b"boundary"))
        except ValueError as error:
            raise HTTPException(400, f"the form cannot be read: {error}") from error
    else:  # whatever the client calls it: curl says that it sends a form
        upload = Upload(body, [])
    if not upload.image:
        raise HTTPException(400, "there is no image; send its bytes as the body of the request")
    return upload


def _read_form(body: bytes, boundary: bytes | None) -> Upload:
    images: list[bytes] = []
    fields: list[tuple[str, str]] = []

    def on_file(file: File) -> None:
        if images:
            raise FormParserError("more than one file")
        file.file_object.seek(0)
        images.append(file.file_object.read())

    def on_field(field: Field) -> None:
        if len(fields) == MAX_FIELDS:
            raise FormParserError(f"more than {MAX_FIELDS} fields")
        name, value = field.field_name or b"", field.value or b""
        fields.append((name.decode(errors="replace"), value.decode(errors="replace")))

    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    parser = FormParser(
        "multipart/form-data", on_field, on_file, boundary=boundary, config=in_memory
    )
    parser.write(body)
    parser.finalize()
    if not images:
        raise FormParserError("it has no file; send the image as one, -F image=@FILE")
    return Upload(images[0], fields)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    refusal = HTTPException(413, f"the body has more than {max_bytes} bytes; send a smaller image")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise refusal
    return bytes(body)
