"""The report and the live page in Chromium: they fit a laptop and a phone, and they move.

Needs /usr/bin/chromium (on Debian: apt-get install chromium); without it these tests fail.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time

import pytest
from playwright.sync_api import sync_playwright

from fsdp_qlora.config import PROJECT_DIR
from fsdp_qlora.report import page as report
from fsdp_qlora.report.watch import Server
from tests import tiny, warm
from tests.report.runs import (
    AUDIT,
    CONFIG,
    REAL,
    gpu_facts,
    gpu_step,
    step_line,
    steps_of,
    write_run,
)
from tests.test_run import flags

pytestmark = pytest.mark.system

CHROMIUM = "/usr/bin/chromium"
ARGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
ARGS += ["--disable-background-networking", "--disable-component-update"]
SCREENS = list(itertools.product((1440, 390), ("light", "dark")))
BAD, WHEN = "<x onclick=a()>&lt;/script>\u2028</x>", ("before", "after")
PATHS = "all => all.map(e => e.getAttribute('d'))"

# Elements that hold text and reach over the right side, except in boxes that scroll by themselves.
OVER = """[...document.querySelectorAll("main *")].filter(e => !e.closest(".table, svg, pre")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
# Axes with marks that stand too close to be told apart.
TOUCHING = """[...document.querySelectorAll(".view > svg")].filter(image => {
  const y = image.viewBox.baseVal.height - 4;
  const boxes = [...image.querySelectorAll(`text[y="${y}"]`)].map(e => e.getBoundingClientRect());
  return boxes.some((b, i) => i && b.left < boxes[i - 1].right + 6);
}).length"""
SMALLEST = """Math.min(...[...document.querySelectorAll("main *")].filter(e => e.innerText)
  .map(e => parseFloat(getComputedStyle(e).fontSize)))"""
# Contrast of the page's text, the faint and the warning colours against the ground.
CONTRAST = """["body", ".axis", ".state"].map(name => {
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


def write_gpus(place, factor=1, seed=0, **more):
    """A run on GPUs, with two answers."""
    steps = [gpu_step(i, seed=seed) | {"step": i * factor} for i in range(1, 21)]
    config = CONFIG | {"max_steps": 20 * factor, "model_name": "organisation/" + "a-long-name" * 9}
    write_run(place, steps, (3, 2), config | more, gpu_facts() | {"data": AUDIT})
    samples = [{"event": "sample", "when": w, "prompt": BAD, "answer": BAD} for w in WHEN]
    append(place, *samples)
    return place


def append(place, *rows):
    with (place / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return write_gpus(out / "a-run-with-a-rather-long-name-of-its-own", 500), REAL


@pytest.fixture(scope="module")
def path(runs, tmp_path_factory):
    """A page with every kind of part: a run on GPUs beside a real one of the CPU."""
    return report.write([*runs], tmp_path_factory.mktemp("page"))


@contextlib.contextmanager
def opened(browser, url, width=1280, **more):
    """A page; nothing may go wrong on it, and no request leave this machine."""
    screen = {"width": width, "height": 900}
    with browser.new_context(viewport=screen, **more) as context:
        page, faults, requests = context.new_page(), [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)
        yield page
        assert faults == [] and {r.split("/data?")[0].rstrip("/") for r in requests} == {
            url.rstrip("/")
        }


@pytest.mark.parametrize("is_live", (False, True))
@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_a_page_fits_the_screen_and_is_legible(browser, path, runs, width, scheme, is_live):
    url = Server([*runs], 0).begin().url if is_live else path.as_uri()
    with opened(browser, url, width, color_scheme=scheme, offline=not is_live) as page:
        page.locator("#curves path.dots").first.wait_for(state="attached")
        size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        found, height = page.evaluate(size)
        assert found == width and height > 1500
        assert page.evaluate(OVER) == [] and page.evaluate(TOUCHING) == 0
        assert page.evaluate(SMALLEST) >= 12
        assert min(page.evaluate(CONTRAST)) >= 4.5
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[scheme]
        assert page.locator("#memory-chart path.area").count() >= 3
        assert BAD in page.locator("main").inner_text() and page.locator("main x").count() == 0


def hover(page, figure, share):
    """Name in the legend -> what stands there, the pointer being at a share of the chart."""
    view = figure.locator(".view")
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    page.mouse.move(box["x"] + 56 + share * (box["width"] - 64), box["y"] + 99)
    keys = (key.rsplit(maxsplit=1) for key in figure.locator(".key button").all_inner_texts())
    return {name.strip(): float(value.replace(",", "").replace("–", "nan")) for name, value in keys}


def test_the_pointer_reads_recorded_values_on_all_charts_at_once(browser, path):
    with opened(browser, path.as_uri()) as page:
        page.select_option("#place", label=page.locator("#place option").first.inner_text())
        chart, loss = page.locator("figure.tall"), page.locator("#curves figure").first
        rows = hover(page, chart, 0.503)
        step = gpu_step(10)
        for row, gib in step["ranks"][0]["device_rows"].items():
            assert rows[row] == pytest.approx(gib, rel=1e-3), row
        assert rows["plan: peak"] == 6.5
        assert chart.locator(".at").text_content() == "step 5,000"
        keys = loss.locator(".key button").all_inner_texts()  # linked
        assert float(keys[0].split()[-1]) == pytest.approx(step["loss"], rel=1e-3)
        assert keys[1].endswith("–")  # no held-out loss was measured there
        page.mouse.move(1, 1)
        assert chart.locator(".at").count() == 0


def drag(page, view, start, end):
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    xs = [box["x"] + 56 + share * (box["width"] - 64) for share in (start, end)]
    page.mouse.move(xs[0], box["y"] + 80)
    page.mouse.down()
    page.mouse.move(xs[1], box["y"] + 80, steps=4)
    page.mouse.up()


def x_marks(figure):
    marks = figure.locator("text[y='226']").all_text_contents()
    return [mark.replace(",", "") for mark in marks]


def test_zoom_axis_scale_and_legend_act_on_every_chart(browser, path):
    with opened(browser, path.as_uri()) as page:
        loss, speed = (page.locator("#curves figure").nth(i) for i in (0, 1))
        whole = x_marks(loss)
        assert whole[0] == "0" and whole[-1] == "10000"
        drag(page, loss.locator(".view"), 0.25, 0.5)
        for figure in (loss, speed):
            marks = [float(mark) for mark in x_marks(figure)]
            assert 2400 <= marks[0] < marks[-1] <= 5100
        page.keyboard.down("Shift")
        drag(page, loss.locator(".view"), 0.9, 0.5)  # 2,500 to 5,000 goes on by 1,000
        moved = [float(mark) for mark in x_marks(speed)]
        assert moved[0] >= 3400 and 5500 <= moved[-1] <= 6100 and x_marks(loss) == x_marks(speed)
        for _ in range(9):
            drag(page, speed.locator(".view"), 0.9, 0.1)
        moved = [float(mark) for mark in x_marks(loss)]
        assert moved[0] >= 7400 and moved[-1] == 10000  # it stops where the run does
        page.keyboard.up("Shift")
        loss.locator(".view").dblclick()
        assert x_marks(speed) == whole
        page.get_by_role("button", name="time", exact=True).click()
        assert loss.locator(".axis").inner_text() == "seconds of training"
        page.get_by_role("button", name="log", exact=True).click()
        assert (
            page.get_by_role("button", name="log", exact=True).get_attribute("aria-pressed")
            == "true"
        )
        page.get_by_role("button", name="linear", exact=True).click()
        name = speed.locator(".key button").first
        label = name.inner_text().rsplit(maxsplit=1)[0].strip()
        drawn = page.locator(f'#curves [data-name="{label}"]')
        assert drawn.count() > 4
        name.click()
        assert drawn.count() == 0 and name.get_attribute("aria-pressed") == "false"
        speed.locator(".key button").first.click()
        assert drawn.count() > 4


def test_the_axis_of_tokens_is_what_the_steps_add_up_to(browser, path, runs):
    with opened(browser, path.as_uri()) as page:
        page.get_by_role("button", name="tokens", exact=True).click()
        loss = page.locator("#curves figure").first
        assert loss.locator(".axis").inner_text() == "tokens"
        sums = [[*itertools.accumulate(s["num_tokens"] for s in steps_of(run))] for run in runs]
        assert float(x_marks(loss)[-1]) == pytest.approx(max(map(max, sums)), rel=0.2)
        hover(page, loss, 0.6)
        at = loss.locator(".at").text_content().removeprefix("tokens ")
        assert float(at.replace(",", "")) in set().union(*sums)


def test_series_of_any_kind_are_drawn_within_their_chart(browser, tmp_path):
    """Constant, tiny, not a number, one step, 100,000 of them with one that stands out."""
    flat = [step_line(i, 2.0) | {"learning_rate": 2e-4 * i} for i in range(1, 13)]
    nan = [step_line(i, None if i % 3 else 1.0) for i in range(1, 13)]
    long = [step_line(i, 9.0 if i == 54_321 else 1.0 + i % 7 / 10) for i in range(1, 100_001)]
    for name, steps, at_least in (
        ("flat", flat, 1),
        ("tiny", [s | {"loss": 1e-14 * s["step"]} for s in flat], 1),
        ("nan", nan, 1),
        ("none", [s | {"loss": None} for s in flat], 0),
        ("one", flat[:1], 1),
        ("long", long, 1),
    ):
        run = write_run(tmp_path / name, steps)
        began_s = time.monotonic()
        with opened(browser, report.write([run], run).as_uri()) as page:
            figure = page.locator("#curves figure").first
            drawn = "".join(figure.locator("[data-name=loss]").evaluate_all(PATHS))
            took_s = time.monotonic() - began_s
            assert bool(drawn) == bool(at_least) and "NaN" not in drawn and "Inf" not in drawn
            ys = [float(y) for y in re.findall(r"[ML][\d.-]+ ([\d.-]+)", drawn)]
            assert all(8 <= y <= 208.1 for y in ys)
            assert ("no finite value" in figure.inner_text()) == (name == "none")
            for axis in page.locator("#curves figure").all():  # one notation on an axis
                marks = axis.locator("text[x='48']").all_text_contents()
                assert len({"e" in mark for mark in marks if mark != "0"}) <= 1
            if name == "long":
                print(f"100,000 steps: written and open in {took_s:.1f} s")
                assert len(ys) < 10_000 and min(ys) < 30  # thinned, and the one stands out
                assert took_s < 60  # 14 where five others compute too; quadratic: minutes


def test_a_page_follows_runs_as_they_write_through_a_resume_and_to_their_end(browser, tmp_path):
    first, second = write_gpus(tmp_path / "first"), tmp_path / "second"
    second.mkdir()
    with opened(browser, Server([second], 0).begin().url) as page:  # nothing is there yet
        page.locator("#memory").wait_for(state="hidden")
    server = Server([first, second], 0).begin()
    with opened(browser, server.url) as page:
        tile = page.locator(".tile", has_text="Step").locator("b")
        tile.first.get_by_text("20", exact=True).wait_for()
        page.locator("#log").wait_for(state="hidden")  # nothing stands there
        (first / "logs").mkdir()
        (first / "logs" / "rank0.log").write_text("a line")
        page.locator("#live-log pre", has_text="a line").wait_for()
        write_run(second, [gpu_step(i, seed=7) for i in range(1, 11)], (2.5,))
        tile.nth(1).get_by_text("10", exact=True).wait_for()
        assert page.locator('#curves [data-name="second"]').count() > 4
        append(second, *(gpu_step(i, seed=9) for i in range(6, 9)))  # a resume: 6 to 8 again
        tile.nth(1).get_by_text("8", exact=True).wait_for()
        sample = {"event": "sample", "when": "after", "step": 8, "prompt": "why?", "answer": BAD}
        for place in (first, second):
            append(place, sample | {"expected": "so"})
        asked = page.locator(".asked", has_text="why?")
        asked.get_by_text("second, after").wait_for()
        assert asked.get_by_text("the data").count() == 1  # once for all runs
        (second / "summary.json").write_text('{"is_complete": true}')
        page.locator(".state.finished").wait_for()
        assert page.locator("main x").count() == 0


def test_a_run_shows_itself_while_it_trains(browser, tmp_path):
    warm.make_model(tmp_path, **tiny.SIZES)
    argv = [
        sys.executable,
        "train.py",
        *flags(tmp_path, "--watch", f"--output_dir={tmp_path / 'seen'}"),
    ]
    argv += ["--max_steps=400", "--save_model=false", "--eval_samples=0"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env, cwd=PROJECT_DIR) as run:
        url = next(line.split()[1] for line in run.stdout if line.startswith("watch "))
        with browser.new_context() as context:
            page = context.new_page()
            page.goto(url)
            tile = page.locator(".tile", has_text="Step").locator("b").first
            page.locator(".waits", has_text="step").first.wait_for(timeout=60_000)
            page.locator("#curves path.faint").first.wait_for(state="attached", timeout=60_000)
            seen = int(tile.inner_text())
            limit_s = time.monotonic() + 60
            while int(tile.inner_text()) <= seen and time.monotonic() < limit_s:
                page.wait_for_timeout(200)
            assert 0 < seen < int(tile.inner_text())
            run.terminate()
            run.stdout.read()
            page.locator("#link", has_text="does not answer").wait_for(timeout=60_000)
            assert page.locator("#curves path.faint").count() > 0  # what stands there stays
