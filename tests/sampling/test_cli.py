"""The inference command line as a user types it, on a tiny pipeline."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from command_line import PROMPTS, ROOT, only_picture, pictures, prompt_flags, sidecars
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from flux_pipeline import UNIT, transformer
from PIL import Image
from python import PYTHON

from senseflow.sampling import Drawing, load_student, model, sample
from senseflow.teachers.flux.family import FLUX
from senseflow.weights.card import StudentCard, write_card
from senseflow.weights.fingerprint import base_fingerprint

SCRIPT = "scripts_flux/test_flux_senseflow.py"
ANCHORS = (1.0, 0.9045, 0.7595, 0.5128)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    return transformer(guidance_embeds=False)


@pytest.fixture(scope="module")
def student(network, flux_folder, tmp_path_factory) -> Path:
    """A run folder with one exported student."""
    run = tmp_path_factory.mktemp("run")
    folder = run / "student" / "step_0000020"
    network.save_pretrained(folder)
    fingerprint = base_fingerprint(flux_folder / "transformer")
    write_card(folder, StudentCard("flux", ANCHORS, 24, 32, None, 12, "pipeline", fingerprint, 20))
    return run


def call(flux_folder: Path, *flags: object) -> int:
    """The script's main in this process."""
    return command_line.call(FLUX, flux_folder, *flags)


def error_of(capsys, flux_folder: Path, *flags: object) -> str:
    """The one line of an exit with status 2."""
    return command_line.error_of(capsys, FLUX, flux_folder, *flags)


def stock_images(flux_folder, network, seeds, stochastic: bool) -> list[np.ndarray]:
    """Stock pipeline and scheduler at batch 1, after torch.manual_seed and without generators."""
    pipeline = FluxPipeline.from_pretrained(flux_folder, transformer=network)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    images = []
    for seed, prompt in zip(seeds, PROMPTS, strict=True):
        torch.manual_seed(seed)
        call = dict(height=24, width=32, sigmas=list(ANCHORS), max_sequence_length=12)
        images.append(np.array(pipeline(prompt, **call).images[0]))
    return images


@pytest.mark.parametrize("sampler", ["x0", "euler"])
@pytest.mark.parametrize("batch", [1, 3])
def test_images_equal_the_stock_pipelines(sampler, batch, flux_folder, network, student, tmp_path):
    """Bit for bit one at a time; in a batch to one grey level, as matmuls round otherwise."""
    flags = ["--checkpoint", student, "--output_dir", tmp_path, "--seed", 5, "--batch_size", batch]
    assert call(flux_folder, *flags, "--sampler", sampler, *prompt_flags()) == 0
    ours = list(pictures(tmp_path).values())
    theirs = stock_images(flux_folder, network, [5, 6, 7], stochastic=sampler == "x0")
    assert len({image.tobytes() for image in ours}) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a.astype(int) - b).max() <= (batch > 1)


def test_the_four_default_steps_are_the_plain_pipelines_own(flux_folder, network, tmp_path):
    """Without a card: FluxPipeline with num_inference_steps=4 and its own scheduler."""
    network.save_pretrained(tmp_path / "plain")
    flags = ["--checkpoint", tmp_path / "plain", "--output_dir", tmp_path / "out"]
    size = ["--height", 32, "--width", 32]
    assert call(flux_folder, *flags, *size, "--prompt", PROMPTS[0], "--sampler", "euler") == 0
    pipeline = FluxPipeline.from_pretrained(flux_folder, transformer=network)
    torch.manual_seed(0)
    image = pipeline(
        PROMPTS[0], height=32, width=32, num_inference_steps=4, max_sequence_length=16
    ).images[0]
    assert np.array_equal(only_picture(tmp_path / "out"), np.array(image))


