"""`capjax evaluate --captions` and `--compare`, as typed."""

import csv
import json
import subprocess
import sys

import pytest

from capjax import cli
from capjax.evaluation.measured import read_measured


@pytest.fixture
def captions(tmp_path, fakecap):
    """Two runs' captions of forty images in COCO's form of references, and one file of both."""
    items = fakecap["items"][:40]
    for name, words in (("a", 6), ("b", 50)):
        path = tmp_path / name / "captions" / "val.jsonl"
        path.parent.mkdir(parents=True)
        records = [
            {
                "key": str(item["image_id"]),
                "caption": " ".join(item["cand"].split()[:words]),
                "references": item["refs"],
            }
            for item in items
        ]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_a_file_of_captions_is_measured_without_jax(captions):
    code = (
        "import sys\nfrom capjax import cli\nstatus = cli.main(sys.argv[1:])\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\nsys.exit(status)"
    )
    flags = ["--captions=a/captions/val.jsonl", "--tokenizer=treebank", "--output=a.json"]
    ran = subprocess.run(
        [sys.executable, "-c", code, "evaluate", *flags],
        cwd=captions,
        capture_output=True,
        text=True,
        env={"PATH": "", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert ran.returncode == 0, ran.stderr
    found = read_measured(captions / "a.json")
    assert len(found.keys) == 40
    assert f"cider_d          {found.metrics['cider_d']:10.4f}  [" in ran.stdout
    assert "meteor           not measured: needs" in ran.stdout
    assert "tokenizer: treebank" in ran.stdout


def test_two_runs_are_compared_as_text_csv_and_latex(captions, monkeypatch, capsys):
    monkeypatch.chdir(captions)
    monkeypatch.setenv("PATH", "")  # no Java
    arguments = ["evaluate", "--compare", "a", "b", "--csv=t.csv", "--latex=t.tex"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "first:  a" in out
    assert "second: b\n\nval, 40 images, tokens of captions by treebank\n" in out
    assert "\nmeteor           not measured: needs" in out
    (line,) = [line for line in out.splitlines() if line.startswith("num_words")]
    assert line.endswith("0.001 *")
    rows = {
        row["metric"]: row for row in csv.DictReader((captions / "t.csv").read_text().splitlines())
    }
    assert float(rows["num_words"]["p"]) == pytest.approx(1 / 1001)
    change = float(rows["cider_d"]["b"]) - float(rows["cider_d"]["a"])
    assert float(rows["cider_d"]["difference"]) == pytest.approx(change)
    latex = (captions / "t.tex").read_text()
    assert r"\begin{tabular}{lrrrr}" in latex
    assert "CIDEr-D & " in latex
    # A file beside a file, and what an evaluation wrote beside another.
    for name in "ab":
        (captions / f"{name}.jsonl").write_bytes(
            (captions / name / "captions" / "val.jsonl").read_bytes()
        )
        assert cli.main(["evaluate", f"--captions={name}.jsonl", f"--output={name}.json"]) == 0
    for kind in ("jsonl", "json"):
        capsys.readouterr()
        assert cli.main(["evaluate", "--compare", f"a.{kind}", f"b.{kind}"]) == 0
        (found,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("num_words")]
        assert found.split()[1:] == line.split()[1:]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "one of the arguments --workdir --captions --compare is required"),
        (["--workdir=a", "--csv=t"], "--csv goes with --compare, not with --workdir"),
        (["--captions=a", "--step=3"], "--step goes with --workdir, not with --captions"),
        (["--compare", "a", "none"], "none does not exist; name a workdir or a file"),
        (["--compare", "a", "a/captions/val.jsonl"], "nothing to compare: a has ['val']"),
        (["--captions=none.jsonl"], "none.jsonl: cannot be read"),
        (["--captions=a/captions/val.jsonl", "--output=no/x"], "--output=no/x: No such file"),
        (["--captions=a/captions/val.jsonl", "--tokenizer=ptb"], "needs "),
    ],
)
def test_bad_input_is_one_line(captions, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(captions)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["evaluate", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
