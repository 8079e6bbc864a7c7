"""Boosted captions, against a chat endpoint in the test: what is asked, kept, paid and written."""

import email.utils
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from capjax import cli
from capjax.data.boost import boost
from capjax.data.boost_answers import Answers
from capjax.data.boost_endpoint import Endpoint, RequestFailed, _retry_after
from capjax.data.boost_example import BoostSettings
from capjax.data.boost_texts import clean_answer, fill, problem_of
from capjax.data.captions import CaptionChoice, choose_captions
from capjax.data.records import ArrayRecordSource, Caption, Example, write_shards
from capjax.data.sources import open_source
from capjax.errors import UserError
from tests.data import chat_server

HUMAN = ["A man rides a big wave.", "A surfer in a black wetsuit.", "a man  rides a big WAVE."]
SETTINGS = BoostSettings("small", request={"temperature": 0.0})


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with chat_server.running() as server:
        yield server


@pytest.fixture
def source(tmp_path):
    """Ten examples of two different captions and one that repeats; the last two have one, none."""
    texts = [[*HUMAN[:2], f"Wave number {i}.", *HUMAN[2:]] for i in range(8)]
    examples = [
        Example(str(i), b"image", tuple(Caption(text, "coco", "en") for text in captions))
        for i, captions in enumerate([*texts, HUMAN[:1], []])
    ]
    return ArrayRecordSource(write_shards(examples, tmp_path / "source", "x", 100))


def endpoint(server, **options) -> Endpoint:
    return Endpoint(server.url, **{"backoff_s": 0.001, "timeout_s": 5.0, **options})


def run(source, output, server, settings=SETTINGS, options=None, **keywords):
    return boost(source, "x", output, settings, endpoint(server, **(options or {})), **keywords)


def files(output: Path) -> dict[str, bytes]:
    """Everything but the answers, whose order is that in which they came."""
    return {p.name: p.read_bytes() for p in output.iterdir() if p.name != "answers.jsonl"}


def texts_of(output: Path, kind: str) -> list[str]:
    examples = open_source(output)
    captions = [caption for i in range(len(examples)) for caption in examples[i].captions]
    return [caption.text for caption in captions if caption.source == kind]


def test_every_example_keeps_its_captions_and_gets_a_blend(source, server, tmp_path):
    found = run(source, tmp_path / "out", server)
    made = open_source(tmp_path / "out")
    assert len(made) == 10
    for i in range(8):
        blend = Caption(f"{HUMAN[0]} and {HUMAN[1]} and Wave number {i}.", "blend", "en")
        assert made[i] == source[i]._replace(captions=(*source[i].captions, blend))
    assert made[8].captions[1:] == (Caption(HUMAN[0], "blend", "en"),)  # its own blend
    assert made[9] == source[9]
    assert len(server.bodies) == found.num_asked == 8
    assert (found.num_prompt_tokens, found.num_tokens) == (80, 16)
    assert found.manifest["captions"] == {"blend": 9}
    assert found.manifest["rejected"] == {"blend: no caption": 1}
    assert found.manifest["shards"][0]["examples"] == 10
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["seed"]) == ("small", 0.0, 0)
    assert HUMAN[2] not in body["messages"][0]["content"]  # as the first, but for case and space
    choice = CaptionChoice({"blend": 1.0}, lower=False)
    rng = np.random.default_rng(0)
    assert choose_captions(made[8], choice, rng) == [HUMAN[0]]


def test_a_dense_caption_makes_it_holistic_where_there_is_one(source, server, tmp_path):
    dense = {"0": "The sky is blue.", "8": "He wears black."}
    found = run(source, tmp_path / "out", server, dense=dense)
    made = open_source(tmp_path / "out")
    blend = made[0].captions[-2].text
    assert made[0].captions[-1] == Caption(f"{blend} and The sky is blue.", "holistic", "en")
    assert made[8].captions[-1].text == f"{HUMAN[0]} and He wears black."
    assert found.manifest["captions"] == {"blend": 9, "holistic": 2}
    assert found.manifest["rejected"]["holistic: no dense caption"] == 7


def test_nothing_is_asked_twice_and_the_files_are_the_same(source, server, tmp_path):
    run(source, tmp_path / "out", server, concurrency=8)
    before = files(tmp_path / "out")
    server.faults = [500] * 100
    run(source, tmp_path / "out", server)  # finished
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / "manifest.json").unlink()
    run(source, tmp_path / "out", server)  # from the answers
    assert files(tmp_path / "out") == before
    assert len(server.bodies) == 8
    server.faults = []
    run(source, tmp_path / "again", server, concurrency=1)
    assert files(tmp_path / "again") == before


