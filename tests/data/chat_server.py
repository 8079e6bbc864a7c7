"""A chat endpoint for tests: it joins the captions of a prompt, after the faults it is told."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def merged(prompt: str) -> str:
    """What the server answers: the captions in the prompt, joined."""
    listed = re.findall(r"^- (.*)$", prompt, re.MULTILINE)
    return " and ".join(listed or [prompt.split("\n")[1], prompt.split("\n")[4]])


class ChatServer(ThreadingHTTPServer):
    """`bodies`, `keys` and `times` are of the requests that came.

    `faults` are used up in turn, one a request: a status, (status, headers), bytes to send in place
    of JSON, seconds to wait first, or a text to answer with. `answer` makes the others' text.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies, self.keys, self.times, self.faults = [], [], [], []
        self.answer, self.lock = merged, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has gone away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            fault = server.faults.pop(0) if server.faults else None
        assert self.path == "/v1/chat/completions"
        if isinstance(fault, int):
            fault = fault, {}
        if isinstance(fault, tuple):
            said = {"error": {"message": f"no: {self.headers['Authorization']}"}}
            return self.send(json.dumps(said).encode(), *fault)
        if isinstance(fault, bytes):
            return self.send(fault)
        if isinstance(fault, float):
            time.sleep(fault)
        text = fault if isinstance(fault, str) else server.answer(body["messages"][0]["content"])
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        return self.send(json.dumps({"choices": [choice], "usage": usage}).encode())

    def send(self, data, status=200, headers=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextmanager
def running():
    """A server at `url` until the block is left."""
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
