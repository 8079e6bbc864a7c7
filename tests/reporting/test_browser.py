"""The page in Chromium: searched, sorted and read by keyboard, at a desk and on a phone."""

import functools
import json

import pytest
from playwright.sync_api import expect, sync_playwright

from capjax.reporting.page import write_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pages(tmp_path_factory, make_run):
    """The page of one run and that of two."""
    root = tmp_path_factory.mktemp("runs")
    first, second = make_run(root / "first"), make_run(root / f"second{'_and_long' * 5}", shift=0.5)
    return write_report([first]), write_report([first, second])


@pytest.fixture(scope="module")
def launch():
    """`launch(program)` is a browser of that program, the same at every call."""
    with sync_playwright() as playwright:
        yield functools.cache(
            lambda program: playwright.chromium.launch(
                executable_path=program,
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
        )


@pytest.fixture
def open_page(require_package, launch):
    """`open_page(path)` shows it; at the end no script may have failed and no request been made."""
    browser, problems = launch(require_package("chromium")), []

    def show(path, **options):
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}} | options)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.on("request", lambda request: check(request.url, path.as_uri()))
        page.goto(path.as_uri())
        return page

    def check(url, page_url):
        if not url.startswith(("data:", page_url)):
            problems.append(url)

    yield show
    for context in browser.contexts:
        context.close()
    assert problems == []


def test_captions_are_searched_filtered_and_sorted(pages, open_page):
    page = open_page(pages[0])
    tiles = page.locator(".tile")
    assert page.title() == "capjax: a test"  # the caption's script is text, not script
    assert tiles.count() == 30
    loaded = page.evaluate(
        "Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth > 0)))"
    )
    assert loaded == [True] * 30
    page.select_option("#filter", "wrong")
    assert tiles.count() == 15
    page.fill("#find", "11 CAPTION")  # words in any order and case
    expect(page.locator(".tile")).to_have_count(1)
    assert tiles.inner_text().startswith("caption 11")
    page.fill("#find", "no such words")
    page.wait_for_selector(".empty")
    page.fill("#find", "")
    page.select_option("#filter", "missed")
    expect(page.locator(".tile")).to_have_count(11)
    assert page.locator(".tile .inset").count() == 10  # what is found instead
    page.select_option("#filter", "all")
    page.select_option("#sort", "cider_d")

    def said():
        return [text.split("\n")[0].split() for text in tiles.all_inner_texts()]

    ascending = [int(words[1]) for words in said()[1:-1]]  # the script is the worst
    assert ascending == sorted(ascending)
    assert said()[-1][:2] == ["caption", "7"]  # without a value: last, whichever way
    page.click("#order")
    assert [int(words[1]) for words in said()[:-2]] == ascending[::-1]
    assert said()[-1][:2] == ["caption", "7"]


def test_the_keyboard_alone(pages, open_page):
    page = open_page(pages[0])

    def expect_focus(place):
        expect(page.locator(f'.tile[data-place="{place}"]')).to_be_focused()

    page.keyboard.press("/")
    page.keyboard.type("caption 1")
    page.keyboard.press("Enter")  # at once: what was typed counts
    assert page.locator("#count").inner_text() != "30 of 30"
    expect_focus(0)
    page.keyboard.press("ArrowRight")
    expect_focus(1)
    columns = page.evaluate(
        "getComputedStyle(document.getElementById('tiles')).gridTemplateColumns.split(' ').length"
    )
    page.keyboard.press("ArrowDown")
    expect_focus(1 + columns)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert page.locator("#viewer").is_visible()
    first = page.locator("#place").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").inner_text() != first
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect_focus(2)
    page.keyboard.press("Enter")
    page.click("#previous")
    page.click("#previous")  # at the first image it is disabled, and has the focus no more
    place = page.locator("#place")
    expect(place).to_contain_text("1 of ")
    page.keyboard.press("ArrowRight")
    expect(place).to_contain_text("2 of ")
    page.locator(".word").first.click()
    page.keyboard.press("ArrowRight")  # the words, and the focus, are replaced
    page.keyboard.press("ArrowRight")
    expect(place).to_contain_text("4 of ")
    page.keyboard.press("ArrowDown")
    expect(page.locator(".word").first).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    expect_focus(3)
    page.keyboard.press("/")
    page.keyboard.press("Escape")
    expect(page.locator("#count")).to_have_text("30 of 30")


def test_a_word_shows_where_the_model_looked(pages, open_page):
    page = open_page(pages[0])
    page.fill("#find", "caption 12")
    expect(page.locator(".tile")).to_have_count(1)
    page.click(".tile")
    words = page.locator(".word")
    assert words.all_inner_texts() == ["caption", "12"]

    def veil():
        return page.evaluate(
            "(() => { const c = document.querySelector('#shown canvas');"
            " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            " return [c.width, c.height, ...d.filter((_, i) => i % 4 === 3)]; })()"
        )

    words.nth(0).click()
    assert veil() == [3, 2, 0, 225, 225, 225, 225, 225]  # the first patch is seen
    page.keyboard.press("ArrowDown")  # the next word
    assert veil() == [3, 2, 225, 0, 225, 225, 225, 225]
    words.nth(1).click()
    assert page.locator("#shown canvas").count() == 0
    assert "the caption finds another image" in page.locator("#shown").inner_text()


