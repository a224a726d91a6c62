"""The page in a real browser: it fits a laptop and a phone, in light and dark, and it moves.

Skipped only where there is no Chromium or Chrome (on Debian: apt-get install chromium).
"""

import itertools
import struct
import tempfile

import pytest

from fsdp_qlora.errors import UserError
from fsdp_qlora.results.report import browser
from fsdp_qlora.results.report import command as report
from tests.report_runs import CONFIG, REAL, card_facts, card_step, write_run

BROWSER = browser.find()
SCREENS = list(itertools.product((1280, 390), (False, True)))

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

# Elements that hold text and reach over the right side, except in boxes that scroll by themselves.
OVER = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".table, svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
# Axes with marks that stand too close to be told apart.
TOUCHING = """[...document.querySelectorAll(".xs")].filter(axis => {
  const boxes = [...axis.children].map(e => e.getBoundingClientRect()).filter(b => b.width);
  return boxes.some((b, i) => i && b.left < boxes[i - 1].right + 6);
}).length"""
POINT = """(() => { const area = [...document.querySelectorAll(".area")].find(
    a => a.querySelector("svg").getAttribute("aria-label").includes("Card of rank 0"));
  const box = area.getBoundingClientRect(), clientX = box.left + box.width * FRACTION;
  area.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY: box.top + 9}));
  return [...area.querySelectorAll(".tip div")].map(row => [...row.children].map(c => c.innerText));
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with every kind of part: a run on cards beside a real one of the CPU."""
    out = tmp_path_factory.mktemp("report")
    steps = [card_step(i) | {"step": i * 500} for i in range(1, 21)]
    config = CONFIG | {"max_steps": 40_000, "model_name": "organisation/" + "a-long-name" * 9}
    run = write_run(out / "a-run-with-a-rather-long-name-of-its-own", steps, (3, 2), config, {})
    run = write_run(run, steps, (3, 2), config, card_facts())
    report.write([run, REAL], out, has_png=False)
    with browser.opened(BROWSER, out / "report.html") as opened:
        yield opened


@needs_browser
@pytest.mark.parametrize(("width", "is_dark"), SCREENS)
def test_the_page_fits_the_screen(page, width, is_dark):
    found, height = page.size(width, is_dark)
    assert found == width and height > 2000
    assert page.evaluate(OVER) == []
    assert page.evaluate(TOUCHING) == 0


@needs_browser
def test_dark_screens_get_a_dark_page(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    page.size(1280, is_dark=True)
    assert page.evaluate(ground) == "rgb(15, 19, 24)"
    page.size(1280, is_dark=False)
    assert page.evaluate(ground) == "rgb(255, 255, 255)"


@needs_browser
def test_text_is_large_enough_on_a_phone(page):
    page.size(390)
    words = "Math.min(...[...document.querySelectorAll('main *')].filter(e => e.innerText)"
    assert page.evaluate(words + ".map(e => parseFloat(getComputedStyle(e).fontSize)))") >= 12


@needs_browser
def test_the_pointer_reads_the_recorded_values(page):
    page.size(1280)
    rows = dict(page.evaluate(POINT.replace("FRACTION", "0.5")))
    expected = card_step(10)["ranks"][0]["device_rows"]
    assert rows[""] == "5,000"
    for row, gib in expected.items():
        assert float(rows[row]) == pytest.approx(gib, abs=0.01), row
    assert float(rows["plan: peak"]) == pytest.approx(6.5, abs=0.01)


@needs_browser
def test_the_picture_is_the_whole_page(page):
    _, height = page.size(1280)
    png = page.shoot(1280)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, tall = struct.unpack(">II", png[16:24])
    scale = min(2.0, browser.MAX_PIXELS / height)
    assert abs(width - 1280 * scale) <= 1 and abs(tall - height * scale) <= 1


@needs_browser
def test_the_report_has_the_picture_and_markdown_shows_it(tmp_path):
    paths, missing = report.write([REAL], tmp_path)
    assert missing == "" and paths[-1].name == "report.png"
    assert paths[-1].stat().st_size > 50_000
    assert "(report.png)" in (tmp_path / "report.md").read_text()


@needs_browser
def test_a_browser_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "x.html").write_text("<p>x")
    with browser.opened(BROWSER, tmp_path / "x.html") as opened:
        (profile,) = (tmp_path / "temporary").iterdir()
        assert str(profile) in " ".join(map(str, opened.process.args))
    assert opened.process.poll() is not None
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_program_that_is_no_browser_is_an_error_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match="headless Chromium: it ended early"),
        browser.opened("/bin/true", tmp_path / "x.html"),
    ):
        pass
