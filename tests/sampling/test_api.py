"""Drawing from Python gives the images of the scripts and of plain pipelines, or says why not."""

import logging
import subprocess
import sys
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from command_line import PROMPTS, call, in_memory, pictures, prompt_flags
from diffusers import DiffusionPipeline
from doc_pages import Page
from PIL import Image
from small import BASES, ROOT, T5_LENGTH, make_student

from senseflow.config.families import family_of
from senseflow.sampling import Drawing, load_student, load_teacher, sample
from senseflow.sampling.drawing import Machine, Paths


@pytest.fixture(scope="module", params=list(BASES))
def given(request, tmp_path_factory):
    """An embedded teacher's folder, and a run with its student."""
    name = request.param
    return name, BASES[name], make_student(name, tmp_path_factory.mktemp(name) / "run")


def same(ours: list[Image.Image], theirs: list[np.ndarray]) -> bool:
    return len(ours) == len(theirs) and all(
        np.array_equal(np.array(a), b) for a, b in zip(ours, theirs, strict=True)
    )


def test_a_students_images_are_the_scripts(given, tmp_path):
    _, base, run = given
    student = load_student(base, run)
    flags = ["--checkpoint", run, *prompt_flags(), "--output_dir"]
    assert call(family_of(base, "base"), base, *flags, tmp_path / "a") == 0
    assert same(sample(student, PROMPTS), list(pictures(tmp_path / "a").values()))
    flags += [tmp_path / "b", "--steps", 2, "--sampler", "euler", "--seed", 5, "--batch_size", 2]
    assert call(family_of(base, "base"), base, *flags) == 0
    images = sample(student, PROMPTS, Drawing(2, "euler", seed=5), batch_size=2)
    assert same(images, list(pictures(tmp_path / "b").values()))


def test_a_teachers_image_is_the_plain_pipelines(given):
    name, base, _ = given
    drawing = Drawing(steps=3, guidance=2.0, height=32, width=32, seed=4)
    ours = sample(load_teacher(base), PROMPTS[:1], drawing)
    pipeline = in_memory(DiffusionPipeline.from_pretrained(base))
    pipeline.set_progress_bar_config(disable=True)
    length = {} if name == "sdxl" else {"max_sequence_length": T5_LENGTH}
    image = pipeline(
        PROMPTS[0], num_inference_steps=3, guidance_scale=2.0, height=32, width=32,
        generator=torch.Generator().manual_seed(4), **length,
    ).images[0]  # fmt: skip
    assert same(ours, [np.array(image)])


