"""Runs through the shell scripts on the embedded teachers, and how what they leave is read."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import torch
from embedded import EMBEDDED, YAMLS
from python import PYTHON
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def line(recipe: str, folder: Path, *overrides: str, ranks: int = 1) -> list[str]:
    """The command of the README for a run on one node."""
    script = EMBEDDED[recipe].script
    return ["sh", script, "1", str(ranks), YAMLS[recipe], str(folder), *overrides]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": PYTHON, "OMP_NUM_THREADS": "1", **changes}


def train(
    recipe: str, folder: Path, *overrides: str, ranks: int = 1, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run it to its end; `changes` are of the environment. Raises AssertionError on failure."""
    result = subprocess.run(
        line(recipe, folder, *overrides, ranks=ranks),
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr
    return result


def interrupted(folder: Path, iteration: int, copy: Path) -> Path:
    """A copy of a run folder as it was when the checkpoint of `iteration` was whole, and no more.

    The rows of stats.jsonl after it stay, as a run that was killed later leaves them.
    """
    shutil.copytree(folder, copy)
    name = f"step_{iteration:07d}"
    for later in (p for part in ("checkpoints", "student") for p in (copy / part).iterdir()):
        if later.name > name:
            shutil.rmtree(later)
    (copy / "last_iter").write_text(f"{iteration}\n")
    return copy


def blind_teacher(folder: Path) -> Path:
    """A copy of the embedded FLUX teacher whose VAE sees NaN in every image."""
    shutil.copytree("assets/tiny/flux/pipeline", folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"].fill_(float("nan"))
    file.unlink()  # it may be a link
    save_file(weights, file, {"format": "pt"})
    return folder


def rows(folder: Path) -> list[dict[str, float]]:
    """stats.jsonl."""
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


def timeless_rows(folder: Path) -> list[dict[str, float]]:
    """stats.jsonl without its times."""
    return [{k: v for k, v in row.items() if "time_s" not in k} for row in rows(folder)]


def full_state(folder: Path, iteration: int, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, unsharded, by dotted name."""
    file = tmp_path / "state.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step_{iteration:07d}", file)

    def walk(tree, prefix=""):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif isinstance(value, torch.Tensor):
                yield prefix + str(key), value

    return dict(walk(torch.load(file, weights_only=False)))
