"""python -m senseflow.cache as a user types it, and training from what it makes."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from caches import config_of, contents, first, losses, make
from embedded import YAMLS
from ranks import on_ranks
from safetensors.torch import load_file
from statuses import status_of
from training_runs import rows, train

import senseflow.cache.run as caching
from senseflow.cache import index
from senseflow.cache.__main__ import main
from senseflow.common.files import alone_in, read_json
from senseflow.common.signals import StopRequest
from senseflow.config.config import load_config
from senseflow.config.recipes import RECIPES
from senseflow.data.cache_index import key_of
from senseflow.data.items import Position
from senseflow.engine.build import check_networks, prepare
from senseflow.engine.caches import wanted_keys
from senseflow.engine.inputs import Inputs, read_inputs, read_run
from senseflow.reconstruction_error.__main__ import main as reconstruction_error
from senseflow.tiny.pictures import write_dataset
from senseflow.weights.filling import whole

NUM = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A JSON data set of eight embedded pictures."""
    folder = tmp_path_factory.mktemp("images")
    write_dataset(folder, num=NUM, seed=0, num_prompts=2)
    return folder / "data.json"


@pytest.fixture(scope="module")
def flux(images, tmp_path_factory) -> Path:
    """The whole cache of the embedded FLUX teacher, three rows per file."""
    folder = tmp_path_factory.mktemp("cache") / "flux"
    assert make("flux_senseflow", images, folder, "--shard_rows", 3) == 0
    return folder


