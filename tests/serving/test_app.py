"""The application over HTTP, without sockets."""

import asyncio
import re
import threading

import numpy as np
import pytest

from capjax.serving import batcher as batcher_module
from capjax.serving.app import make_app
from capjax.serving.limits import Limits
from tests.serving.conftest import PATIENT, png, talk, talking

BAD = {  # what is uploaded, and the status of the answer
    "text": (b"hello", 415),
    "pdf": (b"%PDF-1.7 and so on", 415),
    "cut": (lambda pictures: pictures[0][:100], 422),
    "empty": (b"", 400),
    "bomb": (png(np.zeros((3000, 3000, 3), np.uint8)), 413),
}


def counted(text: str, name: str) -> float:
    """The value of one line of /metrics."""
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(value)


def test_requests_together_are_the_records_of_python_and_bad_ones_harm_none(captioner, pictures):
    bad = [body(pictures) if callable(body) else body for body, _ in BAD.values()]

    async def conversation(client, batcher):
        uploads = [x for pair in zip(pictures, [*bad, *bad], strict=False) for x in pair]
        posts = [client.post(f"/caption?key={i}", content=x) for i, x in enumerate(uploads)]
        return await asyncio.gather(*posts), (await client.get("/metrics")).text

    answers, metrics = talk(captioner, conversation, max_pixels=1 << 20, wait_s=0.5)
    expected = captioner.caption_records(pictures)
    for row, answer in enumerate(answers[::2]):
        record = answer.json()
        assert answer.status_code == 200
        assert record["logprob"] == pytest.approx(expected[row]["logprob"], abs=1e-4)
        assert {**record, "key": "", "logprob": 0} == {**expected[row], "key": "", "logprob": 0}
        assert record["key"] == str(2 * row)
    statuses = [status for _, status in BAD.values()]
    for answer, status in zip(answers[1::2], statuses * 2, strict=False):
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
    assert counted(metrics, 'capjax_requests_total{status="200"}') == 8
    assert counted(metrics, "capjax_batch_images_sum") == 8
    assert counted(metrics, "capjax_batch_images_count") < 8
    assert counted(metrics, "capjax_captions_total") == 8
    assert counted(metrics, "capjax_requests_in_progress") == 0
    assert counted(metrics, "capjax_waiting_images") == 0
    assert counted(metrics, "capjax_request_seconds_count") == 8


def test_no_damage_to_an_upload_is_the_servers_fault(captioner, pictures):
    rng = np.random.default_rng(0)
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    whole = form + pictures[0] + b"\r\n--x--\r\n"

    def damaged(data: bytes) -> bytes:
        changed = np.frombuffer(data, np.uint8)[: rng.integers(1, len(data))].copy()
        changed[rng.integers(0, len(changed), 3)] = rng.integers(0, 256, 3)
        return changed.tobytes()

    async def conversation(client, batcher):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        posts = [client.post("/caption", content=damaged(pictures[0])) for _ in range(50)]
        posts += [
            client.post("/caption", content=damaged(whole), headers=headers) for _ in range(50)
        ]
        return await asyncio.gather(*posts, client.post("/caption", content=whole, headers=headers))

    *answers, last = talk(captioner, conversation, max_requests=200, max_requests_of_client=200)
    assert {answer.status_code for answer in answers} <= {200, 400, 413, 415, 422}
    assert last.status_code == 200


def test_forms_queries_and_raw_bodies(captioner, pictures):
    async def conversation(client, batcher):
        image = {"image": ("a.png", pictures[0])}
        return [
            await client.post("/caption", files=image, data={"guidance_scale": "2", "key": "k"}),
            await client.post("/caption?guidance_scale=2&key=k", content=pictures[0]),
            await client.post("/caption?guidance_scale=2", files=image, data={"key": "k"}),
            await client.post("/caption?key=1", files=image, data={"key": "k"}),
            await client.post("/caption", files={"key": (None, "k")}),
            await client.post("/caption", files=[("a", pictures[0]), ("b", pictures[1])]),
            await client.post(
                "/caption", content=b"x", headers={"Content-Type": "multipart/form-data"}
            ),
            await client.post("/caption?num_beams=100", content=pictures[0]),
            await client.get("/caption"),
        ]

    answers = talk(captioner, conversation)
    assert [one.status_code for one in answers] == [200, 200, 200, 422, 400, 400, 400, 422, 405]
    assert answers[0].json() == answers[1].json() == answers[2].json()
    (expected,) = captioner.caption_records([pictures[0]], guidance_scale=2.0)
    assert answers[0].json()["caption"] == expected["caption"]
    assert answers[3].json() == {"error": "key is given twice; give it once"}
    assert answers[7].json() == {"error": "num_beams=100: this server allows at most 8"}


