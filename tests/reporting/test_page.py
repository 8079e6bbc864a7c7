"""The page: one file, no requests, nothing in it that a caption could run."""

import json
import re
from urllib.parse import unquote

import pytest

from capjax.errors import UserError
from capjax.reporting.page import write_report
from capjax.reporting.runs import read_runs
from capjax.reporting.tables import result_tables, to_csv, to_latex


def test_the_page_is_one_file_that_asks_for_nothing(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    path = write_report([root])
    assert path == root / "report.html"
    text = path.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.findall(r"https?:|//\w|url\(|@import", text.partition('<script type="app')[0])
    assert "default-src 'none'" in text


def test_what_a_caption_says_is_never_markup(tmp_path, make_run):
    text = write_report([make_run(tmp_path / "run")]).read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert r"\u003cscript\u003edocument.title" in text
    assert "its parser &lt;is&gt; not here" in text


def test_half_a_surrogate_pair_is_no_reason_to_fail(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    (root / "config.json").write_text(r'{"name": "\ud83d"}')
    assert "<title>capjax: ?</title>" in write_report([root]).read_text()


def test_the_exports_are_the_tables(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    text = write_report([root]).read_text()
    hrefs = re.findall(r'download="all-splits\.(\w+)" href="data:[^,"]*,([^"]*)"', text)
    (table,) = result_tables(read_runs([root]))
    assert {kind: unquote(content) for kind, content in hrefs} == {
        "csv": to_csv(table),
        "tex": to_latex(table),
    }


def test_several_runs_make_one_page(tmp_path, make_run):
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", shift=0.5)
    path = write_report([first, second])
    assert path == first / "comparison.html"
    text = path.read_text()
    assert "2 runs compared" in text
    assert text.count('data-axis="time"') == text.count('data-axis="step"') > 0
    data = json.loads(re.search(r'id="data">(.*?)</script>', text)[1])
    assert [run["name"] for run in data["runs"]] == ["first", "second"]
    assert write_report([first, second], tmp_path / "out.html").is_file()


def test_a_place_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report([tmp_path])


def test_no_images_is_a_number_of_images_and_less_is_none(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    text = write_report([root], max_images=0).read_text()
    assert json.loads(re.search(r'id="data">(.*?)</script>', text)[1])["images"] == []
    with pytest.raises(UserError, match="--images=-1: expected 0 or more"):
        write_report([root], max_images=-1)


def test_a_run_without_results_still_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "No metrics were written yet" in write_report([tmp_path]).read_text()


def test_every_second_of_a_run_is_on_its_page(tmp_path, make_run):
    root = make_run(tmp_path / "run")
    seconds = {"init": 10, "compile": 20, "data": 30, "step": 100, "evaluation": 25, "save": 15}
    first = {"launch": 1, "start_step": 0, "began": 0.0, "step": 10, "seconds": seconds}
    later = {phase: 2 * value for phase, value in seconds.items()}  # but 10 was restored
    second = {"launch": 2, "start_step": 10, "began": 460.0, "step": 20, "seconds": seconds}
    lines = [first, first | {"step": 20, "seconds": later}, second]
    (root / "launches.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = write_report([root]).read_text()
    assert "goodput <b>33.3 %</b> of 10:00 in 2 launches, 1:00 between them" in text
    shares = [float(share) for share in re.findall(r"flex-grow: ([\d.]+)", text)]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and len(shares) == 7
    assert re.search(r"lost \(done again\)</th><td>2:50</td><td>28.3 %", text)