@pytest.fixture
def copied(flux, tmp_path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(flux, tmp_path / "cache")


def opened(config) -> Inputs:
    """What a configuration reads."""
    return read_inputs(config, RECIPES[config.recipe].family)


# ------------------------------------------------------------------------------- training from it


def without_encoders(config, folder: Path):
    """The same with a teacher and a CLIP whose text encoders have no weights."""
    teacher = shutil.copytree(config.paths.pretrained_model, folder / "pipeline")
    clip = shutil.copytree("assets/tiny/common/clip", folder / "clip")
    for file in [*teacher.glob("text_encoder*/*.safetensors"), *clip.glob("*.safetensors")]:
        file.unlink()
    paths = replace(config.paths, pretrained_model=str(teacher), clip=f"local-dir:{clip}")
    return replace(config, paths=paths)


@pytest.mark.parametrize("name", [
    "flux_senseflow",
    pytest.param("sd35_senseflow", marks=pytest.mark.long),
    pytest.param("sdxl_senseflow", marks=pytest.mark.long),
    pytest.param("sdxl_dmd2", marks=pytest.mark.long),
])  # fmt: skip
def test_losses_are_those_without_a_cache_and_no_encoder_has_weights(name, images, tmp_path):
    """To the bit with micro-batches of one, which the encoders see in both."""
    assert make(name, images, tmp_path / "cache") == 0
    one = ["train.batch_size=2", "train.grad_accumulation=2", "fake_score.ttur=2"]
    plain = config_of(name, images, *one)
    known = config_of(name, images, *one, f"paths.cache={tmp_path / 'cache'}")
    known = without_encoders(known, tmp_path)
    check_networks(read_run(known, RECIPES[name].family))
    mine, theirs = losses(known, tmp_path / "known", 3), losses(plain, tmp_path / "plain", 3)
    assert mine == theirs
    assert {"loss/dmd", "loss/fake", "loss/discriminator"} <= set().union(*theirs)


def test_larger_batches_agree_within_rounding(flux, images, tmp_path):
    """Kernels for several samples at once may add in another order."""
    plain = config_of("flux_senseflow", images, "train.batch_size=4", "fake_score.ttur=1")
    known = replace(plain, paths=replace(plain.paths, cache=str(flux)))
    mine, theirs = (losses(c, tmp_path / "run", 2) for c in (known, plain))
    for one, other in zip(mine, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_dmd2_reads_no_image_and_its_loop_is_whole(images, tmp_path):
    """Pictures, and encoders' weights, are gone; strips, drift and checkpoints are there."""
    own = shutil.copytree(images.parent, tmp_path / "data")
    assert make("sdxl_dmd2", own / "data.json", tmp_path / "cache") == 0
    config = config_of(
        "sdxl_dmd2", own / "data.json", f"paths.cache={tmp_path / 'cache'}",
        "train.batch_size=2", "train.iter_num=2", "train.save_interval=2", "train.log_interval=1",
        "log.sample_interval=1", "fake_score.ttur=1", "lr_scheduler.warmup_iterations=0",
        "lr_scheduler.decay_iterations=0",
    )  # fmt: skip
    config = without_encoders(config, tmp_path)
    shutil.rmtree(own / "images")
    run = prepare(read_run(config, RECIPES["sdxl_dmd2"].family), tmp_path / "run")
    encoders = [n for n in run.parts.adapter.pipeline.components if n.startswith("text_encoder")]
    assert encoders and all(getattr(run.parts.adapter.pipeline, n) is None for n in encoders)
    vae = run.parts.adapter.pipeline.vae
    vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the VAE's encoder is called"))
    with run.checkpoints:
        run.train(run.resume(), StopRequest(), show=False)
    assert (tmp_path / "run" / "samples" / "step_0000002.png").exists()
    assert "drift/mean" in rows(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "student" / "step_0000002").is_dir()


@pytest.mark.long
def test_two_ranks_with_workers_train_from_it_through_the_script(flux, images, tmp_path):
    """As one does without it: prompts, features and posteriors come from worker processes."""
    short = [f"paths.dataset={images}", "train.iter_num=2", "train.batch_size=2"]
    short += ["train.save_interval=2", "train.log_interval=1", "log.sample_interval=1"]
    short += ["lr_scheduler.warmup_iterations=0", "lr_scheduler.decay_iterations=0"]
    cached = [f"paths.cache={flux}", "data.num_workers=1"]
    train("flux_senseflow", tmp_path / "known", *short, *cached, ranks=2)
    train("flux_senseflow", tmp_path / "plain", *short)
    for mine, theirs in zip(rows(tmp_path / "known"), rows(tmp_path / "plain"), strict=True):
        for name in (n for n in theirs if n.startswith("loss/")):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6)


def test_the_reconstruction_error_is_measured_from_it_too(flux, images, tmp_path):
    line = [
        YAMLS["flux_senseflow"],
        "--num_samples",
        "2",
        "--num_times",
        "3",
        "--batch_size",
        "1",
    ]
    curves = []
    for name, override in (("plain", "paths.cache=null"), ("known", f"paths.cache={flux}")):
        words = [*line, "--output", tmp_path / name, f"paths.dataset={images}", override]
        assert reconstruction_error(list(map(str, words))) == 0
        curves.append(json.loads((tmp_path / name / "xi.json").read_text())["curves"])
    assert curves[0] == curves[1]


# -------------------------------------------------------------------------- what the command makes


def test_rows_are_the_encoders_own(flux, images):
    """Against one call of the adapter and the VAE per sample; SD3.5's null prompt is in no FLUX."""
    config = config_of("flux_senseflow", images)
    adapter = RECIPES["flux_senseflow"].family.load_adapter(
        opened(config).settings,
        torch.device("cpu"),
        whole,
    )
    inputs = opened(replace(config, paths=replace(config.paths, cache=str(flux))))
    for prompt in list(inputs.data.all_prompts())[::3]:
        mine, theirs = inputs.cache.prompts.conditioning(prompt), adapter.encode_prompts([prompt])
        assert mine.prompt_embeds.dtype == theirs.prompt_embeds.dtype
        assert torch.equal(mine.prompt_embeds, theirs.prompt_embeds)
        assert torch.equal(mine.pooled, theirs.pooled)
    index = read_json(flux / "index.json")
    assert sum(len(s["keys"]) for s in index["parts"]["latents"]["shards"]) == NUM * 32
    for file in flux.iterdir():
        assert file.stat().st_mode & 0o044 == 0o044 & ~os.umask(os.umask(0o022)), file


def test_the_null_prompt_of_sd35_is_among_its_prompts(images):
    for name, more in (("sd35_senseflow", 1), ("flux_senseflow", 0), ("sdxl_dmd2", 0)):
        inputs = opened(config_of(name, images))
        keys = wanted_keys("prompts", inputs.config, inputs.family, inputs.data).tolist()
        assert len(keys) == NUM + more and (key_of("").encode() in keys) == bool(more)


def test_interrupted_and_resumed_it_is_the_uninterrupted_one(
    flux, images, tmp_path, monkeypatch, capsys
):
    written, write = [], caching.write

    def stopped(folder, part, shard, encode, bar):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(shard.file)
        return write(folder, part, shard, encode, bar)

    monkeypatch.setattr(caching, "write", stopped)
    assert make("flux_senseflow", images, tmp_path / "c", "--shard_rows", 3) == 130
    assert "finished files are kept" in capsys.readouterr().err
    assert {f.name for f in (tmp_path / "c").iterdir()} == {"index.json", *written}
    config = config_of("flux_senseflow", images, f"paths.cache={tmp_path / 'c'}")
    with pytest.raises(ValueError, match=r"clip-000001.* is not there .*complete it: "):
        opened(config)
    written.clear()
    monkeypatch.setattr(caching, "write", write)
    assert make("flux_senseflow", images, tmp_path / "c") == 0
    assert contents(tmp_path / "c") == contents(flux)


def test_a_larger_data_set_adds_what_is_missing(flux, images, tmp_path, capsys):
    fewer, cache = first(images, 5, tmp_path / "five.json"), tmp_path / "c"
    assert make("flux_senseflow", fewer, cache, "--shard_rows", 3) == 0
    before = contents(cache)
    config = config_of("flux_senseflow", images, f"paths.cache={cache}")
    command = f"`python -m senseflow.cache CONFIG --output {cache}`"
    with pytest.raises(ValueError, match=rf"\(prompts\) lacks 3 of the 8 .*complete it: {command}"):
        opened(config)
    assert make("flux_senseflow", images, cache, "--shard_rows", 3) == 0
    after = contents(cache)
    kept = {name: held for name, held in before.items() if name != "index.json"}
    assert {name: after[name] for name in kept} == kept
    assert len(after) == len(before) + 3  # the three rows that are missing of each part
    mine, theirs = (
        opened(config),
        opened(config_of("flux_senseflow", images, f"paths.cache={flux}")),
    )
    for prompt in json.loads(images.read_text())["prompts"]:
        one, other = (i.cache.prompts.conditioning(prompt) for i in (mine, theirs))
        assert torch.equal(one.prompt_embeds, other.prompt_embeds)
    opened(config_of("flux_senseflow", fewer, f"paths.cache={cache}"))  # a part of it is enough


def _cache_on_a_rank(rank: int, images: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    assert make("flux_senseflow", images, folder, "--shard_rows", 3) == 0


@pytest.mark.long
def test_two_ranks_make_what_one_does(flux, images, tmp_path):
    on_ranks(2, _cache_on_a_rank, images, tmp_path / "c")
    assert contents(tmp_path / "c") == contents(flux)


def test_a_full_disk_is_one_line(images, tmp_path, monkeypatch, capsys):
    def full(file, *_):
        file.write_bytes(b"the beginning")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching, "write_safetensors", full)
    assert make("flux_senseflow", images, tmp_path / "c", "--latents") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(r"writing .*latents-000000.safetensors failed: .*No space left .*again", line)
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["index.json"]


def test_a_second_command_in_one_folder_is_refused(copied, images, capsys):
    before = contents(copied)
    with alone_in(copied):
        assert make("flux_senseflow", images, copied) == 2
    said = f"error: --output {copied} is being written by another process: wait for it, or name"
    assert said in capsys.readouterr().err and contents(copied) == before


def test_a_disk_too_small_is_said_before_anything_is_encoded(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert make("flux_senseflow", images, tmp_path / "c", "--latents") == 2
    assert " KiB are to be written and 1000 B are free there" in capsys.readouterr().err


def test_files_of_something_else_are_left_alone(copied, images, tmp_path, capsys):
    theirs = tmp_path / "pictures"
    theirs.mkdir()
    (theirs / "a.safetensors.partial").write_bytes(b"a download of theirs")
    (theirs / "b.png").write_bytes(b"")
    assert make("flux_senseflow", images, theirs, "--prompts") == 2
    assert "has other files in it, such as b.png: name a new folder" in capsys.readouterr().err
    assert sorted(f.name for f in theirs.iterdir()) == ["a.safetensors.partial", "b.png"]
    for name in ("a.safetensors.partial", "prompts-000000.safetensors.partial"):
        (copied / name).write_bytes(b"")
    assert make("flux_senseflow", images, copied, "--prompts") == 0
    assert [f.name for f in copied.glob("*.partial")] == ["a.safetensors.partial"]


def test_rows_that_no_memory_holds_are_refused(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(index, "MOST_BYTES", 20_000)
    assert make("flux_senseflow", images, tmp_path / "c", "--latents", "--shard_rows", 10**9) == 2
    assert "--shard_rows 1000000000: 32.0 KiB of latents would be held" in capsys.readouterr().err


def test_a_caption_that_no_tokenizer_takes_is_passed_over(images, tmp_path):
    own = shutil.copytree(images.parent, tmp_path / "data") / "data.json"
    tree = json.loads(own.read_text())
    tree["prompts"][0] = "half of an emoji \ud83d"
    own.write_text(json.dumps(tree))
    assert make("sdxl_dmd2", own, tmp_path / "c") == 0
    inputs = opened(config_of("sdxl_dmd2", own, f"paths.cache={tmp_path / 'c'}"))
    item = inputs.cache.samples(inputs.data, see_images=False)[Position(1, 0, 0)]
    assert item.prompt == tree["prompts"][1] and "half of a character" in item.unreadable[0][1]


def test_images_that_cannot_be_read_are_passed_over_and_tried_again(
    images, tmp_path, caplog, capsys
):
    own = shutil.copytree(images.parent, tmp_path / "data")
    broken = sorted((own / "images").iterdir())[2]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    data, cache = own / "data.json", tmp_path / "c"
    assert make("sdxl_dmd2", data, cache, "--latents", "--shard_rows", 4) == 0
    assert "1 images could not be read" in caplog.text
    config = config_of("sdxl_dmd2", data, f"paths.cache={cache}")
    inputs = opened(config)
    samples = inputs.cache.samples(inputs.data, see_images=False)
    item = samples[Position(1, 0, 2)]
    assert item.unreadable[0][0] == str(broken) and item.path == "images/000003.png"
    assert item.image is None and item.encoded.posterior.mean.abs().max() > 0
    broken.write_bytes(whole)
    assert make("sdxl_dmd2", data, cache, "--latents", "--shard_rows", 4) == 0
    assert "4 images to encode, 4 are there" in caplog.text
    assert load_file(cache / "latents-000000.safetensors")["readable"].all()
    broken.write_bytes(whole[:50])
    words = ["--latents", "data.max_unreadable=0"]
    assert make("sdxl_dmd2", data, tmp_path / "d", *words) == 2
    assert "1 images could not be read, data.max_unreadable allows 0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.max_sequence_length=8"],
         r"\(prompts\) is of another run: data.max_sequence_length: 12 in the cache, 8 here\. Make "
         r"one in another DIR: `python -m senseflow.cache CONFIG --output DIR`"),
        (["precision.compute=bfloat16"], "precision.compute: float32 in the cache, bfloat16 here"),
        (["train.resolution=64"], r"\(latents\).* train.resolution: \[32, 32\] in .*\[64, 64\]"),
        (["data.crop=random"], "data.crop: center in the cache, random here"),
        (["precision.vae=bfloat16"], "precision.vae: float32 in the cache"),
        (["paths.clip=ViT-B-32", "paths.clip_weights=openai"], "paths.clip: local-dir in "),
    ],
)  # fmt: skip
def test_a_cache_of_other_settings_is_refused(overrides, message, flux, images):
    config = config_of("flux_senseflow", images, f"paths.cache={flux}", *overrides)
    with pytest.raises(ValueError, match=message):
        opened(config)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("text_encoder_2/model.safetensors", "text_encoder_2's weights: 13fa589c8234 in the cache"),
        ("tokenizer_2/tokenizer.json", "tokenizer_2: "),
        ("text_encoder/config.json", "text_encoder's settings: "),
        ("vae/diffusion_pytorch_model.safetensors", r"\(latents\).*vae's weights: "),
    ],
)
def test_another_encoders_cache_is_refused(file, message, flux, images, tmp_path, capsys):
    teacher = shutil.copytree("assets/tiny/flux/pipeline", tmp_path / "teacher")
    held = bytearray((teacher / file).read_bytes())
    held[-2:] = b" }" if file.endswith("json") else bytes([held[-2] ^ 1, held[-1]])
    (teacher / file).write_bytes(held)
    override = f"paths.pretrained_model={teacher}"
    config = config_of("flux_senseflow", images, f"paths.cache={flux}", override)
    with pytest.raises(ValueError, match=message):
        read_run(config, RECIPES["flux_senseflow"].family)
    if "encoder_2" in file:  # the command does not mix them either
        assert make("flux_senseflow", images, flux, override) == 2
        assert "has prompts of other encoders or settings" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["short", "gone"])