def test_the_documented_lines_draw_the_scripts_image(tmp_path, monkeypatch):
    (block,) = [b for b in Page(ROOT / "docs/sampling.md").blocks if b.language == "python"]
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) == 5
    run = make_student("flux", tmp_path / "run")
    code = block.text.replace("/path/to/FLUX.1-dev", str(BASES["flux"]))
    code = code.replace("runs/flux", str(run))
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    flags = ["--checkpoint", run, "--prompt", "a red fox in the snow", "--output_dir", "out"]
    assert call(family_of(BASES["flux"], "base"), BASES["flux"], *flags) == 0
    assert same([Image.open("fox.png")], list(pictures(tmp_path / "out").values()))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(steps=0), "steps 0 must be from 1 to 1000"),
        (dict(steps=1001), "steps 1001 must be from 1 to 1000"),
        (dict(sampler="ddim"), "sampler 'ddim' must be one of x0, euler, cps"),
        (dict(two_steps="last"), "two_steps 'last' must be one of spread, first"),
        (dict(guidance=float("inf")), "guidance inf is not a finite number"),
        (dict(height=-8), "height -8 must be from 1 to 65535"),
        (dict(width=2**16), "width 65536 must be from 1 to 65535"),
        (dict(max_sequence_length=0), "max_sequence_length 0 must be at least 1"),
        (dict(seed=-1), f"seed -1 must be from 0 to {2**63 - 1}"),
        (dict(levels=(1.0, 0.9), steps=2), "levels 1, 0.9 and steps 2 exclude each other"),
        (dict(steps="4"), "steps '4' is not a whole number"),
        (dict(steps=2.0), "steps 2.0 is not a whole number"),
        (dict(steps=True), "steps True is not a whole number"),
        (dict(seed=1.5), "seed 1.5 is not a whole number"),
        (dict(seed=None), "seed is None: leave it out for its default"),
        (dict(seed=2**63), f"seed {2**63} must be from 0 to {2**63 - 1}"),
        (dict(seed=2**64 - 1), f"seed {2**64 - 1} must be from 0 to {2**63 - 1}"),
        (dict(seed="0"), "seed '0' is not a whole number"),
        (dict(height=32.0), "height 32.0 is not a whole number"),
        (dict(width=[32]), "width [32] is not a whole number"),
        (dict(max_sequence_length="12"), "max_sequence_length '12' is not a whole number"),
        (dict(guidance="3.5"), "guidance '3.5' is not a number"),
        (dict(guidance=True), "guidance True is not a number"),
        (dict(sampler=0), "sampler 0 must be one of x0, euler, cps"),
        (dict(sampler="cps"), "eta is missing: cps takes one from 0, which is euler, to 1, x0"),
        (dict(sampler="x0", eta=1), "eta 1 is of the sampler cps: name it, or leave it out"),
        (dict(eta=0.7), "eta 0.7 is of the sampler cps: name it, or leave it out"),
        (dict(sampler="cps", eta=1.01), "eta 1.01 must be from 0 to 1"),
        (dict(sampler="cps", eta=-0.1), "eta -0.1 must be from 0 to 1"),
        (dict(sampler="cps", eta=float("nan")), "eta nan is not a finite number"),
        (dict(sampler="cps", eta="0.7"), "eta '0.7' is not a number"),
        (dict(two_steps=None), "two_steps is None: leave it out for its default"),
        (dict(levels=()), "levels () is not a list of noise levels"),
        (dict(levels=1.0), "levels 1.0 is not a list of noise levels"),
        (dict(levels="1"), "levels '1' is not a list of noise levels"),
        (dict(levels=(1.0, "0.9")), "levels '0.9' is not a number"),
        (dict(levels=(1.0, None)), "levels None is not a number"),
        (dict(levels=(float("nan"),)), "levels nan is not a finite number"),
    ],
)
def test_a_drawing_out_of_range_names_field_value_and_range(fields, said):
    with pytest.raises(ValueError) as error:
        Drawing(**fields)
    assert str(error.value) == said


def test_what_a_student_cannot_draw(given):
    name, base, run = given
    student = load_student(base, run)
    wrong = {
        "steps 3: a student of 4 anchors samples in [1, 2, 4, 8] steps": Drawing(steps=3),
        "height 33 is not a positive multiple of": Drawing(height=33),
        "levels 0.4 is none of the trained anchors": Drawing(levels=(0.4,)),
    }
    if name == "sdxl":
        wrong["max_sequence_length 12: SDXL has no T5"] = Drawing(max_sequence_length=12)
    else:
        wrong[" takes 512 tokens of a prompt at most"] = Drawing(max_sequence_length=513)
    for said, drawing in wrong.items():
        with pytest.raises(ValueError) as error:
            sample(student, ["x"], drawing)
        assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sample(student, ["x", " "])
    for wrong, said in (
        ([3], "prompt 0 is 3, not a text"),
        ([None], "prompt 0 is None, not a text"),
        (["x", "\ud83d"], "prompt 1 holds .*half of a character"),
    ):
        with pytest.raises(ValueError, match=said):
            sample(student, wrong)
    for batch_size, said in ((0, "0 must be at least 1"), ("2", "'2' is not a whole number")):
        with pytest.raises(ValueError, match=f"batch_size {said}"):
            sample(student, ["x"], batch_size=batch_size)
    with pytest.raises(ValueError, match=r"drawing \{'steps': 4\} is not a Drawing"):
        sample(student, ["x"], {"steps": 4})


