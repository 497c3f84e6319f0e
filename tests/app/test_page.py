"""What the page's buttons do, without a browser; and its server, through gradio's own client."""

import html
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flux_pipeline import transformer
from PIL import Image
from studios import CASES, PROMPT, no_step, open_from, pixels, save_run

gr = pytest.importorskip("gradio", reason='no gradio: pip install -e ".[app]"')
from gradio_client import Client  # noqa: E402

from senseflow.app.page import MOST_EARLIER, Page  # noqa: E402
from senseflow.app.studio import STUDENT, TEACHER, Wanted  # noqa: E402
from senseflow.sampling import Drawing  # noqa: E402

REQUEST = SimpleNamespace(session_hash="a tab")


@pytest.fixture(scope="module")
def page(flux_folder, tmp_path_factory) -> Page:
    run = save_run(CASES["flux"], flux_folder, tmp_path_factory.mktemp("run"))
    return Page(open_from("--pipeline", flux_folder, "--checkpoint", run))


def values(page: Page, earlier=(), **changes) -> dict:
    """What a browser sends: what the page begins with, and changes by name of a setting."""
    settings = vars(page.parts.settings)
    parts = {part: part.value for part in settings.values()}
    parts |= {page.parts.prompt: PROMPT, page.parts.earlier: list(earlier)}
    parts[page.parts.settings.teacher_steps] = 3
    for name, value in changes.items():
        parts[page.parts.prompt if name == "prompt" else settings[name]] = value
    return parts


def press(page: Page, watch=lambda *seen, **named: None, **changes) -> list[dict]:
    return list(page.draw(values(page, **changes), REQUEST, watch))


def merged(updates: list[dict]) -> dict:
    return {part: value for update in updates for part, value in update.items()}


def test_two_images_their_times_and_an_entry_of_the_history(page):
    updates = press(page, seed=4)
    shown, parts = merged(updates), page.parts
    student, teacher = (shown[parts.pictures[side]] for side in (STUDENT, TEACHER))
    assert student.size == teacher.size == (32, 24)
    wanted = Wanted(PROMPT, Drawing(seed=4))
    direct = page.studio.draw(STUDENT, wanted, page.studio.plan(STUDENT, wanted), no_step)
    np.testing.assert_array_equal(pixels(student), pixels(direct.image))
    assert (
        "seed 4" in shown[parts.captions[STUDENT]] and "0.9, 0.7" in shown[parts.captions[STUDENT]]
    )
    assert "3 steps" in shown[parts.captions[TEACHER]]
    assert "guidance 3.5" in shown[parts.captions[TEACHER]] and " s" in shown[parts.said]
    (entry,) = shown[parts.earlier]
    restored = page._take_back([entry], SimpleNamespace(index=0))
    assert restored == [PROMPT, 4, 4, "x0", gr.skip(), 24, 32]


def test_the_eta_of_cps_is_drawn_said_and_restored(page):
    shown = merged(press(page, sampler="cps", eta=0.3, seed=4, with_teacher=False))
    caption = html.unescape(shown[page.parts.captions[STUDENT]])
    assert "<span>sampler cps</span><span>eta 0.3</span>" in caption
    wanted = Wanted(PROMPT, Drawing(sampler="cps", eta=0.3, seed=4))
    direct = page.studio.draw(STUDENT, wanted, page.studio.plan(STUDENT, wanted), no_step)
    picture = shown[page.parts.pictures[STUDENT]]
    np.testing.assert_array_equal(pixels(picture), pixels(direct.image))
    (entry,) = shown[page.parts.earlier]
    assert page._take_back([entry], SimpleNamespace(index=0))[3:5] == ["cps", 0.3]
    assert shown[page.parts.gallery]["value"][0][1] == f"{PROMPT} · seed 4 · 4 cps 0.3"


def test_an_older_teachers_image_goes_when_the_student_is_there(page):
    parts = page.parts
    student = next(u for u in press(page) if parts.pictures[STUDENT] in u)
    assert student[parts.pictures[TEACHER]] is None


def test_the_teacher_can_be_switched_off(page):
    shown = merged(press(page, with_teacher=False, teacher_steps=None))
    assert shown[page.parts.pictures[TEACHER]] is None
    assert shown[page.parts.pictures[STUDENT]].size == (32, 24)