def test_a_damaged_file_is_named_and_made_again(how, copied, flux, images):
    file = copied / "prompts-000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10]) if how == "short" else file.unlink()
    config = config_of("flux_senseflow", images, f"paths.cache={copied}")
    said = f"has {len(whole) - 10} bytes, not {len(whole)}" if how == "short" else "is not there"
    with pytest.raises(ValueError, match=rf"prompts-000001.safetensors {said}.*1 of 3 files"):
        opened(config)
    assert make("flux_senseflow", images, copied, "--prompts") == 0
    assert contents(copied) == contents(flux)


def test_a_file_cut_short_under_a_run_is_an_error(copied, images):
    cache = opened(config_of("flux_senseflow", images, f"paths.cache={copied}")).cache
    for file in copied.glob("prompts*"):
        file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"prompts-00000\d.safetensors is damaged: .* bytes in place"
    ):
        cache.prompts.conditioning(json.loads(images.read_text())["prompts"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tree: tree["parts"].pop("clip"),
            "has no CLIP features, which adversarial.kind vfm",
        ),
        (lambda tree: tree["parts"].clear(), "holds nothing for this run"),
        (lambda tree: tree.update(format=2), "format 2; this version reads format 1"),
        (lambda tree: tree["parts"]["prompts"].pop("fields"), "is not the index of a cache"),
    ],
)
def test_an_index_that_does_not_do_is_refused(change, message, copied, images):
    tree = json.loads((copied / "index.json").read_text())
    change(tree)
    (copied / "index.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=message):
        opened(config_of("flux_senseflow", images, f"paths.cache={copied}"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml", "--output", "x"], "config file not found: nowhere.yaml"),
        (["CONFIG"], "the following arguments are required: --output"),
        (["CONFIG", "--output", "setup.py"], "--output setup.py is a file"),
        (["CONFIG", "--output", "x", "--prompts", "--latents"], "one of them, or neither"),
        (
            ["CONFIG", "--output", "x", "--shard_rows", "0"],
            "argument --shard_rows: 0 must be from 1",
        ),
        (["--output", "x"], "CONFIG is missing"),
        (["CONFIG", "--output", "docs"], "--output docs has other files in it, such as "),
        (["CONFIG", "--output", "x", "paths.cahce=y"], "nearest valid key is paths.cache"),
        (["CONFIG", "--output", "x", "paths.dataset=no.json"], "data set no.json not found"),
        (["CONFIG", "--output", "x", "DATA", "data.crop=random"], "data.crop random: an image has"),
    ],
)
def test_wrong_input_is_one_line(words, message, images, capsys):
    known = {"CONFIG": YAMLS["flux_senseflow"], "DATA": f"paths.dataset={images}"}
    assert status_of(main, [known.get(word, word) for word in words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_cache_that_is_none_is_refused(images, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"is not a cache: it has no index.json"):
            opened(config_of("flux_senseflow", images, f"paths.cache={folder}"))


def test_every_yaml_has_the_key():
    for file in Path("configs").glob("*/*.yaml"):
        needed = "/path/to/cache" if file.stem.endswith(("_24gb", "_40gb")) else None
        said = f"\n  cache: {needed or 'null'} "
        assert said in file.read_text() and load_config(file).paths.cache == needed


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom senseflow.cache.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--shard_rows" in result.stdout
