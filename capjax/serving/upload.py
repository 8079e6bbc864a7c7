"""The body of a request: an image, alone or in a form."""

from typing import NamedTuple

from starlette.datastructures import UploadFile
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
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "multipart/form-data":
        return _checked(Upload(body, []))

    async def replay():
        return {"type": "http.request", "body": body, "more_body": False}

    form_request = Request(request.scope, replay)
    async with form_request.form(max_files=1, max_fields=MAX_FIELDS) as form:
        parts = form.multi_items()
        files = [value for _, value in parts if isinstance(value, UploadFile)]
        fields = [(name, value) for name, value in parts if isinstance(value, str)]
        if not files:
            raise HTTPException(400, "the form has no file; send the image as one: -F image=@FILE")
        return _checked(Upload(await files[0].read(), fields))


def _checked(upload: Upload) -> Upload:
    if not upload.image:
        raise HTTPException(400, "there is no image; send its bytes as the body of the request")
    return upload


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