def test_card_gives_size_anchors_and_t5_length_at_other_sizes_too(flux_folder, student, tmp_path):
    flags = ["--checkpoint", student, "--prompt", PROMPTS[0]]
    assert call(flux_folder, *flags, "--output_dir", tmp_path / "a") == 0
    assert call(flux_folder, *flags, "--output_dir", tmp_path / "b", "--height", 48) == 0
    own, other = sidecars(tmp_path / "a")[0], sidecars(tmp_path / "b")[0]
    assert (own["height"], own["width"], other["height"]) == (24, 32, 48)
    assert own["sigmas"] == other["sigmas"] == list(ANCHORS)
    assert own["max_sequence_length"] == 12 and own["iteration"] == 20 and own["guidance"] is None
    assert own["seed"] == 0 and own["prompt"] == PROMPTS[0] and own["versions"]["torch"]
    assert own["checkpoint"].endswith("student/step_0000020/diffusion_pytorch_model.safetensors")
    assert only_picture(tmp_path / "b").shape == (48, 32, 3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--steps", 1], [1.0]),
        (["--steps", 2], [1.0, 0.7595]),
        (["--steps", 2, "--two_steps", "first"], [1.0, 0.9045]),
    ],
)
def test_fewer_steps(flags, expected, flux_folder, student, tmp_path):
    flags = [*flags, "--checkpoint", student, "--output_dir", tmp_path, "--prompt", "x"]
    assert call(flux_folder, *flags) == 0
    assert sidecars(tmp_path)[0]["sigmas"] == expected


def test_the_readmes_command_as_typed(flux_folder, network, tmp_path):
    """The seed README's line with a .pth, from the repository's root, with its defaults."""
    torch.save({"model": network.state_dict()}, tmp_path / "senseflow_checkpoint.pth")
    line = [PYTHON, SCRIPT, "--flux_ckpt", flux_folder]
    line += ["--checkpoint", tmp_path / "senseflow_checkpoint.pth"]
    line += ["--output_dir", tmp_path / "outputs", "--num_prompts", "4", "--start_idx", "2"]
    line += ["--height", "16", "--width", "16"]  # the default is 1024 x 1024
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = sorted(f.name for f in (tmp_path / "outputs").iterdir())
    assert [n[:6] for n in names if n.endswith(".png")] == [f"{i:05d}_" for i in range(2, 6)] + [
        "grid.p"
    ]
    assert "transformer/config.json with guidance_embeds false" in result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    ours = [line for line in lines if line.startswith("warning: 4 of 4 prompts are longer")]
    assert len(ours) == 1  # the toy encoders read less than real ones
    noise = ("Warning", "warning", "deprecat", "Loading", "truncated")
    assert not [line for line in lines if line not in ours and any(word in line for word in noise)]


