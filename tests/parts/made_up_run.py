"""A run folder and folders of samples as training and the sampling scripts leave them, made up."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs/FLUX/flux_senseflow_tiny.yaml"
LONG_PROMPT = "a red seven left of a blue two on white, " * 12 + "x" * 90


def picture(file: Path, size: tuple[int, int], seed: int = 0, noise: bool = False) -> None:
    """A few colours, or noise, which no format can compress."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if noise else (3, 4, 3)
    levels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(levels).resize(size, Image.Resampling.NEAREST).save(file)


def rows(num: int = 40, interval: int = 10) -> list[dict[str, float]]:
    """A run that goes well."""
    noise = np.random.default_rng(0).standard_normal((num, 8))
    result = []
    for k in range(num):
        t, n = k / num, noise[k]
        result.append({
            "iteration": interval * (k + 1),
            "loss/dmd": (0.2 + 0.5 * (1 - math.exp(-5 * t))) * (1 + 0.1 * n[0]),
            "loss/fake": (0.5 + 6 * math.exp(-8 * t)) * (1 + 0.1 * n[1]),
            "loss/isg": 0.08 * (1 + 0.2 * n[2]),
            "grad_norm/generator": 3 * (1 + 0.3 * n[3]) if n[3] > -3 else 0.3,
            "ida/gap": 0.03 * (1 - math.exp(-6 * t)) + 0.005,
            "discriminator/margin": 0.02 * (1 + 0.2 * n[4]),
            "drift/mean": 0.01 * n[5],
            "drift/contrast": 0.01 * n[6],
            "lr/generator": 1e-4,
            "lr/fake_score": 3e-4,
            "time_s/iteration": 1.5,
            "time_s/generate": 0.5,
            "time_s/generator": 0.7,
        })  # fmt: skip
    return result


def write_rows(folder: Path, lines: list[dict[str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def make_run(folder: Path, num_rows: int = 40, strips: tuple[int, ...] = (100, 200, 300)) -> Path:
    """A finished run of 400 iterations of the embedded FLUX."""
    write_rows(folder, rows(num_rows))
    config = yaml.safe_load(TINY.read_text())
    config["paths"]["dataset"] = "runs/<my> data/data.json"
    config["dmd"]["weight"] = 0.75
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "last_iter").write_text(f"{10 * num_rows}\n")
    for iteration in strips:
        picture(folder / "samples" / f"step_{iteration:07d}.png", (672, 400), iteration)
    return folder


def sample(folder: Path, index: int, prompt: str, seed: int, size: int = 32, **card) -> Path:
    """One image with its .json, as senseflow.sampling.generate writes them."""
    file = folder / f"{index:05d}_image.png"
    picture(file, (size, size), seed)
    known = {"prompt": prompt, "index": index, "seed": seed, "checkpoint": None, "steps": 28}
    file.with_suffix(".json").write_text(json.dumps({**known, "sampler": "euler", **card}))
    return file


def make_samples(folder: Path, prompts: list[str], student: int | None = None, size: int = 32):
    """Samples of the teacher, or of a student at so many steps."""
    card = {"checkpoint": "runs/flux", "steps": student, "iteration": 400} if student else {}
    for index, prompt in enumerate(prompts):
        sample(folder, index, prompt, index, size, **card)
    picture(folder / "grid.png", (64, 64))
    return folder


def copy_of(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    return to
