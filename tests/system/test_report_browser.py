"""The report in Chromium: it fits a laptop and a phone, in light and dark, and it moves.

Needs /usr/bin/chromium (on Debian: apt-get install chromium); without it these tests fail.
"""

import itertools

import pytest
from playwright.sync_api import sync_playwright

from fsdp_qlora.report import page as report
from tests.report.runs import CONFIG, REAL, gpu_facts, gpu_step, write_run

pytestmark = pytest.mark.system

CHROMIUM = "/usr/bin/chromium"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGS += ["--disable-background-networking", "--disable-component-update"]
SCREENS = list(itertools.product((1280, 390), ("light", "dark")))

# Elements that hold text and reach over the right side, except in boxes that scroll by themselves.
OVER = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".table, svg")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
# Axes with marks that stand too close to be told apart.
TOUCHING = """[...document.querySelectorAll(".xs")].filter(axis => {
  const boxes = [...axis.children].map(e => e.getBoundingClientRect()).filter(b => b.width);
  return boxes.some((b, i) => i && b.left < boxes[i - 1].right + 6);
}).length"""
SMALLEST = """Math.min(...[...document.querySelectorAll("main *")].filter(e => e.innerText)
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
# Contrast of the page's text, the faint and the warning colours against the ground.
CONTRAST = """["body", ".sub", ".off"].map(name => {
  const luminance = rule => rule.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
    .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const of = e => getComputedStyle(document.querySelector(e));
  const own = of(name).backgroundColor;
  const ground = own.endsWith(" 0)") ? of("body").backgroundColor : own;
  const [a, b] = [luminance(of(name).color), luminance(ground)].sort((a, b) => b - a);
  return (a + .05) / (b + .05);
})"""


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A page with every kind of part: a run on GPUs beside a real one of the CPU."""
    out = tmp_path_factory.mktemp("report")
    steps = [gpu_step(i) | {"step": i * 500} for i in range(1, 21)]
    config = CONFIG | {"max_steps": 40_000, "model_name": "organisation/" + "a-long-name" * 9}
    run = out / "a-run-with-a-rather-long-name-of-its-own"
    write_run(run, steps, (3, 2), config, gpu_facts())
    return report.write([run, REAL], out)


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_fits_the_screen_is_legible_and_asks_for_nothing(browser, path, width, scheme):
    screen = {"width": width, "height": 900}
    with browser.new_context(viewport=screen, color_scheme=scheme, offline=True) as context:
        page, faults, requests = context.new_page(), [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        found, height = page.evaluate(size)
        assert found == width and height > 2000
        assert page.evaluate(OVER) == [] and page.evaluate(TOUCHING) == 0
        assert page.evaluate(SMALLEST) >= 12
        assert min(page.evaluate(CONTRAST)) >= 4.5
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
        assert faults == [] and requests == [path.as_uri()]


def test_the_pointer_reads_the_recorded_values(browser, path):
    with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        view = page.locator(".view:has(svg[aria-label*='GPU of rank 0'])")
        view.scroll_into_view_if_needed()
        box = view.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 9)
        lines = view.locator(".tip").inner_text().splitlines()
        rows = {name: value for value, name in (line.split(maxsplit=1) for line in lines)}
        assert rows.pop("optimizer step") == "5,000"
        expected = gpu_step(10)["ranks"][0]["device_rows"]
        for row, gib in expected.items():
            assert float(rows[row]) == pytest.approx(gib, abs=0.01), row
        assert float(rows["plan: peak"]) == pytest.approx(6.5, abs=0.01)
        page.mouse.move(1, 1)
        assert view.locator(".tip").is_hidden()
