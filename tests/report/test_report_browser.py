"""The report in a real browser: headless Chromium, where there is one.

Chromium makes no window narrower than 500 pixels, so the page is shown in a frame of the width that
is tested; a script of the test's own, outside of the frame, measures it.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from made_up_run import LONG_PROMPT, make_run, make_samples
from PIL import Image

from senseflow.report import __main__ as report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium: apt-get install chromium, to see the page in a browser"
)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr",
)  # fmt: skip
DARK = "--blink-settings=preferredColorScheme=0"
LIGHT = "--blink-settings=preferredColorScheme=1"
WIDTHS = (1280, 400, 320)
FRAME = '<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>'
HARNESS = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
{frames}
<pre id="found" hidden></pre><script>
const measure = (frame) => {{
  const page = frame.contentDocument, root = page.documentElement;
  const images = [...page.images];
  return {{
    width: frame.contentWindow.innerWidth,
    scrolls: Math.max(root.scrollWidth, page.body.scrollWidth),
    images: images.length,
    broken: images.filter((i) => !i.complete || i.naturalWidth === 0).map((i) => i.alt),
    invisible: images.filter((i) => i.getBoundingClientRect().width < 16).map((i) => i.alt),
    narrow: [...page.querySelectorAll("svg[role=img]")]
      .filter((s) => s.getBoundingClientRect().width < 200).length,
    drawings: page.querySelectorAll("svg[role=img]").length,
    boxes: [...page.querySelectorAll(".scroll")].map((b) => [b.clientWidth, b.scrollWidth]),
  }};
}};
addEventListener("load", () => {{
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
}});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Long prompts, a strip wider than any screen, a long path, three folders of samples."""
    folder = tmp_path_factory.mktemp("browser")
    run = make_run(folder / ("a_run_with_a_name_" * 5))
    prompts = ["a red seven", LONG_PROMPT, "x" * 300]
    flags = ["--teacher_images", make_samples(folder / "teacher", prompts, size=600)]
    flags += ["--student_images", *(make_samples(folder / str(k), prompts, k) for k in (4, 2, 1))]
    results = [{"name": "student", "metric": "FID-T", "value": 1.5, "num_images": 5000,
                "weights": [{"file": "w" * 200, "sha256": "0" * 64}]}]  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    flags += ["--results", folder / "results.json", "--output", folder / "report.html"]
    assert report.main([str(run), *map(str, flags)]) == 0
    return folder / "report.html"


def browse(folder: Path, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER
    return subprocess.run(
        [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags, file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


def console(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def measured(page: Path, folder: Path) -> list[dict]:
    """In a frame of each width, of one browser."""
    harness = folder / "harness.html"
    content = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "\n".join(FRAME.format(width=width, page=content) for width in WIDTHS)
    harness.write_text(HARNESS.format(frames=frames), encoding="utf-8")
    result = browse(folder, harness, "--window-size=1400,1000", "--dump-dom")
    assert console(result) == []
    found = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', result.stdout, re.DOTALL)
    assert found and found[1], result.stderr
    return json.loads(html.unescape(found[1]))


def test_all_is_seen_and_the_page_does_not_scroll_sideways(page, tmp_path):
    for width, found in zip(WIDTHS, measured(page, tmp_path), strict=True):
        assert found["width"] == width
        assert found["scrolls"] <= width
        assert found["images"] == 3 + 3 * 4 and found["broken"] == [] and found["invisible"] == []
        assert found["drawings"] >= 10 and found["narrow"] == 0
        assert len(found["boxes"]) == 3
        if width < 672:  # of a strip: it scrolls in a box of its own
            assert all(inner > outer for outer, inner in found["boxes"])


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_screenshots_show_a_page(page, tmp_path, scheme):
    picture = tmp_path / "page.png"
    flags = [scheme, "--window-size=1280,2000", f"--screenshot={picture}"]
    assert console(browse(tmp_path, page, *flags)) == []
    levels = np.asarray(Image.open(picture).convert("L"), dtype=float)
    assert levels.shape == (2000, 1280)
    ink = levels < 110 if scheme == LIGHT else levels > 140
    assert 0.005 < ink.mean() < 0.4
    assert (levels.mean() > 200) if scheme == LIGHT else (levels.mean() < 70)
    bands = ink.reshape(20, 100, 1280).any(axis=(1, 2))
    assert bands.all()  # something in every hundred lines
