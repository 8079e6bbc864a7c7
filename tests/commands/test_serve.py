"""`capjax serve` as a process: it serves, its page works in a browser, SIGTERM ends it well."""

import contextlib
import json
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from capjax import cli
from tests.decoding.conftest import run_directory as run_directory
from tests.serving.conftest import pictures as pictures

TIMEOUT = 300


class Lines:
    """The lines that a process prints, as they come."""

    def __init__(self, stream):
        self._queue = queue.Queue()
        threading.Thread(target=self._read, args=[stream], daemon=True).start()

    def _read(self, stream):
        for line in stream:
            self._queue.put(line)

    def next(self) -> str:
        return self._queue.get(timeout=TIMEOUT)


@contextlib.contextmanager
def serving(run_directory, *flags):
    """(process, its lines, its address) of a server that is ready."""
    command = [sys.executable, "-m", "capjax.cli", "serve", f"--checkpoint={run_directory}"]
    with subprocess.Popen(
        [*command, "--port=0", "--batch_size=1", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            lines = Lines(process.stdout)
            address = re.findall(r"http://127\.0\.0\.1:\d+/", lines.next())[0]
            assert "ready after" in lines.next()
            yield process, lines, address
        finally:
            process.kill()


def post(url: str, body: bytes) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(url, body, timeout=TIMEOUT) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_it_serves_and_finishes_what_it_has_on_sigterm(run_directory, pictures):
    with serving(run_directory, "--timeout=200") as (process, lines, address):
        assert post(address + "caption", b"hello") == (
            415,
            {"error": "not an image: 5 bytes of no known format"},
        )
        # A search that is not compiled yet: the signal comes while it compiles.
        answers = []
        search = f"{address}caption?num_beams=3&num_captions=3&max_length=9"
        client = threading.Thread(target=lambda: answers.append(post(search, pictures[0])))
        client.start()
        while client.is_alive() and "in_progress 1.0" not in read(address + "metrics"):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        client.join(TIMEOUT)
        assert answers[0][0] == 200
        assert len(answers[0][1]["captions"]) == 3
        assert process.wait(TIMEOUT) == 0
        assert "stopped" in lines.next()
        assert process.stderr.read() == (
            "capjax: warning: trained without image_dropout: guidance will be weak\n"
        )


@pytest.mark.slow
def test_the_page_in_a_browser(run_directory, pictures, require_package, tmp_path):
    from playwright.sync_api import sync_playwright

    browser_path = require_package("chromium")
    (tmp_path / "bad.png").write_text("<b>no image</b>")
    drop = """(bytes) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "a.png", {type: "image/png"}));
        const fields = {dataTransfer: data, bubbles: true, cancelable: true};
        document.querySelector("#drop").dispatchEvent(new DragEvent("drop", fields));
    }"""

    with serving(run_directory) as (_, _, address), sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#warning:visible")
        assert page.locator("#captions li").count() == 0

        page.evaluate(drop, list(pictures[0]))
        page.wait_for_selector("#captions:not(.stale) li")
        unguided = page.locator("#captions li").all_inner_texts()
        assert len(unguided) == 4
        assert "log-probability" in unguided[0]
        assert page.evaluate("document.querySelector('#drop img').naturalWidth > 0")

        page.focus("#guidance_scale")
        for _ in range(30):
            page.keyboard.press("ArrowRight")
        page.wait_for_selector("#captions[data-asked*='guidance_scale=4&']:not(.stale)")
        assert page.locator("#captions li").all_inner_texts() != unguided

        page.set_input_files("#file", tmp_path / "bad.png")
        page.wait_for_selector("#status.bad")
        assert "not an image" in page.inner_text("#status")
        assert page.locator("#captions li").count() == 0

        page.set_viewport_size({"width": 390, "height": 800})  # a phone: nothing sticks out
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert problems == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size=3"], "batch_size=3: expected a power of two"),
        (["--timeout=0"], "timeout_s=0.0: expected a positive number"),
        (["--port=99999"], "--port=99999: expected 0 (a free one) to 65535"),
        (["--host=203.0.113.1"], "--host=203.0.113.1 --port=0: cannot listen there"),
        (["--process_id=1", "--num_processes=2"], "is one process"),
        ([], "no checkpoint in "),
    ],
)
def test_wrong_input_is_named(flags, words, tmp_path, capfd):
    line = ["serve", f"--checkpoint={tmp_path / 'none'}", "--port=0", *flags]
    assert cli.main(line) == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_what_is_not_installed_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", f"--checkpoint={tmp_path}"]) == 2
    assert "needs uvicorn: pip install 'capjax[serve]'" in capfd.readouterr().err