def test_a_prompt_whose_end_is_not_read_is_said_under_its_image(page):
    for prompt, said in ((PROMPT, False), ("word " * 100, True)):
        shown = merged(press(page, prompt=prompt, with_teacher=False))
        caption = shown[page.parts.captions[STUDENT]]
        assert ("prompt cut: text_encoder reads " in caption) == said


def test_a_teacher_that_takes_no_guidance_is_drawn_without(flux_folder, tmp_path):
    base = Path(shutil.copytree(flux_folder, tmp_path / "base"))
    shutil.rmtree(base / "transformer")
    transformer(guidance_embeds=False).save_pretrained(base / "transformer")
    run = save_run(CASES["flux"], base, tmp_path)
    page = Page(open_from("--pipeline", base, "--checkpoint", run))
    guidance = page.parts.settings.guidance
    assert not guidance.visible and guidance.value is None
    caption = merged(press(page))[page.parts.captions[TEACHER]]
    assert "3 steps" in caption and "guidance" not in caption


def test_the_history_is_bounded_and_the_newest_comes_first(page):
    earlier = []
    for seed in range(MOST_EARLIER + 2):
        drawn = merged(press(page, with_teacher=False, seed=seed, steps=1, earlier=earlier))
        earlier = drawn[page.parts.earlier]
    assert [one.wanted.drawing.seed for one in earlier] == list(range(MOST_EARLIER + 1, 1, -1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(prompt=""), "The prompt is empty"),
        (dict(height=0), "Height 0 must be from 1 to 65535"),
        (dict(height=30), "Height 30 is not a positive multiple of"),
        (dict(seed=None), "Seed is empty"),
        (dict(teacher_steps=0), "Teacher's steps 0 must be from 1 to 1000"),
        (dict(guidance=None), "Guidance is empty"),
        (dict(sampler="cps", eta=None), "Eta is empty"),
        (dict(sampler="cps", eta=2), "Eta 2 must be from 0 to 1"),
    ],
)
def test_what_cannot_be_drawn_is_said_on_the_page(page, changes, said):
    (update,) = press(page, **changes)
    (text,) = update.values()
    assert said in html.unescape(text) and "alert" in text


def test_a_prompt_is_shown_as_text_and_not_as_html(page):
    (update,) = press(page, prompt="<script>", seed=-1)
    assert "<script>" not in update[page.parts.said]
    assert "<script>" not in str(
        merged(press(page, prompt="<script>"))[page.parts.captions[STUDENT]]
    )


def test_a_stop_ends_the_image_and_the_next_one_is_right(page):
    told = []

    def watch(progress, desc, unit):
        told.append((desc, progress))
        if desc == TEACHER and progress[0] == 2:
            page._stop(REQUEST)

    updates = press(page, watch, teacher_steps=50)
    assert told[-1] == (TEACHER, (3, 50)) or told[-1] == (TEACHER, (2, 50))
    assert "Stopped" in updates[-1][page.parts.said]
    again, whole = merged(press(page)), merged(press(page))
    for side in (STUDENT, TEACHER):
        picture = page.parts.pictures[side]
        np.testing.assert_array_equal(pixels(again[picture]), pixels(whole[picture]))


def test_the_server_draws_the_same_pixels_for_two_who_ask_at_once(page):
    address, _ = page.launch("127.0.0.1")
    try:
        clients = [Client(address, verbose=False, httpx_kwargs={"timeout": 120}) for _ in range(2)]
        asked = (PROMPT, 4, 24, 32, 4, "x0", 0.7, True, 3, 3.5)
        jobs = [client.submit(*asked, api_name="/draw") for client in clients]
        for job in jobs:
            job.result(timeout=120)
    finally:
        page.close()
    wanted = Wanted(PROMPT, Drawing(seed=4))
    direct = page.studio.draw(STUDENT, wanted, page.studio.plan(STUDENT, wanted), no_step)
    for job in jobs:
        # who comes second is first told, as often as it takes, that another draws
        shown = [found for update in job.outputs() if (found := _pictures(update))]
        assert len(shown[0]) == 1  # the student's, before the teacher's is there
        np.testing.assert_array_equal(pixels(Image.open(shown[0][0])), pixels(direct.image))
        assert Image.open(shown[-1][0]).format == "PNG"


def _pictures(update: tuple) -> list[str]:
    """The files of the student and the teacher that one update brings."""
    return [part for part in update[1:3] if isinstance(part, str)]
