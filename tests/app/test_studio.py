"""The page's images are those of the scripts, whichever side was drawn before."""

import numpy as np
import pytest
from studios import (
    CASES,
    PROMPT,
    no_step,
    open_from,
    pixels,
    save_exported,
    save_run,
    script_picture,
)

from senseflow.app.studio import STUDENT, TEACHER, Wanted
from senseflow.sampling import Drawing

NAMES = [name for name in CASES if name != "dmd2"]  # sampled as sdxl


@pytest.fixture(scope="module", params=NAMES)
def given(request, tmp_path_factory):
    case = CASES[request.param]
    base = request.getfixturevalue(case.base)
    return case, base, tmp_path_factory.mktemp(request.param)


def test_the_page_draws_what_the_scripts_draw(given, tmp_path):
    case, base, folder = given
    run = save_run(case, base, folder)
    studio = open_from("--pipeline", base, "--checkpoint", run)
    height, width = case.size
    size = ("--height", height, "--width", width)
    square = ("--height", 16, "--width", 16)
    small = Wanted(PROMPT, Drawing(2, "euler", height=16, width=16, seed=5))
    cases = {
        "default": (STUDENT, Wanted(PROMPT, Drawing(seed=3)), ["--checkpoint", run, "--seed", 3]),
        "teacher": (
            TEACHER,
            Wanted(PROMPT, Drawing(steps=3, guidance=2.0, seed=3)),
            ["--teacher", "--seed", 3, "--steps", 3, "--guidance", 2, *size],
        ),
        "small": (
            STUDENT,
            small,
            ["--checkpoint", run, "--seed", 5, "--steps", 2, "--sampler", "euler", *square],
        ),
    }
    for name, (side, wanted, flags) in cases.items():
        drawn = studio.draw(side, wanted, studio.plan(side, wanted), no_step)
        expected = script_picture(case, base, tmp_path / name, *flags)
        np.testing.assert_array_equal(pixels(drawn.image), expected, name)
        assert drawn.time_s > 0
    again = studio.draw(STUDENT, small, studio.plan(STUDENT, small), no_step)
    np.testing.assert_array_equal(pixels(again.image), expected)
    assert again.levels == pytest.approx([case.anchors[0], case.anchors[2]])


def test_an_exported_pipeline_is_its_own_base(given, tmp_path, caplog):
    case, base, folder = given
    exported = save_exported(case, base, folder)
    alone = open_from("--pipeline", exported)
    assert not alone.has_teacher and "another" not in caplog.text
    beside = open_from("--pipeline", exported, "--teacher", base)
    assert beside.has_teacher
    for sampler in ("x0", "euler"):
        wanted = Wanted(PROMPT, Drawing(sampler=sampler, seed=3))
        flags = ("--checkpoint", exported, "--seed", 3, "--sampler", sampler)
        expected = script_picture(case, base, tmp_path / sampler, *flags)
        for studio in (alone, beside):
            drawn = studio.draw(STUDENT, wanted, studio.plan(STUDENT, wanted), no_step)
            np.testing.assert_array_equal(pixels(drawn.image), expected)


@pytest.fixture(scope="module")
def flux(flux_folder, tmp_path_factory):
    run = save_run(CASES["flux"], flux_folder, tmp_path_factory.mktemp("run"))
    return open_from("--pipeline", flux_folder, "--checkpoint", run)


def test_student_and_teacher_share_all_but_the_network(flux):
    parts = flux.pipeline.stock.components
    wanted = Wanted(PROMPT, Drawing(steps=1))
    flux.draw(TEACHER, wanted, flux.plan(TEACHER, wanted), no_step)
    now = flux.pipeline.stock.components
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer_2"):
        assert now[name] is parts[name]
    assert now["transformer"] is flux._networks[TEACHER] is not flux._networks[STUDENT]


def test_steps_are_told_and_the_first_image_is_marked(flux):
    told = []
    wanted = Wanted(PROMPT, Drawing(steps=4))
    first = flux.draw(STUDENT, wanted, flux.plan(STUDENT, wanted), told.append)
    second = flux.draw(STUDENT, wanted, flux.plan(STUDENT, wanted), no_step)
    assert told == [1, 2, 3, 4]
    assert first.first and not second.first
    assert first.levels == pytest.approx(CASES["flux"].anchors)


@pytest.mark.parametrize(
    ("side", "changes", "said"),
    [
        (STUDENT, dict(prompt="  "), "prompt is empty"),
        (STUDENT, dict(seed=-1), "seed -1 must be from 0"),
        (STUDENT, dict(seed=2**60), f"from 0 to {2**53 - 1}"),
        (STUDENT, dict(height=0), "height 0 must be from 1"),
        (STUDENT, dict(width=17), "width 17 is not a positive multiple"),
        (STUDENT, dict(width=10**6), "width 1000000 must be from 1 to"),
        (STUDENT, dict(steps=3), r"steps 3: a student of 4 anchors samples in \[1, 2, 4"),
        (TEACHER, dict(steps=0), "steps 0 must be from 1 to 1000"),
        (TEACHER, dict(steps=10**6), "steps 1000000 must be from 1 to 1000"),
        (TEACHER, dict(guidance=float("nan")), "guidance nan is not a finite number"),
    ],
)
def test_what_cannot_be_drawn_is_refused(flux, side, changes, said):
    prompt = changes.pop("prompt", PROMPT)
    with pytest.raises(ValueError, match=said):
        flux.plan(side, Wanted(prompt, Drawing(**changes)))
