"""The run page, made of a small run's files and looked at in a browser."""

import json
import re
from pathlib import Path

import pytest

from capjax.data.sources import open_source
from capjax.errors import UserError
from capjax.reporting.page import write_report

SCRIPT = "<script>document.title = 'broken'</script>"


@pytest.fixture
def run_directory(tmp_path):
    """What `capjax train` leaves, in small."""
    root = tmp_path / "run"
    (root / "captions").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"name": "a test", "seed": 0}))
    (root / "summary.json").write_text(
        json.dumps(
            {
                "steps": 40,
                "num_params": 1832256,
                "devices": "1 x cpu",
                "images_per_s": 512.25,
                "data_wait_fraction": 0.0123,
                "model_flops_per_s": 5e10,
                "peak_rss_bytes": 1_500_000_000,
                "wall_s": 90.0,
            }
        )
    )
    lines = [{"step": s, "wall_s": s, "train/loss": 5 / s} for s in range(1, 41)]
    for step in (20, 40):
        lines.append(
            {"step": step, "eval/concept/exact_match": step / 100, "eval/concept/loss": 1.5}
        )
    (root / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step"')
    source = open_source("emoji:concept")
    records = [
        {
            "key": source[index].key,
            "source": "emoji:concept",
            "index": index,
            "caption": SCRIPT if index == 0 else f"caption {index}",
            "references": [source[index].captions[0].text],
            "exact": index % 2 == 0,
            "unigram_f1": 0.25,
            "logprob": -1.0,
            "num_tokens": 3,
            "guidance_scale": 1.0,
            "seed": 0,
            "step": 40,
        }
        for index in range(30)
    ]
    (root / "captions" / "concept.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    return root


def test_the_page_is_one_file_that_asks_for_nothing(run_directory):
    path = write_report(run_directory)
    assert path == run_directory / "report.html"
    text = path.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert links
    assert all(link.startswith("data:") for link in links)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)


def test_the_seed_draws_the_pictures_right_and_wrong_alike(run_directory):
    shown = {}
    for seed in (0, 0, 1):
        text = write_report(run_directory, seed=seed, tiles=10).read_text()
        assert f"seed {seed}" in text
        shown.setdefault(seed, []).append(re.findall(r'alt="([^"]*)"', text))
    assert shown[0][0] == shown[0][1]
    assert shown[0][0] != shown[1][0]
    assert len(shown[0][0]) == 10
    marks = re.findall(r'data-exact="(\d)"', write_report(run_directory, tiles=30).read_text())
    assert marks.count("1") == 15


def test_a_place_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report(tmp_path)


def test_a_run_without_results_still_has_a_page(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert "No metrics were written yet" in write_report(tmp_path).read_text()


@pytest.mark.slow
def test_the_page_in_a_browser(run_directory, require_package):
    from playwright.sync_api import sync_playwright

    browser_path = require_package("chromium")
    path = write_report(run_directory, tiles=30)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(Path(path).as_uri())
        assert page.title() == "capjax: a test"  # the caption's script is text, not script
        assert page.locator(".tile:visible").count() == 30
        loaded = page.evaluate(
            "Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then("
            "() => i.naturalWidth > 0))))"
        )
        assert len(loaded) == 30
        assert all(loaded)
        page.check("#wrong")
        assert page.locator(".tile:visible").count() == 15
        page.fill("#find", "caption 11")
        assert page.locator(".tile:visible").count() == 1
        chart = page.locator("svg[data-chart]").first
        chart.scroll_into_view_if_needed()
        chart.hover()
        assert "at step" in page.locator("#tip").inner_text()
        page.set_viewport_size({"width": 390, "height": 800})  # a phone: nothing sticks out
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert problems == []