def test_one_text_is_one_prompt_and_whole_numbers_of_numpy_are_taken():
    teacher = load_teacher(BASES["flux"])
    small = dict(steps=np.int64(1), height=np.int32(32), width=32)
    (text,) = sample(teacher, "abc", Drawing(seed=np.uint64(2**63 - 1), **small))
    listed = sample(teacher, ["abc", "abc"], Drawing(seed=2**63 - 1, **small))
    assert same([text], [np.array(listed[0])])
    assert not same([text], [np.array(listed[1])])  # whose seed is 2**63


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_nothing_is_said_but_what_is_cut(name, capfd, caplog):
    """No loading bars, no line per prompt and encoder, no advice on arguments of ours."""
    levels = [library.utils.logging.get_verbosity() for library in (diffusers, transformers)]
    diffusers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.set_verbosity_warning()
    try:
        for library in (diffusers, transformers):
            library.utils.logging.enable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            teacher = load_teacher(BASES[name])
        sample(teacher, ["word " * 40] * 3, Drawing(steps=1, height=32, width=32))
        said = capfd.readouterr()
        assert said.out == said.err == ""
        (message,) = caplog.messages
        assert "3 of 3 prompts are longer than the text encoders read" in message
        for library in (diffusers, transformers):  # a caller's own settings are back
            assert library.utils.logging.is_progress_bar_enabled()
            assert library.utils.logging.get_verbosity() == logging.WARNING
    finally:
        for library, level in zip((diffusers, transformers), levels, strict=True):
            library.utils.logging.set_verbosity(level)
            library.utils.logging.disable_progress_bar()


def test_what_cannot_be_loaded(tmp_path):
    run = make_student("flux", tmp_path / "run")
    with pytest.raises(ValueError, match=r"student of family flux, not sdxl: name the teacher"):
        load_student(BASES["sdxl"], run)
    with pytest.raises(ValueError, match=r"base .*nowhere is not a diffusers pipeline folder"):
        load_teacher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"checkpoint .*nowhere does not exist"):
        load_student(BASES["flux"], tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype 'fp8' must be one of bfloat16, float16, float32"):
        load_teacher(BASES["flux"], dtype="fp8")
    with pytest.raises(ValueError, match="device toaster is not a device"):
        load_teacher(BASES["flux"], device="toaster")
    with pytest.raises(ValueError, match="config is of a student: name its checkpoint"):
        Paths(BASES["flux"], config=ROOT / "README.md")
    for wrong, said in (
        (dict(offload="no"), "offload 'no' is neither True nor False"),
        (dict(lora=3), "lora 3 is not a path"),
        (dict(lora=""), "lora '' is not a path"),
    ):
        with pytest.raises(ValueError, match=said):
            load_teacher(BASES["flux"], **wrong)
    with pytest.raises(ValueError, match="base None is not a path"):
        load_teacher(None)
    with pytest.raises(ValueError, match="ema 1 is neither True nor False"):
        load_student(BASES["flux"], run, ema=1)
    with pytest.raises(ValueError, match="lora nowhere does not exist"):
        load_teacher(BASES["flux"], lora="nowhere")


def test_steps_of_an_image_are_told_and_may_stop_it(tmp_path):
    teacher = load_teacher(BASES["flux"])
    plan = teacher.model.plan(Drawing(steps=3, height=32, width=32))
    told: list[int] = []
    teacher.draw(["x"], [0], plan, told.append)
    assert told == [1, 2, 3]

    class Stop(Exception):
        pass

    def stop(num: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        teacher.draw(["x"], [0], plan, stop)
    assert np.array_equal(*(np.array(teacher.draw(["x"], [0], plan)[0][0]) for _ in range(2)))
    assert told == [1, 2, 3]  # nobody is told any more


def test_importing_it_imports_neither_torch_nor_diffusers():
    code = (
        "import sys; from senseflow.sampling import Drawing, load_student, sample\n"
        "assert not {'torch', 'diffusers', 'numpy', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_machine_says_what_it_is_not():
    with pytest.raises(ValueError, match="dtype 'int8'"):
        Machine(dtype="int8")
