"""The page in a real browser: headless Chromium through playwright, where both are there."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from studios import CASES, open_from, save_run

pytest.importorskip("gradio", reason='no gradio: pip install -e ".[app]"')
pytest.importorskip("playwright", reason="no playwright: pip install playwright")
from playwright.sync_api import Browser, ViewportSize, expect, sync_playwright
from playwright.sync_api import Page as Tab

from senseflow.app.page import Page
from senseflow.app.studio import TEACHER

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: apt-get install chromium, to see the page in a browser"
)
PATIENCE = 120_000  # milliseconds
LONG = 1000  # teacher's steps that nobody waits for
STEP_S = 0.01  # of each, at least: a quick machine would be done before the browser looks
DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=390, height=844)


@pytest.fixture(scope="module")
def address(flux_folder, tmp_path_factory) -> Iterator[str]:
    run = save_run(CASES["flux"], flux_folder, tmp_path_factory.mktemp("run"))
    studio = open_from("--pipeline", flux_folder, "--checkpoint", run)
    studio._networks[TEACHER].register_forward_pre_hook(lambda *call: time.sleep(STEP_S))
    page = Page(studio)
    yield page.launch("127.0.0.1")[0]
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_tab(browser: Browser, address: str, size: ViewportSize = DESKTOP, scheme="light") -> Tab:
    """A tab of a browser of its own."""
    tab = browser.new_context(viewport=size, color_scheme=scheme).new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    tab.locator("#draw").wait_for()
    return tab


def draw(tab: Tab, prompt: str, teacher_steps: int = 3) -> None:
    tab.locator("#prompt textarea").fill(prompt)
    tab.locator("#teacher-steps input").fill(str(teacher_steps))
    tab.locator("#draw").click()


def drawn(tab: Tab) -> None:
    """Wait for the end: before it, another click on the button counts for nothing."""
    expect(tab.locator("#said")).to_contain_text("Drawn in", timeout=PATIENCE)
    tab.locator("#said [data-testid=status-tracker].hide").wait_for(state="attached")


def sizes(tab: Tab) -> list[list[int]]:
    """Natural and shown sizes of the two images, once they are decoded."""
    shown = "Math.round(n.getBoundingClientRect().width)"
    found = f"async n => (await n.decode(), [n.naturalWidth, n.naturalHeight, {shown}])"
    return [tab.locator(f"#{side} img").evaluate(found) for side in ("student", "teacher")]


@pytest.mark.parametrize(
    ("size", "scheme"), [(DESKTOP, "light"), (DESKTOP, "dark"), (PHONE, "light"), (PHONE, "dark")]
)
def test_a_prompt_and_the_button_give_two_images_with_their_times(
    browser, address, tmp_path, size, scheme
):
    tab = open_tab(browser, address, size, scheme)
    asked, wrong = set[str](), list[str]()
    tab.on("request", lambda request: asked.add(request.url))
    tab.on("response", lambda got: wrong.append(got.url) if got.status >= 400 else None)
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else 0)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.reload()
    tab.locator("#draw").wait_for()
    draw(tab, "a red seven")
    drawn(tab)
    for side, said in (("student", "4 steps"), ("teacher", "3 steps")):
        expect(tab.locator(f"#{side}-caption")).to_contain_text(said)
        expect(tab.locator(f"#{side}-caption .time")).to_contain_text(" s")
    for width, height, shown in sizes(tab):
        assert (width, height) == (32, 24) and shown > 140  # pixels on the screen
    scrolls = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    assert tab.evaluate(scrolls) <= size["width"]
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked
    assert wrong == []
    check_shot(tab, tmp_path / "page.png", scheme)
    tab.context.close()


def check_shot(tab: Tab, file: Path, scheme: str) -> None:
    """Light is light, dark is dark, and there is something to see."""
    tab.screenshot(path=file, full_page=True)
    levels = np.asarray(Image.open(file).convert("L"), dtype=float)
    assert (np.median(levels) > 200) if scheme == "light" else (np.median(levels) < 70)
    assert levels.std() > 15


def test_both_buttons_are_whole_at_every_width(browser, address):
    tab = open_tab(browser, address)
    for width in (320, 400, 447, 448, 480, 560, 620, 640, 641, 800):
        tab.set_viewport_size(ViewportSize(width=width, height=800))
        box, draw, stop = (
            tab.locator(name).bounding_box() for name in ("#buttons", "#draw", "#stop")
        )
        for button in (draw, stop):
            assert button["width"] >= 90 and button["height"] >= 30, (width, button)
            assert button["x"] >= box["x"] >= 0, (width, button)
            right, bottom = button["x"] + button["width"], button["y"] + button["height"]
            assert right <= box["x"] + box["width"] + 1 <= width, (width, button)
            assert bottom <= box["y"] + box["height"] + 1, (width, button)
        beside = stop["x"] >= draw["x"] + draw["width"]
        assert beside or stop["y"] >= draw["y"] + draw["height"], width
    tab.context.close()


def test_errors_are_said_and_the_settings_act(browser, address):
    tab = open_tab(browser, address)
    draw(tab, "")
    expect(tab.locator("#said .problem")).to_have_text("The prompt is empty")
    tab.locator("#height input").fill("30")
    draw(tab, "a red seven")
    expect(tab.locator("#said .problem")).to_contain_text("Height 30 is not a positive multiple")
    tab.locator("#height input").fill("16")
    tab.locator("#new-seed").click()
    expect(tab.locator("#seed input")).not_to_have_value("0")
    seed = tab.locator("#seed input").input_value()
    tab.locator("#steps").get_by_label("2", exact=True).check()
    expect(tab.locator("#eta")).to_be_hidden()
    tab.locator("#sampler").get_by_label("cps", exact=True).check()
    tab.locator("#eta input").fill("0.3")
    tab.locator("#with-teacher input").uncheck()
    expect(tab.locator("#teacher")).to_be_hidden()
    tab.locator("#draw").click()
    drawn(tab)
    expect(tab.locator("#student-caption")).to_contain_text(f"seed {seed}")
    expect(tab.locator("#student-caption")).to_contain_text("2 steps")
    expect(tab.locator("#student-caption")).to_contain_text("eta 0.3")
    tab.locator("#seed input").fill("8")
    tab.locator("#eta input").fill("0.6")
    tab.locator("#sampler").get_by_label("x0", exact=True).check()
    expect(tab.locator("#eta")).to_be_hidden()
    tab.locator("#prompt textarea").fill("another")
    tab.locator("#earlier .thumbnail-item").first.click()
    expect(tab.locator("#seed input")).to_have_value(seed)
    expect(tab.locator("#eta input")).to_have_value("0.3")
    expect(tab.locator("#prompt textarea")).to_have_value("a red seven")
    tab.context.close()


def test_a_second_tab_waits_and_a_stop_lets_it_in(browser, address):
    first, second = open_tab(browser, address), open_tab(browser, address)
    draw(first, "one", LONG)
    expect(first.locator("#said")).to_contain_text("of the teacher", timeout=PATIENCE)
    draw(second, "two")
    expect(second.locator("#said")).to_contain_text("queue", timeout=PATIENCE)
    first.locator("#stop").click()
    expect(first.locator("#said")).to_contain_text("Stopped")
    drawn(second)
    for tab in (first, second):
        tab.context.close()


def test_a_reload_in_the_middle_ends_the_image(browser, address):
    tab = open_tab(browser, address)
    draw(tab, "one", LONG)
    expect(tab.locator("#said")).to_contain_text("of the teacher", timeout=PATIENCE)
    tab.reload()
    tab.locator("#draw").wait_for()
    draw(tab, "two")
    drawn(tab)
    expect(tab.locator("#earlier .thumbnail-item")).to_have_count(1)
    tab.context.close()
