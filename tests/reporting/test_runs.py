"""What a workdir holds, and one clear line where a file is not what it should be."""

import json

import pytest

from capjax.errors import UserError
from capjax.evaluation.measured import read_measured, write_measured
from capjax.reporting.page import write_report
from capjax.reporting.runs import config_differences, last_evaluation, read_runs, splits_of, voices


def test_runs_are_named_by_what_tells_them_apart(tmp_path, make_run):
    paths = [make_run(tmp_path / name) for name in ("a/run", "b/run", "c")]
    names = [run.name for run in read_runs(paths)]
    assert names == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert [run.name for run in read_runs([paths[2], paths[2]])] == ["c"]  # each once


def test_a_run_holds_what_its_files_say(tmp_path, make_run):
    (run,) = read_runs([make_run(tmp_path / "run")])
    assert splits_of([run]) == ["concept"]
    assert last_evaluation(run)["concept"] == {"exact_match": 0.4, "loss": 1.5}
    assert set(run.evaluations) == {"concept", "concept@2"}
    assert run.attention["concept"][run.captions["concept"][1]["key"]].weights.shape == (2, 6)


def test_a_line_separator_in_a_caption_ends_no_line(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    text = json.dumps({"key": "a", "caption": "one\u2028two\u0085"}, ensure_ascii=False)
    (root / "captions" / "concept.jsonl").write_text(text + "\n")
    (run,) = read_runs([root])
    assert [record["caption"] for record in run.captions["concept"]] == ["one\u2028two\u0085"]


def test_what_is_said_with_guidance_is_another_voice(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    (root / "captions" / "guided").mkdir()
    for scale in ("10", "2", "1.5"):
        line = json.dumps({"key": "a", "caption": f"with {scale}"}) + "\n"
        (root / "captions" / "guided" / f"concept@{scale}.jsonl").write_text(line)
    runs = read_runs([root])
    said = voices(runs)
    assert [voice.name for voice in said] == ["run", *(f"guidance {s}" for s in ("1.5", "2", "10"))]
    assert said[0] is runs[0]
    assert said[2].captions["concept"][0]["caption"] == "with 2"
    assert said[2].evaluations == {"concept": runs[0].evaluations["concept@2"]}
    assert said[1].evaluations == {}
    assert splits_of(runs) == ["concept"]
    both = voices(read_runs([root, make_run(tmp_path / "other")]))
    assert [voice.name for voice in both][1:3] == ["other", "run, guidance 1.5"]


def test_files_of_another_checkpoint_are_left_out(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    (root / "captions" / "guided").mkdir()
    measured = read_measured(root / "evaluations" / "concept.json")

    def write(name, step):
        noted = measured._replace(notes=measured.notes | {"step": step})
        write_measured(root / "evaluations" / f"{name}.json", noted)

    for name, step in {"concept": 20, "concept@2": 20, "concept@3": 40, "test_x": 10}.items():
        write(name, step)
    for scale, step in {"2": 20, "3": 40}.items():
        line = json.dumps({"key": "a", "caption": "b", "step": step}) + "\n"
        (root / "captions" / "guided" / f"concept@{scale}.jsonl").write_text(line)
    (run,) = read_runs([root])
    assert run.steps == {"concept": 20, "test_x": 10}
    assert run.left_out == [
        "evaluations/concept@3.json (step 40, not 20)",
        "captions/guided/concept@3.jsonl (step 40, not 20)",
    ]
    assert list(run.evaluations) == ["concept", "concept@2", "test_x"]
    assert [voice.name for voice in voices([run])] == ["run", "guidance 2"]
    assert set(run.captions) == {"concept"}  # without a step: kept
    assert last_evaluation(run)["concept"]["exact_match"] == 0.2  # what was logged at step 20
    text = write_report([root]).read_text()
    assert "evaluations/concept@3.json (step 40, not 20)" in text
    records = (root / "captions" / "concept.jsonl").read_text().splitlines()
    lines = [json.dumps(json.loads(line) | {"step": 40}) + "\n" for line in records]
    (root / "captions" / "concept.jsonl").write_text("".join(lines))
    (run,) = read_runs([root])  # of the split's own the newer
    assert run.steps["concept"] == 40
    assert list(run.evaluations) == ["concept@3", "test_x"]


def test_only_the_fields_that_differ_are_listed(tmp_path, make_run):
    runs = read_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=0.5)])
    assert config_differences(runs) == [("seed", ["0.0", "0.5"])]


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("config.json", "{", "not a JSON file"),
        ("captions/concept.jsonl", '{"key": "a"}\n', "line 1: not an object"),
        ("captions/concept.jsonl", "[]\n", "line 1: not an object"),
        ("attention/concept.json", '{"a": {"words": ["b"], "grid": [1, 2]}}', "weights"),
        (
            "attention/concept.json",
            '{"a": {"words": ["b"], "grid": [1, 2], "weights": [[1, 300]]}}',
            "h \\* w weights",
        ),
        ("evaluations/concept.json", "{}", "capjax evaluate"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, make_run, file, text, says):
    root = make_run(tmp_path / "run")
    (root / file).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_runs([root])
    assert str(root / file) in str(caught.value)


def test_a_place_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_runs([tmp_path])
