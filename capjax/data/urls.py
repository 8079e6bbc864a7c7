"""Which URLs are read, and where a server may send us on to."""

import asyncio
import ipaddress
from typing import Any

from capjax.errors import UserError, did_you_mean

# Others that fsspec knows run programs, log in or unpack archives.
SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "abfss", "hf", "https", "http", "file", "memory")


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path within it.

    Raises `UserError` for a scheme that is not one of `SCHEMES`, for several in one (`::`), and
    where the package that reads it is missing.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES or "::" in url:
        raise UserError(
            f"cannot read {url!r}: expected a URL, without ::, that begins with one of "
            f"{', '.join(f'{name}://' for name in SCHEMES)}{did_you_mean(scheme, SCHEMES)}"
        )
    import fsspec

    options = {"get_client": _client} if scheme in ("http", "https") else {}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"cannot read {url!r}: {error}; install the fsspec package of that kind of storage "
            "(s3fs, gcsfs, adlfs, aiohttp), or give another URL"
        ) from error


async def _client(**options: Any) -> Any:
    """A session of HTTP whose redirects are checked."""
    import aiohttp

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(check_redirect)
    return aiohttp.ClientSession(trace_configs=[trace], **options)


async def check_redirect(session: Any, context: Any, params: Any) -> None:
    """Raises `PermissionError` where another host sends us on to an address that is not public.

    Else a stranger's server could ask, through us, what only this machine reaches. `params` are of
    aiohttp's `TraceConfig.on_request_redirect`.
    """
    import yarl

    headers = params.response.headers
    target = params.url.join(yarl.URL(headers.get("Location") or headers.get("URI") or ""))
    if target.host is None or target.host == params.url.host:
        return
    found = await asyncio.get_running_loop().getaddrinfo(target.host, None)
    for *_, address in found:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
        if not (getattr(ip, "ipv4_mapped", None) or ip).is_global:
            raise PermissionError(
                f"{params.url} leads to {target}, whose address {ip} is not public; give that URL "
                "itself if you trust it"
            )