def test_equal_requests_are_paid_once(server, tmp_path):
    captions = tuple(Caption(text) for text in HUMAN[:2])
    examples = [Example(str(i), b"image", captions) for i in range(20)]
    source = ArrayRecordSource(write_shards(examples, tmp_path, "x", 100))
    server.faults = [0.05] * 20
    assert run(source, tmp_path / "out", server, concurrency=8).num_asked == 1
    assert len(texts_of(tmp_path / "out", "blend")) == 20


def test_a_torn_or_damaged_answer_is_asked_for_again(source, server, tmp_path):
    run(source, tmp_path / "out", server)
    before = files(tmp_path / "out")
    path = tmp_path / "out" / "answers.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\0\0\n", *lines[2:-1], lines[-1][:20]]))
    (tmp_path / "out" / "manifest.json").unlink()
    found = run(source, tmp_path / "out", server)
    assert (found.num_asked, found.num_damaged) == (2, 1)
    assert files(tmp_path / "out") == before
    with Answers(path) as answers:
        assert all(answers.known(body) for body in server.bodies)


def test_faults_of_the_server_pass(source, server, tmp_path):
    server.faults = [429, 500, 503, b"<html>", b'{"choices": []}', b"", (429, {"Retry-After": "0"})]
    run(source, tmp_path / "out", server, options={"max_retries": 7}, concurrency=1)
    server.faults = []
    run(source, tmp_path / "calm", server)
    assert len(server.bodies) == 8 + 7 + 8
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def test_what_is_not_answered_is_asked_for_by_the_next_run(source, server, tmp_path):
    server.faults = [400, 500, 500]  # the first is not tried again
    found = run(source, tmp_path / "out", server, options={"max_retries": 1}, concurrency=1)
    assert found.manifest["rejected"]["blend: failed"] == 2
    assert len(server.bodies) == 9
    assert len(open_source(tmp_path / "out")) == 10
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in rejected] == ["0", "1", "9"]
    assert run(source, tmp_path / "out", server).num_asked == 2
    run(source, tmp_path / "calm", server)
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def test_too_many_failures_stop_it_and_the_next_run_goes_on(source, server, tmp_path):
    server.faults = [0.0, 0.0, 400, 400, 400]
    with pytest.raises(UserError, match=r"2 requests .* max_failures=1 .*HTTP 400"):
        run(source, tmp_path / "out", server, concurrency=1, max_failures=1)
    assert not (tmp_path / "out" / "manifest.json").exists()
    server.faults = []
    asked = len(server.bodies)
    found = run(source, tmp_path / "out", server)
    assert len({json.dumps(body) for body in server.bodies}) == 8
    assert found.num_asked == len(server.bodies) - asked <= 6


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "empty"),
        ("I'm sorry, I can't help with that.", "refused"),
        ("wave " * 60, "too long"),
        ("A man.", "human text lost"),
        ("Un homme en combinaison noire surfe sur une grande vague.", "other words"),
    ],
)
def test_answers_that_are_no_captions_are_counted_and_not_used(
    source, server, tmp_path, answer, problem
):
    server.answer = lambda prompt: answer if "number 3" in prompt else chat_server.merged(prompt)
    found = run(source, tmp_path / "out", server)
    assert found.manifest["rejected"] == {f"blend: {problem}": 1, "blend: no caption": 1}
    assert open_source(tmp_path / "out")[3] == source[3]
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected[0]) == {
        "index": 3, "key": "3", "kind": "blend", "problem": problem, "answer": answer,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "problem"),
    [
        ("A man rides a wave under blue skies", ""),
        ("Under a sky of blue a man is riding waves near distant houses", ""),
        ("Distant hills and houses", "human text lost"),
    ],
)
def test_a_holistic_caption_must_not_lose_the_human_one(caption, problem):
    given = ["A man rides a wave", "Blue skies, distant hills, bright sunshine and houses"]
    assert problem_of(caption, "stop", given, given[0]) == problem
    assert problem_of(caption, "length", given, given[0]) == "cut off"


def test_variants_are_asked_for_with_seeds_of_their_own(source, server, tmp_path):
    server.answer = lambda prompt: f"{chat_server.merged(prompt)} {len(server.bodies) % 2}"
    settings = BoostSettings("small", num_variants=2, seed=5)
    found = run(source, tmp_path / "out", server, settings, concurrency=1)
    assert [body["seed"] for body in server.bodies[:2]] == [5, 6]
    assert found.manifest["captions"] == {"blend": 17}
    assert len(set(texts_of(tmp_path / "out", "blend"))) == 17


