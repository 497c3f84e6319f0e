"""Two ranks under torchrun measure what one does."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import PROMPTS, write_seeds
from PIL import Image
from python import PYTHON
from ranks import on_ranks
from torch import nn

from senseflow.distill.scorers.metric import Judge
from senseflow.engine.share import Share
from senseflow.evaluate.folders import read_folder
from senseflow.evaluate.measure import Desk, measure_distance, measure_diversity, measure_mean

ROOT = Path(__file__).resolve().parents[2]
TINY_CLIP = ROOT / "assets/tiny/common/clip"


def pixels(picture) -> torch.Tensor:
    return torch.tensor(list(picture.resize((2, 2)).getdata())).double()


def score_of(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return batch.mean((1, 2)) + torch.tensor([float(len(prompt)) for prompt in prompts])


def measure_all(student, teacher, share) -> list[float]:
    """A metric of each kind, on features that need no model."""
    desk = Desk(share, batch_size=2, threads=1)
    images, reference = read_folder(student), read_folder(teacher)
    features = Judge("", pixels, lambda p, prompts: p.flatten(1)[:, :3])
    distance = measure_distance("fid_t", features, images, reference, desk)
    mean = measure_mean("clip", Judge("", pixels, score_of), images, desk)
    pairs = Judge("", pixels, lambda p, prompts: p.std(0).flatten())
    diversity = measure_diversity("diversity", pairs, images, desk)
    return [m["value"] for m in (distance, mean, diversity)] + [mean["standard_error"]]


def test_the_standard_error_is_that_of_means_per_prompt(tmp_path):
    student = write_seeds(tmp_path / "student", 3, PROMPTS)
    _, mean, _, error = measure_all(student, student, Share())
    sets = [sorted((student / f"seed_{s}").glob("0*.png")) for s in range(3)]
    of_images = [[pixels(Image.open(file)).mean().item() for file in files] for files in sets]
    scores = np.array(of_images) + [len(prompt) for prompt in PROMPTS]
    of_prompts = scores.mean(0)
    assert mean == pytest.approx(of_prompts.mean(), rel=1e-12)
    assert error == pytest.approx(of_prompts.std(ddof=1) / 5**0.5, rel=1e-12)


def check_two(rank: int, student, teacher, expected) -> None:
    os.environ["WORLD_SIZE"] = "2"
    share = Share.of_torchrun()
    assert share.world_size == 2 and share.rank == rank
    assert share.put_together(share.mine(range(7))) == list(range(7))
    assert measure_all(student, teacher, share) == pytest.approx(expected, rel=1e-12)
    with pytest.raises((ValueError, SystemExit)):  # one rank's error ends both
        share.agreed(lambda: fail_on_one(rank))


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("bad image")


def test_the_shares_of_two_ranks_make_up_the_whole(tmp_path):
    student = write_seeds(tmp_path / "student", 3, PROMPTS[:3])  # 9 images: odd shares
    teacher = write_seeds(tmp_path / "teacher", 2)
    expected = measure_all(student, teacher, Share())
    on_ranks(2, check_two, student, teacher, expected)


def run(num: int, output, *flags) -> subprocess.CompletedProcess:
    """The command in `num` processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
    words = [*(torchrun if num > 1 else []), "-m", "senseflow.evaluate", "score"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [PYTHON, *words, "--name", "a", "--output", str(output), *map(str, flags)],
        env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip


@pytest.mark.long
def test_two_ranks_equal_one(tmp_path):
    images = write_seeds(tmp_path / "student", 2, PROMPTS[:3])
    teacher = write_seeds(tmp_path / "teacher", 3, PROMPTS[:3])  # 6 and 9 images: odd shares
    inception = tmp_path / "inception.pt"
    whole = nn.Sequential()
    whole.add_module("layers", nn.Sequential(nn.Conv2d(3, 4, 9, stride=8), nn.AdaptiveAvgPool2d(1)))
    torch.jit.script(whole).save(str(inception))
    flags = (
        "--images", images, "--reference", teacher, "--inception", inception,
        "--clip_model", f"local-dir:{TINY_CLIP}", "--batch_size", 2,
        "--metrics", "fid_t", "patch_fid_t", "clip", "diversity_clip",
    )  # fmt: skip
    results = []
    for num in (1, 2):
        done = run(num, tmp_path / f"{num}.json", *flags)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / f"{num}.json").read_text()))
    for one, two in zip(*results, strict=True):
        assert two["value"] == pytest.approx(one["value"], rel=1e-6)
        assert {**two, "value": 0, "standard_error": 0} == {**one, "value": 0, "standard_error": 0}
    (images / "seed_1" / "00001_a-blue-fox.png").write_bytes(b"nothing")
    done = run(2, tmp_path / "3.json", *flags)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode and len(lines) == 1 and "00001_a-blue-fox.png" in lines[0]
    assert not (tmp_path / "3.json").exists()