def test_runs_are_compared(pages, open_page):
    page = open_page(pages[1])
    page.select_option("#filter", "differ")
    assert page.locator(".tile").count() == 1
    assert "another caption" in page.locator(".tile").inner_text()
    page.select_option("#filter", "all")
    page.select_option("#whose", "1-0")
    page.select_option("#sort", "cider_d")
    assert page.evaluate("sortValue(listed[0], 'cider_d')") == pytest.approx(0.5)
    curve = page.locator(".plot[data-axis=time] svg").first
    assert curve.is_hidden()
    page.select_option("#axis", "time")
    curve.scroll_into_view_if_needed()
    curve.hover()
    assert "at minute" in page.locator("#tip").inner_text()
    assert page.locator("#tradeoff svg").first.is_visible()
    with page.expect_download() as download:
        page.click("text=CSV >> nth=0")
    assert download.value.suggested_filename == "concept.csv"
    assert download.value.path().read_text().startswith("metric,first,first lower")


def test_many_voices_are_told_apart_by_name(tmp_path, make_run, open_page):
    root = make_run(tmp_path / "run")
    (root / "captions" / "guided").mkdir()
    records = (root / "captions" / "concept.jsonl").read_text().splitlines()[:2]
    for scale in range(2, 10):  # eight of them, of two images; of the second as without guidance
        guided = [json.loads(line) for line in records]
        guided[0]["caption"] = f"said with {scale}"
        lines = "".join(json.dumps(record) + "\n" for record in guided)
        (root / "captions" / "guided" / f"concept@{scale}.jsonl").write_text(lines)
    page = open_page(write_report([root]))
    page.select_option("#filter", "differ")
    assert page.locator(".tile").count() == 1  # not those of which one voice alone says something
    assert "said with 9\nguidance 9" in page.locator(".tile").inner_text()
    page.select_option("#filter", "all")
    page.fill("#find", json.loads(records[1])["key"])
    expect(page.locator(".tile")).to_have_count(1)
    assert "run\nguidance 2\nguidance 3\nand 6 more" in page.locator(".tile").inner_text()
    page.fill("#find", "")
    page.select_option("#whose", "3")
    page.select_option("#filter", "wrong")
    assert page.locator(".tile").count() == 1  # of two: the others were not captioned with guidance


def test_rewards_stand_beside_the_judge_and_captions_over_time(
    tmp_path, make_reinforced, open_page
):
    path = write_report([make_reinforced(tmp_path / "run")])
    page = open_page(path)
    boxes = [page.locator("#rewards .pairs .plot").nth(i).bounding_box() for i in range(4)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[2]["y"] == boxes[3]["y"]
    assert boxes[0]["x"] == boxes[2]["x"] < boxes[1]["x"] == boxes[3]["x"]
    page.locator("#rewards .mark").nth(1).scroll_into_view_if_needed()
    mark = page.locator("#rewards .mark").nth(1).bounding_box()
    page.mouse.move(mark["x"] + mark["width"] / 2, mark["y"] + 5)
    expect(page.locator("#tip")).to_have_text(
        "alarm: 31% of the pairs of tokens in captions are repeated (step 20)"
    )
    images = page.locator("#over-time img")
    assert images.evaluate_all("all => all.map(image => image.naturalWidth > 0)") == [True] * 2
    phone = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True}
    page = open_page(path, **phone)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    table = page.locator("#over-time .scroll")
    table.evaluate("scroller => scroller.scrollLeft = 9999")
    assert table.evaluate("scroller => scroller.scrollLeft") > 0
    left = page.locator("#over-time img").first.bounding_box()["x"]
    assert 0 <= left - table.bounding_box()["x"] < 20  # the picture stays


def test_latex_is_copied_or_selected(pages, open_page):
    page = open_page(pages[0])
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click(".copy >> nth=0")
    selected = page.evaluate(
        "(a => a.value.slice(a.selectionStart, a.selectionEnd))(document.activeElement)"
    )
    assert selected.startswith(r"\begin{tabular}")
    assert selected.endswith("\\end{tabular}\n")
    page.click(".copy >> nth=0")
    assert page.locator(".tablehead textarea").count() == 0


def test_a_phone_and_the_dark(pages, open_page):
    phone = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True}
    for path in pages:
        page = open_page(path, color_scheme="dark", **phone)
        assert page.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out
        page.locator(".tile").nth(2).tap()
        box = page.locator("#viewer").bounding_box()
        assert (box["width"], box["height"]) == (390, 800)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.tap("#close")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.tap("#theme")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (dark, light) == ("rgb(20, 22, 26)", "rgb(255, 255, 255)")


def test_tiles_are_made_as_they_come_into_view(tmp_path, make_run, open_page):
    root = make_run(tmp_path / "run")
    (root / "evaluations" / "concept.json").unlink()
    records = [
        json.dumps({"key": f"k{i}", "caption": f"c {i}", "references": []}) for i in range(1000)
    ]
    (root / "captions" / "concept.jsonl").write_text("\n".join(records))
    page = open_page(write_report([root]))
    assert page.locator("#count").inner_text() == "1,000 of 1,000"
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.locator(".tile").nth(100)).to_be_attached()
    page.fill("#find", "c")  # found again: from the beginning
    expect(page.locator(".tile").nth(299)).not_to_be_attached()
    page.set_viewport_size({"width": 1200, "height": 4000})  # where the end stays near
    expect(page.locator(".tile").nth(119)).to_be_attached()
    page.keyboard.press("Enter")
    for _ in range(8):  # further than is made at first
        page.evaluate("focusTile(Number(document.activeElement.dataset.place) + 120)")
    assert page.evaluate("Number(document.activeElement.dataset.place)") == 960
    assert page.locator(".tile").count() >= 960