def test_captions_that_were_made_before_are_not_blended_but_replaced(server, tmp_path):
    old = (*(Caption(text, "coco") for text in HUMAN[:2]), Caption("old", "blend"))
    source = ArrayRecordSource(write_shards([Example("a", b"image", old)], tmp_path, "x", 1))
    run(source, tmp_path / "out", server)
    assert texts_of(tmp_path / "out", "blend") == [f"{HUMAN[0]} and {HUMAN[1]}"]


def test_only_the_wanted_sources_and_one_language_are_blended(server, tmp_path):
    captions = (Caption(HUMAN[0], "a"), Caption("x", "b"), Caption("Eine Welle", "a", "de"))
    captions += (Caption(HUMAN[1], "a"),)
    source = ArrayRecordSource(write_shards([Example("a", b"image", captions)], tmp_path, "x", 1))
    run(source, tmp_path / "out", server, BoostSettings("small", sources=("a",)))
    assert texts_of(tmp_path / "out", "blend") == [f"{HUMAN[0]} and {HUMAN[1]}"]


def test_other_settings_other_files_and_a_second_writer_are_refused(source, server, tmp_path):
    output = tmp_path / "out"
    run(source, output, server)
    with pytest.raises(UserError, match=r"holds captions of another seed; .*answers\.jsonl"):
        run(source, output, server, BoostSettings("small", request=SETTINGS.request, seed=1))
    with pytest.raises(UserError, match="holds captions of another dense_sha256"):
        run(source, output, server, dense={"0": "a"})
    with Answers(output / "answers.jsonl"), pytest.raises(UserError, match="another process"):
        run(source, output, server)
    with pytest.raises(UserError, match="expected a new or an empty directory"):
        run(source, tmp_path / "source", server)


def test_answers_serve_another_output(source, server, tmp_path):
    run(source, tmp_path / "out", server)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "answers.jsonl").write_bytes((tmp_path / "out/answers.jsonl").read_bytes())
    assert run(source, tmp_path / "more", server, dense={"0": "Blue sky."}).num_asked == 1


def test_the_key_is_sent_and_told_to_nobody(source, server, tmp_path):
    server.faults = [0.0, 401]
    with pytest.raises(UserError, match=r"HTTP 401 .*no: Bearer \*\*\*") as error:
        run(source, tmp_path / "out", server, options={"key": "secret-1"}, concurrency=1)
    assert set(server.keys) == {"Bearer secret-1"}
    assert "secret" not in str(error.value)
    assert all(b"secret" not in p.read_bytes() for p in (tmp_path / "out").iterdir())
    with pytest.raises(UserError) as error:
        Endpoint(server.url, "secret\nkey")
    assert "secret" not in str(error.value)


def test_a_server_that_asks_for_patience_gets_it(server):
    server.faults = [(429, {"Retry-After": "0.3"})]
    endpoint(server).ask({"messages": [{"content": "- a"}]})
    first, second = server.times
    assert second - first >= 0.3


@pytest.mark.parametrize(
    ("told", "low", "high"),
    [("7", 7, 7), ("1e9", 600, 600), ("soon", 0, 0), ("nan", 0, 0), ("-3", 0, 0), ("", 0, 0)],
)
def test_how_long_a_server_asks_to_wait(told, low, high):
    assert low <= _retry_after(told) <= high


def test_a_server_may_name_the_hour():
    assert 50 < _retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60


def test_a_slow_answer_is_given_up(server):
    server.faults = [5.0]
    with pytest.raises(RequestFailed, match="timed out"):
        endpoint(server, timeout_s=0.1, max_retries=0).ask({"messages": [{"content": "- a"}]})


def test_a_redirect_is_not_followed(server):
    server.faults = [(302, {"Location": "http://127.0.0.1:9/elsewhere"})]
    with pytest.raises(UserError, match="HTTP 302"):
        endpoint(server, key="k").ask({"messages": [{"content": "- a"}]})


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("A man surfs.", "A man surfs."),
        ('Sure! Here\'s the merged caption:\n\n**"A man surfs."**\n\nNote: none.', "A man surfs."),
        ("Sure, here is the caption: A man surfs.", "A man surfs."),
        ("<think>hm\n\nwell</think>\n\nCaption: A man surfs.", "A man surfs."),
        ("<think>without an end", ""),
        ("```text\nA man surfs.\n```", "A man surfs."),
        ("# Caption\n\nA man surfs.", "A man surfs."),
        ("**Merged caption:**\n\nA man\nsurfs.", "A man surfs."),
        ("- A man surfs.\n- On a wave.", "A man surfs. On a wave."),
        ("\u201cA man surfs.\u201d", "A man surfs."),
        ('A sign that says: "stop"', 'A sign that says: "stop"'),
        ("A 3-year-old in a 2.5 m * 2 m room", "A 3-year-old in a 2.5 m * 2 m room"),
        ("", ""),
    ],
)
def test_clean_answer(answer, caption):
    assert clean_answer(answer) == caption


