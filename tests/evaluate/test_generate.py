"""`python -m senseflow.evaluate generate` as a user types it, on the embedded pipelines."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import in_memory
from diffusers import DiffusionPipeline
from PIL import Image
from small import BASES, PROMPTS, ROOT, T5_LENGTH, make_student, pictures, sidecar
from small_disk import read_only

import senseflow.sampling.cli as scripts
from senseflow.evaluate.__main__ import main
from senseflow.evaluate.layouts import SEED_STRIDE
from senseflow.sampling import model as drawing
from senseflow.sampling.pipeline import Pipeline
from senseflow.teachers.flux.family import FLUX
from senseflow.weights.card import read_card, write_card
from senseflow.weights.student import find_student

FEW = ("--teacher_steps", 4)  # the families' own 40 or 50 take longer
NAMES = [
    "00000_a-red-seven.png",
    "00001_a-blue-two.png",
    "00002_a-green-nine.png",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_student("flux", tmp_path_factory.mktemp("flux") / "run")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def draw(prompts: object, output: Path, *flags: object, base: Path = BASES["flux"]) -> int:
    """The exit status of `generate`."""
    line = ["generate", "--base", base, "--prompts_file", prompts, "--output_dir", output, *flags]
    return main([str(word) for word in line])


def error_of(capsys, *args: object, **more: Path) -> str:
    """The one line of an exit with status 2."""
    capsys.readouterr()
    try:
        status = draw(*args, **more)
    except SystemExit as stop:
        status = stop.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def whole(run, prompts, tmp_path_factory) -> Path:
    """Teacher and student, two samplers, two numbers of steps, two seeds, in one command."""
    output = tmp_path_factory.mktemp("whole") / "out"
    ways = ("--samplers", "x0", "euler", "--steps", 4, 1, "--seeds", 2)
    assert draw(prompts, output, "--checkpoint", run, *ways, *FEW) == 0
    return output


def test_one_command_makes_all_folders(whole):
    ways = {"teacher", *(f"student_{n}_{sampler}" for n in (4, 1) for sampler in ("x0", "euler"))}
    assert {f.name for f in whole.iterdir()} == ways
    wanted = [f"seed_{k}/{name}" for k in (0, 1) for name in NAMES]
    for way in ways:
        assert sorted(pictures(whole / way)) == wanted
        assert all(image.shape == (32, 32, 3) for image in pictures(whole / way).values())
    drawn = {image.tobytes() for image in pictures(whole).values()}
    one_step = 6  # in one step from pure noise there is nothing to re-noise: x0 is euler
    assert len(drawn) == len(pictures(whole)) - one_step


def test_sidecars_say_how_each_image_was_made(whole):
    made = sidecar(whole / "student_4_euler" / "seed_1" / NAMES[2].replace(".png", ".json"))
    assert (made["prompt"], made["index"]) == (PROMPTS[2], 2)
    assert made["seed"] == 2 + SEED_STRIDE
    assert (made["steps"], made["sampler"], made["iteration"]) == (4, "euler", 20)
    teacher = sidecar(whole / "teacher" / "seed_0" / NAMES[0].replace(".png", ".json"))
    assert (teacher["steps"], teacher["guidance"], teacher["checkpoint"]) == (4, 3.5, None)
    assert (teacher["height"], teacher["width"]) == (32, 32)  # the student's, not FLUX's 1024


def test_images_are_the_scripts_own(whole, run, prompts, tmp_path):
    """The command and the script share one generator, whose exchange of networks loses nothing."""
    base = ["--flux_ckpt", BASES["flux"], "--prompts_file", prompts]
    student = ["--checkpoint", run, "--sampler", "euler", "--output_dir", tmp_path / "s"]
    teacher = ["--teacher", "--steps", 4, "--height", 32, "--width", 32]
    assert scripts.main(FLUX, [str(word) for word in [*base, *student]]) == 0
    line = [*base, *teacher, "--seed", SEED_STRIDE, "--output_dir", tmp_path / "t"]
    assert scripts.main(FLUX, [str(word) for word in line]) == 0
    for name in NAMES:
        ours = np.array(Image.open(whole / "student_4_euler" / "seed_0" / name))
        assert np.array_equal(ours, np.array(Image.open(tmp_path / "s" / name)))
        ours = np.array(Image.open(whole / "teacher" / "seed_1" / name))
        assert np.array_equal(ours, np.array(Image.open(tmp_path / "t" / name)))


@pytest.mark.parametrize("name", [name for name in BASES if name != "flux"])
def test_the_family_is_found_from_the_base(name, prompts, tmp_path):
    """The teacher's image is that of the plain pipeline; the student's is another."""
    run = make_student(name, tmp_path / "run")
    flags = ("--checkpoint", run, "--num_prompts", 1, *FEW, "--teacher_guidance", 2)
    assert draw(prompts, tmp_path / "out", *flags, base=BASES[name]) == 0
    drawn = pictures(tmp_path / "out")
    assert sorted(drawn) == [f"{way}/seed_0/{NAMES[0]}" for way in ("student_4_x0", "teacher")]
    pipeline = in_memory(DiffusionPipeline.from_pretrained(BASES[name]))
    pipeline.set_progress_bar_config(disable=True)
    length = {} if name == "sdxl" else {"max_sequence_length": T5_LENGTH}
    image = pipeline(
        PROMPTS[0], num_inference_steps=4, guidance_scale=2.0, height=32, width=32,
        generator=torch.Generator().manual_seed(0), **length,
    ).images[0]  # fmt: skip
    assert np.array_equal(drawn[f"teacher/seed_0/{NAMES[0]}"], np.array(image))
    assert not np.array_equal(*drawn.values())


def test_cps_has_a_folder_for_each_eta(run, prompts, tmp_path):
    flags = ("--checkpoint", run, "--no_teacher", "--num_prompts", 1)
    assert draw(prompts, tmp_path, *flags, "--samplers", "x0", "cps", "--eta", 0.3, 1, 1.0) == 0
    drawn = pictures(tmp_path)
    ways = ("student_4_cps_0.3", "student_4_cps_1", "student_4_x0")
    assert sorted(drawn) == [f"{way}/seed_0/{NAMES[0]}" for way in ways]
    apart = [np.abs(drawn[n].astype(int) - drawn[sorted(drawn)[2]]).max() for n in sorted(drawn)]
    assert apart[0] > 5 and apart[1] <= 1
    files = [tmp_path / way / "seed_0" / NAMES[0].replace(".png", ".json") for way in ways]
    assert [sidecar(file)["eta"] for file in files] == [0.3, 1, None]


def test_a_student_is_drawn_by_the_sampler_that_rewards_have_trained(run, prompts, tmp_path):
    trained = make_student("flux", tmp_path / "run")
    folder = find_student(trained).weights.parent
    write_card(folder, dataclasses.replace(read_card(folder), eta=0.7))
    flags = ("--no_teacher", "--num_prompts", 1)
    assert draw(prompts, tmp_path / "a", "--checkpoint", trained, *flags) == 0
    named = ("--checkpoint", run, "--samplers", "cps", "--eta", 0.7)
    assert draw(prompts, tmp_path / "b", *named, *flags) == 0
    own, same = pictures(tmp_path / "a"), pictures(tmp_path / "b")
    assert list(own) == list(same) == [f"student_4_cps_0.7/seed_0/{NAMES[0]}"]
    assert all(np.array_equal(own[name], same[name]) for name in own)
    assert draw(prompts, tmp_path / "c", "--checkpoint", trained, "--samplers", "x0", *flags) == 0
    assert list(pictures(tmp_path / "c")) == [f"student_4_x0/seed_0/{NAMES[0]}"]


def test_missing_and_damaged_images_are_made_again(run, prompts, tmp_path, capsys):
    flags = ("--checkpoint", run, "--seeds", 2, *FEW, "--batch_size", 2)
    assert draw(prompts, tmp_path, *flags) == 0
    first = pictures(tmp_path)
    (tmp_path / "teacher" / "seed_0" / NAMES[1]).unlink()
    cut = tmp_path / "student_4_x0" / "seed_1" / NAMES[2]
    cut.write_bytes(cut.read_bytes()[:-5])
    empty = tmp_path / "student_4_x0" / "seed_0" / NAMES[0]
    empty.write_bytes(b"")
    capsys.readouterr()
    assert draw(prompts, tmp_path, *flags) == 0
    said = capsys.readouterr().err
    assert "6 images in" in said and "teacher, 1 of them new" in said
    assert "student_4_x0, 2 of them new" in said and "2 damaged images are made again" in said
    again = pictures(tmp_path)
    assert again.keys() == first.keys()
    # one image at a time or two: matmuls round otherwise, by one grey level at most
    assert max(np.abs(again[n].astype(int) - first[n]).max() for n in first) <= 1


def test_nothing_is_loaded_when_nothing_is_missing(whole, run, prompts, monkeypatch):
    monkeypatch.setattr(drawing, "build_student", None)
    monkeypatch.setattr(Pipeline, "read", None)
    ways = ("--samplers", "x0", "euler", "--steps", 4, 1, "--seeds", 2)
    assert draw(prompts, whole, "--checkpoint", run, *ways, *FEW) == 0


def test_each_network_is_read_once(run, prompts, tmp_path, monkeypatch):
    """The pipeline is opened with the teacher in it; the student takes its place for two ways."""
    opened, built, build, whole = [], [], drawing.build_student, type(FLUX).open_pipeline

    def open_pipeline(family, base, network, dtype):
        opened.append(network)
        return whole(family, base, network, dtype)

    monkeypatch.setattr(type(FLUX), "open_pipeline", open_pipeline)
    monkeypatch.setattr(drawing, "build_student", lambda *args: built.append(1) or build(*args))
    flags = ("--checkpoint", run, "--samplers", "x0", "euler", *FEW, "--num_prompts", 1)
    assert draw(prompts, tmp_path, *flags) == 0
    assert opened == [None] and built == [1]


def test_other_settings_are_refused_by_name_before_anything_is_drawn(
    whole, run, prompts, tmp_path, capsys
):
    ways = ("--checkpoint", run, "--samplers", "x0", "euler", "--steps", 4, 1, "--seeds", 2)
    text = error_of(capsys, prompts, whole, *ways, *FEW, "--seed", 3, "--teacher_guidance", 2)
    assert "student_4_x0" in text and "seed 0, now 3" in text and "--overwrite" in text
    text = error_of(capsys, prompts, whole, *ways, "--teacher_steps", 5, "--teacher_guidance", 2)
    assert "teacher/seed_0" in text and "steps 4, now 5" in text and "guidance 3.5, now 2" in text
    before = sorted(whole.rglob("*"))
    new = [*ways[:6], 2, "--seeds", 2, *FEW, "--teacher_guidance", 2]
    assert "guidance" in error_of(capsys, prompts, whole, *new)
    assert sorted(whole.rglob("*")) == before


def test_a_teachers_guidance_that_its_pipeline_passes_over_is_refused(prompts, tmp_path, capsys):
    flags = ("--teacher_guidance", 0.5)
    said = error_of(capsys, prompts, tmp_path / "out", *flags, base=BASES["sd35_medium"])
    assert "--teacher_guidance 0.5: the pipeline guides above 1" in said
    assert not (tmp_path / "out").exists()


def test_images_of_other_prompts_are_not_left_among_ours(whole, run, prompts, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a red seven\na white zero\n")
    text = error_of(capsys, other, whole, "--checkpoint", run, "--seeds", 2, *FEW)
    assert "holds 2 images of other prompts, such as 00001_a-blue-two" in text


def test_images_of_other_seeds_are_not_left_among_ours(run, prompts, tmp_path, capsys):
    """--overwrite draws two of four seeds anew: `score` would count all four."""
    flags = ("--checkpoint", run, "--no_teacher", "--steps", 1, "--num_prompts", 1)
    assert draw(prompts, tmp_path, *flags, "--seeds", 4) == 0
    text = error_of(capsys, prompts, tmp_path, *flags, "--seeds", 2, "--overwrite")
    assert "student_1_x0/seed_2 holds images of another seed" in text
    shutil.rmtree(tmp_path / "student_1_x0" / "seed_2")
    shutil.rmtree(tmp_path / "student_1_x0" / "seed_3")
    assert draw(prompts, tmp_path, *flags, "--seeds", 2, "--overwrite") == 0


@pytest.mark.parametrize("anchors", [(1.0,), (1.0, 0.7)])
def test_a_student_is_drawn_in_as_many_steps_as_it_was_trained_for(anchors, prompts, tmp_path):
    run = make_student("flux", tmp_path / "run")
    card = dataclasses.replace(read_card(find_student(run).weights.parent), anchors=anchors)
    write_card(find_student(run).weights.parent, card)
    flags = ("--checkpoint", run, "--no_teacher", "--num_prompts", 1)
    assert draw(prompts, tmp_path / "out", *flags) == 0
    num = len(anchors)
    assert list(pictures(tmp_path / "out")) == [f"student_{num}_x0/seed_0/{NAMES[0]}"]
    (told,) = (tmp_path / "out").rglob("*.json")
    assert sidecar(told)["steps"] == num
    assert sidecar(told)["sigmas"] == pytest.approx(list(anchors), rel=1e-6)


def test_two_shards_are_one(whole, run, prompts, tmp_path, monkeypatch):
    ways = ("--checkpoint", run, "--samplers", "x0", "euler", "--steps", 4, 1, "--seeds", 2)
    assert draw(prompts, tmp_path, *ways, *FEW, "--shard", "0/2") == 0
    assert len(pictures(tmp_path)) == 15
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert draw(prompts, tmp_path, *ways, *FEW) == 0
    one, two = pictures(whole), pictures(tmp_path)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_ranges_and_chunks(run, prompts, tmp_path):
    """--start_idx and --num_prompts: a prompt keeps its number and seed."""
    flags = ("--checkpoint", run, "--no_teacher", "--name", "mine")
    assert draw(prompts, tmp_path, *flags, "--start_idx", 1, "--num_prompts", 1) == 0
    assert list(pictures(tmp_path)) == [f"mine_4_x0/seed_0/{NAMES[1]}"]
    assert draw(prompts, tmp_path, *flags) == 0
    assert list(pictures(tmp_path)) == [f"mine_4_x0/seed_0/{name}" for name in NAMES]


def test_ids_of_the_prompts_file_are_in_the_sidecars(run, tmp_path):
    rows = [{"image_id": 139, "caption": "a red seven"}, {"image_id": 285, "caption": "a two"}]
    (tmp_path / "coco.json").write_text(json.dumps(rows))
    flags = ("--checkpoint", run, "--no_teacher", "--steps", 1)
    assert draw(tmp_path / "coco.json", tmp_path / "out", *flags) == 0
    files = sorted((tmp_path / "out").rglob("*.json"))
    assert [(sidecar(f)["id"], sidecar(f)["prompt"]) for f in files] == [
        (139, "a red seven"),
        (285, "a two"),
    ]


def test_ctrl_c_keeps_finished_images(run, prompts, tmp_path, monkeypatch, capsys):
    save, saved = Image.Image.save, []

    def stop(image, file, **more):
        if len(saved) == 2:
            Path(file).write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(file)
        save(image, file, **more)

    monkeypatch.setattr(Image.Image, "save", stop)
    flags = ("--checkpoint", run, *FEW)
    assert draw(prompts, tmp_path, *flags) == 130
    assert "finished images are kept" in capsys.readouterr().err
    assert len(pictures(tmp_path)) == 2 and not list(tmp_path.rglob(".*"))
    monkeypatch.undo()
    assert draw(prompts, tmp_path, *flags) == 0
    assert len(pictures(tmp_path)) == 6


def test_a_full_disk_says_so(run, prompts, tmp_path, monkeypatch, capsys):
    def full(image, file, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    text = error_of(capsys, prompts, tmp_path, "--checkpoint", run, "--no_teacher")
    assert "No space left on device" in text and NAMES[0] in text and "images are kept" in text


def test_an_output_that_cannot_be_is_said_before_loading(run, prompts, tmp_path, capsys):
    flags = ("--checkpoint", run)
    text = error_of(capsys, prompts, prompts / "x" / "y", *flags)
    assert f"is under {prompts}, which is a file" in text
    with read_only(tmp_path / "disk") as folder:
        text = error_of(capsys, prompts, folder / "out", *flags)
    assert "out cannot be written: Read-only" in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--checkpoint", "RUN", "--steps", 3], "a student of 4 anchors samples in [1, 2, 4, 8]"),
        (["--checkpoint", "RUN", "--steps", 0], "argument --steps: 0 must be from 1 to"),
        (["--checkpoint", "RUN", "--samplers", "ddim"], "invalid choice: 'ddim'"),
        (["--checkpoint", "RUN", "--samplers", "x0", "cps"], "--eta is missing: cps takes one"),
        (["--checkpoint", "RUN", "--eta", 0.7], "--eta is of the sampler cps: name it among"),
        (
            ["--checkpoint", "RUN", "--samplers", "cps", "--eta", 0.7, 1.5],
            "argument --eta: 1.5 must be from 0 to 1",
        ),
        (["--checkpoint", "no"], "--checkpoint no does not exist"),
        (["--no_teacher"], "--no_teacher leaves nothing to draw without --checkpoint"),
        (["--ema"], "--ema is of a student"),
        (["--checkpoint", "RUN", "--name", "teacher"], "--name teacher does not name"),
        (["--checkpoint", "RUN", "--name", "a/b"], "--name a/b does not name"),
        (["--checkpoint", "RUN", "--seeds", 0], "argument --seeds: 0 must be from 1 to"),
        (["--checkpoint", "RUN", "--seed", -1], "argument --seed: -1 must be from 0 to"),
        (["--checkpoint", "RUN", "--start_idx", 3], "past the end of"),
        (["--checkpoint", "RUN", "--shard", "2/2"], "--shard 2/2 is not I/N"),
        (
            ["--checkpoint", "RUN", "--teacher_guidance", "inf"],
            "argument --teacher_guidance: inf must be",
        ),
        (["--checkpoint", "RUN", "--height", 31], "--height 31 is not a positive multiple"),
        (["--checkpoint", "RUN", "--layout", "geneval"], "has the tag None"),
        (["--checkpoint", "RUN", "--layout", "t2i_compbench"], "one file for each category"),
        (["--checkpoint", "RUN", "--stepz", 4], "unrecognized arguments: --stepz 4"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(flags, said, run, prompts, tmp_path, capsys):
    flags = [run if flag == "RUN" else flag for flag in flags]
    assert said in error_of(capsys, prompts, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_wrong_bases_and_prompts(run, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ("--checkpoint", run)
    assert "there is no such folder" in error_of(capsys, prompts, out, base=tmp_path / "no")
    assert "no model_index.json in it" in error_of(capsys, prompts, out, base=tmp_path)
    index = tmp_path / "model_index.json"
    for text, said in (("{", "names no pipeline"), ('{"_class_name": "Sana"}', "is a Sana; there")):
        index.write_text(text)
        assert said in error_of(capsys, prompts, out, base=tmp_path)
    index.write_text('{"_class_name": "StableDiffusion3Pipeline"}')
    text = error_of(capsys, prompts, out, base=tmp_path)
    assert "may be SD3.5 Medium or SD3.5 Large: it has no transformer/config.json" in text
    assert "student of family flux, not sdxl" in error_of(
        capsys, prompts, out, *flags, base=BASES["sdxl"]
    )
    assert "is not a file" in error_of(capsys, tmp_path / "no.txt", out, *flags)
    text = error_of(capsys, prompts, prompts, *flags)
    assert "--output_dir" in text and "is a file" in text


def test_help_and_wrong_flags_import_no_torch(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for flags, status in (["generate", "--help"], 0), (["table", "--help"], 0), (["no"], 2):
        line = [sys.executable, "-X", "importtime", "-m", "senseflow.evaluate", *flags]
        result = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert result.returncode == status, result.stderr
        assert " torch\n" not in result.stderr and " diffusers\n" not in result.stderr
        if status == 0:
            assert "example: python -m senseflow.evaluate" in result.stdout