def test_a_body_is_refused_before_it_is_kept(captioner, pictures):
    sent = []

    async def endless():
        while len(sent) < 1000:
            sent.append(1)
            yield b"x" * 1000

    async def conversation(client, batcher):
        return [
            await client.post("/caption", content=b"x" * 20_000),
            await client.post("/caption", content=endless()),
            await client.post("/caption", content=pictures[0]),
        ]

    answers = talk(captioner, conversation, max_bytes=10_000)
    assert [answer.status_code for answer in answers] == [413, 413, 200]
    assert "more than 10000 bytes" in answers[0].json()["error"]


def test_a_body_that_does_not_come_is_408(captioner, pictures):
    async def slow():
        yield pictures[0][:10]
        await asyncio.sleep(100)

    async def conversation(client, batcher):
        return await client.post("/caption", content=slow())

    assert talk(captioner, conversation, timeout_s=0.2).status_code == 408


def test_a_client_that_asks_too_often_is_told_when_to_come_back(captioner, pictures):
    async def conversation(client, batcher):
        return [await client.post("/caption", content=pictures[0]) for _ in range(4)]

    answers = talk(captioner, conversation, requests_per_minute=0.1, burst=3)
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert 1 <= int(answers[3].headers["Retry-After"]) <= 601


def test_one_client_cannot_take_all_the_places(captioner, pictures, monkeypatch):
    """Bodies that never arrive hold their places until they time out."""

    async def never():
        yield pictures[0][:10]
        await asyncio.sleep(60)

    async def conversation(client, batcher):
        waiting = [asyncio.create_task(client.post("/caption", content=never())) for _ in range(2)]
        await asyncio.sleep(0.1)
        refused = await client.post("/caption", content=pictures[0])
        late = await asyncio.gather(*waiting)
        return [refused, *late, await client.post("/caption", content=pictures[0])]

    answers = talk(captioner, conversation, max_requests_of_client=2, timeout_s=1.0)
    assert [answer.status_code for answer in answers] == [429, 408, 408, 200]
    assert "Retry-After" in answers[0].headers


def test_a_busy_device_is_503_and_a_slow_one_504(captioner, pictures, monkeypatch):
    gate = threading.Event()
    real = batcher_module.caption_batch

    def slow(*args):
        assert gate.wait(60)
        return real(*args)

    async def conversation(client, batcher):
        monkeypatch.setattr(batcher_module, "caption_batch", slow)
        posts = [client.post("/caption", content=pictures[0]) for _ in range(5)]
        answers = await asyncio.gather(*posts)
        gate.set()
        return [*answers, await client.post("/caption", content=pictures[0])]

    answers = talk(captioner, conversation, max_requests=3, max_requests_of_client=3, timeout_s=1.0)
    assert sorted(answer.status_code for answer in answers[:5]) == [503, 503, 504, 504, 504]
    assert answers[5].status_code == 200
    for answer in answers[:5]:
        assert (answer.status_code == 503) == ("Retry-After" in answer.headers)


def test_what_fails_inside_is_500_without_its_secrets(captioner, pictures, monkeypatch, caplog):
    def fail(*args):
        raise MemoryError("secret")

    async def conversation(client, batcher):
        monkeypatch.setattr(batcher_module, "caption_batch", fail)
        return await client.post("/caption", content=pictures[0])

    answer = talk(captioner, conversation)
    assert (answer.status_code, "secret" in answer.text) == (500, False)
    assert "secret" in caplog.text


def test_it_is_ready_when_all_is_compiled(captioner, pictures, monkeypatch):
    gate = threading.Event()
    monkeypatch.setattr(batcher_module, "caption_batch", lambda *args: gate.wait(60))
    app, _ = make_app(captioner, Limits(**PATIENT))

    async def main():
        async with talking(app, ready=False) as client:
            early = await client.get("/health"), await client.post("/caption", content=b"x")
            gate.set()
            while (late := await client.get("/health")).status_code != 200:
                await asyncio.sleep(0.01)
            return *early, late

    early, refused, late = asyncio.run(main())
    assert (early.status_code, early.json()) == (503, {"status": "warming up"})
    assert (refused.status_code, "Retry-After" in refused.headers) == (503, True)
    assert (late.status_code, late.json()) == (200, {"status": "ready"})


def test_the_page_loads_nothing_from_elsewhere(captioner):
    async def conversation(client, batcher):
        return await client.get("/"), await client.get("/model")

    page, model = talk(captioner, conversation)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?:|@import""", page.text)
    assert (model.json()["max_length"], model.json()["has_null_image"]) == (12, False)