def test_a_prompt_is_filled_in_once():
    texts = {"caption": "{dense}", "dense": "{caption} \\1"}
    assert fill('{"a": {caption}, {dense}}', texts) == '{"a": {dense}, {caption} \\1}'


def command(source, server, output, *flags) -> list[str]:
    return ["data", "boost", f"--input={source}", f"--output={output}", "--model=small",
            f"--endpoint={server.url}", *flags]  # fmt: skip


def test_killed_and_run_again_it_is_as_if_it_had_not_been(source, server, tmp_path, capsys):
    folder = tmp_path / "source"
    server.faults = [0.0] * 3 + [60.0] * 8
    program = [sys.executable, "-m", "capjax.cli"]
    process = subprocess.Popen([*program, *command(folder, server, tmp_path / "out")])
    answers = tmp_path / "out" / "answers.jsonl"
    while not answers.exists() or answers.read_bytes().count(b"\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = answers.read_bytes()
    with answers.open("ab") as file:
        file.write(kept[: len(kept) // 2].rpartition(b"\n")[2])  # as if killed within a line
    server.faults = []
    assert cli.main(command(folder, server, tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "new captions: 9 blend" in out
    assert "5 requests, 50 tokens read, 10 written" in out
    assert answers.read_bytes().startswith(kept)
    assert cli.main(command(folder, server, tmp_path / "calm", "--concurrency=1")) == 0
    assert files(tmp_path / "out") == files(tmp_path / "calm")


def test_the_command_takes_prompts_fields_a_key_and_dense_captions(
    source, server, tmp_path, monkeypatch
):
    monkeypatch.setenv("CHAT_KEY", "k1\n")
    (tmp_path / "prompt.txt").write_text("Join:\n{captions}")
    dense = [{"key": str(i), "caption": "Blue sky."} for i in range(10)] + [{"key": "x"}]
    (tmp_path / "dense.jsonl").write_text("\n".join(map(json.dumps, dense)))
    flags = [f"--prompt={tmp_path}/prompt.txt", f"--dense={tmp_path}/dense.jsonl"]
    flags += ['--request={"max_tokens": null, "top_p": 0.5}', "--api_key_env=CHAT_KEY"]
    folder = tmp_path / "source"
    assert cli.main(command(folder, server, tmp_path / "out", *flags, "--concurrency=1")) == 0
    assert set(server.keys) == {"Bearer k1"}
    body = server.bodies[0]
    assert body["messages"][0]["content"].startswith("Join:\n- A man")
    assert (body["top_p"], body["temperature"], "max_tokens" in body) == (0.5, 0.0, False)
    assert len(texts_of(tmp_path / "out", "holistic")) == 9


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--endpoint=localhost:80", "endpoint=localhost:80: expected a URL"),
        ("--endpoint=http://127.0.0.1:9/v1", "no server there"),
        ("--api_key_env=NO_SUCH_KEY", "NO_SUCH_KEY: that variable is not set"),
        ("--concurrency=0", "--concurrency=0: expected at least 1"),
        ("--num_variants=0", "--num_variants=0: expected at least 1"),
        ("--request=[]", "--request=.*expected an object"),
        ('--request={"model": "x"}', "without model"),
        ("--prompt={source}/none.txt", "none.txt: cannot be read"),
        ("--prompt={source}/p.txt", r"expected \{captions\}"),
        ("--dense={source}/p.txt", "not JSON"),
        ("--output=gs://bucket/x", "expected a local directory"),
        ("--output={source}", "expected a new or an empty directory"),
        ("--caption_sources=alt", "no caption was made"),
    ],
)
def test_bad_input_is_one_clear_line(source, server, tmp_path, capsys, flag, message):
    folder = tmp_path / "source"
    (folder / "p.txt").write_text("no place")
    flags = command(folder, server, tmp_path / "out", flag.replace("{source}", str(folder)))
    assert cli.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert re.search(message, last)