def test_help_imports_neither_torch_nor_diffusers():
    line = [sys.executable, "-X", "importtime", SCRIPT, "--help"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--dit_config" in result.stdout and "example" in result.stdout
    assert " torch" not in result.stderr and " diffusers" not in result.stderr


def test_an_explicit_config_wins(flux_folder, student, tmp_path, capsys):
    config = tmp_path / "teacher.json"
    shutil.copy(flux_folder / "transformer" / "config.json", config)  # with guidance embedding
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out"]
    text = error_of(capsys, flux_folder, *flags, "--dit_config", config)
    assert "4 missing (time_text_embed.guidance_embedder" in text and "teacher.json" in text


def test_the_repositorys_config_is_the_last_resort(flux_folder, network, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(flux_folder, base)
    shutil.rmtree(base / "transformer")
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    flags = ["--checkpoint", tmp_path / "bare.pth", "--output_dir", tmp_path / "out"]
    text = error_of(capsys, base, *flags, "--height", 16, "--width", 16)
    assert "exp_flux/flux-wo-guidance-embed/transformer/config.json" in text and "missing" in text


def test_existing_images_are_skipped_overwritten_or_refused(flux_folder, student, tmp_path, capsys):
    flags = ["--checkpoint", student, "--output_dir", tmp_path, *prompt_flags()]
    assert call(flux_folder, *flags) == 0
    first = pictures(tmp_path)
    names = list(first)
    (tmp_path / names[1]).unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / names[0])
    capsys.readouterr()
    assert call(flux_folder, *flags) == 0
    assert "3 images" in (said := capsys.readouterr().err) and "1 of them new" in said
    assert pictures(tmp_path)[names[0]].shape == (8, 8, 3)
    assert np.array_equal(pictures(tmp_path)[names[1]], first[names[1]])
    text = error_of(capsys, flux_folder, *flags, "--steps", 8, "--seed", 3)
    assert "seed 0, now 3" in text and "steps 4, now 8" in text and "--overwrite" in text
    assert call(flux_folder, *flags, "--overwrite") == 0
    again = pictures(tmp_path)
    assert all(np.array_equal(again[name], first[name]) for name in names)


def test_shards_make_the_same_images(flux_folder, student, tmp_path, monkeypatch):
    flags = ["--checkpoint", student, *prompt_flags(), "--output_dir"]
    assert call(flux_folder, *flags, tmp_path / "whole") == 0
    assert call(flux_folder, *flags, tmp_path / "parts", "--shard", "0/2") == 0
    assert len(pictures(tmp_path / "parts")) == 2
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(flux_folder, *flags, tmp_path / "parts") == 0
    whole, parts = pictures(tmp_path / "whole"), pictures(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert {f.name for f in (tmp_path / "parts").glob("grid*")} == {
        "grid_0of2.png",
        "grid_1of2.png",
    }


@pytest.mark.parametrize(
    ("words", "stochastic"),
    [
        ([], False),
        (["--sampler", "x0"], True),
        (["--sampler", "cps", "--eta", 0], False),
        (["--sampler", "cps", "--eta", 1], True),
    ],
)
def test_teacher_mode_is_the_base_itself(words, stochastic, flux_folder, tmp_path):
    flags = ["--teacher", "--steps", 6, "--guidance", 2, "--height", 16, "--width", 24]
    flags += words
    assert call(flux_folder, *flags, "--prompt", PROMPTS[0], "--output_dir", tmp_path) == 0
    pipeline = FluxPipeline.from_pretrained(flux_folder)
    pipeline.scheduler.register_to_config(stochastic_sampling=stochastic)
    torch.manual_seed(0)
    image = pipeline(
        PROMPTS[0], height=16, width=24, num_inference_steps=6, guidance_scale=2.0,
        max_sequence_length=16,
    ).images[0]  # fmt: skip
    apart = np.abs(only_picture(tmp_path).astype(int) - np.array(image)).max()
    assert apart <= ("cps" in words)
    record = sidecars(tmp_path)[0]
    assert record["guidance"] == 2 and record["checkpoint"] is None and len(record["sigmas"]) == 6
    assert call(flux_folder, *flags, "--prompt", PROMPTS[0], "--output_dir", tmp_path) == 0


def test_the_sidecar_has_the_eta_and_another_is_refused(flux_folder, student, tmp_path, capsys):
    flags = ["--checkpoint", student, "--prompt", PROMPTS[0], "--output_dir", tmp_path / "out"]
    flags += ["--sampler", "cps", "--eta"]
    assert call(flux_folder, *flags, 0.7) == 0
    (made,) = sidecars(tmp_path / "out")
    assert (made["sampler"], made["eta"], made["sigmas"]) == ("cps", 0.7, list(ANCHORS))
    assert "made with other settings (eta 0.7, now 0.3)" in error_of(
        capsys, flux_folder, *flags, 0.3
    )
    (ours,) = sample(
        load_student(flux_folder, student), PROMPTS[0], Drawing(sampler="cps", eta=0.7)
    )
    assert np.array_equal(np.array(ours), only_picture(tmp_path / "out"))


def test_another_base_is_warned_of(flux_folder, student, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(flux_folder, base)
    transformer().save_pretrained(base / "transformer")
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out", "--prompt", "x"]
    capsys.readouterr()
    assert call(base, *flags) == 0
    assert "distilled from another pipeline" in capsys.readouterr().err
    assert call(flux_folder, *flags, "--overwrite") == 0
    assert "distilled from" not in capsys.readouterr().err


def test_an_interrupt_leaves_no_half_image(flux_folder, student, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    flags = ["--checkpoint", student, "--output_dir", tmp_path, *prompt_flags()]
    assert call(flux_folder, *flags) == 130
    assert "go" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))


def test_nothing_is_loaded_when_nothing_is_missing(flux_folder, student, tmp_path, monkeypatch):
    flags = ["--checkpoint", student, "--output_dir", tmp_path, "--prompt", "x"]
    assert call(flux_folder, *flags) == 0
    monkeypatch.setattr(model, "build_student", None)
    assert call(flux_folder, *flags) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--checkpoint is missing"),
        (["--checkpoint", "nowhere"], "--checkpoint nowhere does not exist"),
        (["--checkpoint", SCRIPT], "not a weights file; it may be"),
        (["--teacher", "--checkpoint", "RUN"], "leave out --checkpoint"),
        (["--checkpoint", "RUN", "--prompts_file", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--checkpoint", "RUN", "--prompts_file", "EMPTY"], "holds no prompts"),
        (["--checkpoint", "RUN", "--prompt", "a", "--prompts_file", "EMPTY"], "exclude each other"),
        (["--checkpoint", "RUN", "--prompt", " "], "--prompt is empty"),
        (["--checkpoint", "RUN", "--start_idx", 23], "--start_idx 23 is past the end"),
        (["--checkpoint", "RUN", "--start_idx", -1], "argument --start_idx: -1 must be from 0"),
        (["--checkpoint", "RUN", "--num_prompts", 0], "argument --num_prompts: 0 must be from 1"),
        (["--checkpoint", "RUN", "--batch_size", 0], "argument --batch_size: 0 must be from 1"),
        (["--checkpoint", "RUN", "--height", 30], "--height 30 is not a positive multiple of 4"),
        (["--checkpoint", "RUN", "--width", 0], "argument --width: 0 must be from 1 to 65535"),
        (["--checkpoint", "RUN", "--width", -4], "argument --width: -4 must be from 1 to"),
        (["--checkpoint", "RUN", "--steps", 3], "--steps 3: a student of 4 anchors samples in"),
        (
            ["--checkpoint", "RUN", "--steps", "four"],
            "argument --steps: 'four' is not a whole number",
        ),
        (["--checkpoint", "RUN", "--dtype", "fp8"], "argument --dtype: invalid choice"),
        (["--checkpoint", "RUN", "--device", "toaster"], "--device toaster is not a device"),
        (["--checkpoint", "RUN", "--device", "cuda:99"], "--device cuda:99: this machine has"),
        (["--checkpoint", "RUN", "--device", "cpu", "--offload"], "it needs a GPU"),
        (["--checkpoint", "RUN", "--guidance", 3], "--guidance 3: this student takes no guidance"),
        (["--checkpoint", "RUN", "--sampler", "cps"], "--eta is missing: cps takes one from 0"),
        (["--checkpoint", "RUN", "--eta", 0.5], "--eta 0.5 is of the sampler cps: name it"),
        (
            ["--checkpoint", "RUN", "--sampler", "cps", "--eta", 1.5],
            "argument --eta: 1.5 must be from 0 to 1",
        ),
        (["--teacher", "--guidance", "nan"], "argument --guidance: nan must be from 0 to 100"),
        (
            ["--checkpoint", "RUN", "--sigmas", 1, 0.8],
            "--sigmas 0.8 is none of the trained anchors",
        ),
        (
            ["--checkpoint", "RUN", "--sigmas", 1, "--steps", 1],
            "--sigmas 1 and steps 1 exclude each other",
        ),
        (["--teacher", "--sigmas", 1], "--sigmas and --teacher exclude each other"),
        (["--checkpoint", "RUN", "--shard", "2/2"], "--shard 2/2 is not I/N"),
        (["--checkpoint", "RUN", "--dit_config", "no.json"], "--dit_config no.json is not a file"),
        (["--checkpoint", "RUN", "--lora", "no"], "--lora no does not exist"),
        (["--checkpoint", "RUN", "--max_sequence_length", 600], "takes 512 tokens of a prompt"),
        (["--checkpoint", "RUN", "--output_dir", SCRIPT], "is a file"),
        (["--checkpoint", "RUN", "--stepz", 4], "unrecognized arguments: --stepz 4"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    flags, said, flux_folder, student, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "empty.txt").write_text("\n  \n")
    names = {"RUN": student, "EMPTY": tmp_path / "empty.txt"}
    flags = [names.get(flag, flag) for flag in flags]
    if "--output_dir" not in flags:
        flags += ["--output_dir", tmp_path / "out"]
    assert said in error_of(capsys, flux_folder, *flags)
    assert not (tmp_path / "out").exists()


def test_wrong_bases(flux_folder, student, tmp_path, capsys):
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out"]
    assert "there is no such folder" in error_of(capsys, tmp_path / "no", *flags)
    assert "no model_index.json in it" in error_of(capsys, tmp_path, *flags)
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    assert "is a SanaPipeline; FLUX.1-dev is" in error_of(capsys, tmp_path, *flags)
    base = tmp_path / "base"
    shutil.copytree(flux_folder, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert "diffusion_pytorch_model" in error_of(capsys, base, *flags)


def test_prompt_files_and_names(flux_folder, student, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffdrei grüne Äpfel\n\n一只红色的猫\n!?\n" + "long " * 90, encoding="utf-8")
    flags = ["--checkpoint", student, "--output_dir", tmp_path / "out", "--prompts_file", file]
    assert call(flux_folder, *flags) == 0
    names = list(pictures(tmp_path / "out"))
    assert names[:3] == ["00000_drei-grüne-äpfel.png", "00001_一只红色的猫.png", "00002_image.png"]
    assert len(names) == 4 and len(os.fsencode(names[3])) < 100
    assert [s["seed"] for s in sidecars(tmp_path / "out")] == [0, 1, 2, 3]


def test_a_table_is_drawn_by_its_column_and_the_share_of_it_that_is_drawn_is_said(
    flux_folder, student, tmp_path, capsys, monkeypatch
):
    """As DrawBench is published, under a name that does not say what it is."""
    file = tmp_path / "drawbench.txt"
    file.write_text('Prompts,Category\n"A red car, parked.",Colors\nA black cat,Colors\nx,y\n')
    monkeypatch.setattr("senseflow.sampling.cli.NUM_PROMPTS", 2)  # for the 23 of the README
    flags = ["--checkpoint", student, "--steps", 1, "--prompts_file", file, "--output_dir"]
    assert call(flux_folder, *flags, tmp_path / "two") == 0
    assert [s["prompt"] for s in sidecars(tmp_path / "two")] == [
        "A red car, parked.",
        "A black cat",
    ]
    said = capsys.readouterr().err
    assert f"3 prompts from column 'Prompts' of {file}\n2 of the 3 are drawn" in said
    assert call(flux_folder, *flags, tmp_path / "three", "--num_prompts", 3) == 0
    assert len(sidecars(tmp_path / "three")) == 3 and "are drawn" not in capsys.readouterr().err
    file.write_text("A red car\tColors\nA black cat\tColors\n")
    assert "has a tab in it" in error_of(capsys, flux_folder, *flags, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_test_prompts_are_23():
    prompts = (ROOT / "senseflow_test_prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) == 23 and all(p.strip() for p in prompts)


def test_the_multiple_is_the_vae_factor_times_two(flux_folder):
    assert FLUX.sides(flux_folder, None).multiple == UNIT
