"""What is read over the network, and where a server may send us on to; the network is this host."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import yarl

from capjax.data import files
from capjax.data.sources import open_source
from capjax.data.urls import check_redirect
from capjax.errors import UserError


class Handler(BaseHTTPRequestHandler):
    """`/to?URL` sends on to that URL; all else is ten bytes."""

    def do_GET(self):
        self.server.asked.append(self.path)
        path, _, url = self.path.partition("?")
        body = b"" if path == "/to" else b"0123456789"
        self.send_response(302 if path == "/to" else 200)
        if path == "/to":
            self.send_header("Location", url)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_):
        """Nothing on the terminal."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        found.asked, found.url = [], f"http://127.0.0.1:{found.server_port}"
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def test_a_redirect_within_a_host_is_followed(server):
    assert files.read_bytes(f"{server.url}/to?/x") == b"0123456789"
    assert files.state(f"{server.url}/to?{server.url}/x").size == 10


@pytest.mark.parametrize(
    "target",
    ["http://localhost:{port}/x", "http://2130706433:{port}/x", "//localhost:{port}/x"],
)
def test_a_redirect_to_a_private_address_is_not(server, target):
    url = f"{server.url}/to?{target.format(port=server.server_port)}"
    with pytest.raises(PermissionError, match=r"leads to .* is not public"):
        files.read_bytes(url)
    with pytest.raises(UserError, match="is not public"):
        files.expand(url)
    assert "/x" not in server.asked


@pytest.mark.parametrize(
    ("target", "is_public"),
    [
        ("https://93.184.216.34/x", True),
        ("http://[2606:2800:220:1:248:1893:25c8:1946]/", True),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://10.1.2.3/", False),
        ("http://192.168.0.1/", False),
        ("http://172.16.0.1/", False),
        ("http://0.0.0.0/", False),
        ("http://[fd00::1]/", False),
        ("http://[::ffff:10.0.0.1]/", False),
        ("/elsewhere", True),
    ],
)
def test_which_addresses_are_public(target, is_public):
    response = SimpleNamespace(headers={"Location": target})
    params = SimpleNamespace(url=yarl.URL("https://93.184.216.35/a"), response=response)
    if is_public:
        asyncio.run(check_redirect(None, None, params))
    else:
        with pytest.raises(PermissionError):
            asyncio.run(check_redirect(None, None, params))


@pytest.mark.parametrize(
    "url",
    [
        "s4://bucket/a.tar",
        "ftp://host/a.tar",
        "sftp://host/a.tar",
        "github://owner:name@main/a.tar",
        "simplecache::file:///etc/a.tar",
        "file:///x/a.tar::file:///y",
        "zip://a.tar::http://127.0.0.1:9/x.zip",
    ],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(
        UserError, match=r"expected a URL, without ::, that begins with one of s3://"
    ):
        files.read_bytes(url)
    with pytest.raises(
        UserError, match=r"expected a URL, without ::, that begins with one of s3://"
    ):
        open_source(f"webdataset:{url}")
