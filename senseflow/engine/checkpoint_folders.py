"""Finished checkpoints of a run folder, found by their names and checked by their manifests.

`checkpoints/step_<iteration>` is there whole or not at all (`senseflow.engine.checkpoint` writes
it); digests of its files in the manifest tell one that was damaged since. Needs no torch.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from senseflow.common.files import read_json, sha256_of
from senseflow.config.config import Config, load_config, require_same_base

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
WEIGHTS = (".pth", ".pt", ".bin", ".safetensors")

Damage = Callable[[Path, dict[str, Any]], str | None]  # of a folder with its manifest


def require_run_base(run: Path, config: Config) -> None:
    """Raise ValueError for a run with checkpoints whose base had another form, unless asked for."""
    file = run / "config.yaml"
    if not file.is_file() or not complete_checkpoints(run / "checkpoints"):
        return
    try:
        held = load_config(file).lora
    except ValueError:
        return  # the run says that it is not compared
    require_same_base(config.lora, held.base, run)


def step_name(iteration: int) -> str:
    """The name of an iteration's folder; names sort by iteration."""
    return f"step_{iteration:07d}"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The finished ones in a `checkpoints` folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / MANIFEST).is_file())


def find_checkpoint(path: Path, damage: Damage | None = None) -> tuple[Path, int]:
    """Folder and iteration of a checkpoint, or of the newest undamaged one of a run.

    damage: what is wrong with one; by default every file is read.
    """
    found, is_step = checkpoints_of(path), path.parent.name == "checkpoints"
    for folder in reversed(found):
        manifest = read_manifest(folder)
        wrong = (damage or damage_in)(folder, manifest)
        if wrong is None:
            return folder, manifest["iteration"]
        if is_step:
            raise ValueError(f"checkpoint {folder} is damaged or not complete: {wrong}")
        pass_over(folder, wrong, is_last=folder == found[0])
    raise ValueError(f"{path} holds no complete checkpoint in {path / 'checkpoints'}")


def pass_over(folder: Path, wrong: str, is_last: bool) -> None:
    """Say that a damaged checkpoint is not used.

    is_last: there is none before it to be used, which is a ValueError: to begin anew would remove
    what may still be mended.
    """
    if is_last:
        students = folder.parent.parent / "student"
        raise ValueError(
            f"no checkpoint in {folder.parent} can be used: the oldest, {folder.name}, is damaged "
            f"too ({wrong}). Nothing was changed. Put one back from a copy, or name another "
            f"SAVE_DIR: paths.initial={students} begins there with the newest student"
        )
    logger.warning("checkpoint %s is damaged (%s): using the one before", folder, wrong)


def checkpoints_of(path: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first, or the one that `path` is."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a run folder or checkpoint: there is no such folder")
    return (
        [path] if path.parent.name == "checkpoints" else complete_checkpoints(path / "checkpoints")
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Iteration, digests of the files, steps skipped in a row by network, and the retry number;
    {"damage": why} when it cannot be read."""
    try:
        manifest = read_json(folder / MANIFEST)
        return {
            "iteration": int(manifest["iteration"]),
            "files": dict(manifest["files"]),
            # Of a checkpoint from before there were any: none.
            "skipped": {str(k): int(v) for k, v in manifest.get("skipped", {}).items()},
            "retry": int(manifest.get("retry", 0)),
        }
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return {"damage": f"{MANIFEST} cannot be read: {error!r}"}


def unreadable(folder: Path, manifest: dict[str, Any]) -> str | None:
    """What is wrong with a checkpoint's manifest and list of tensors, without its other files."""
    names = [name for name in manifest.get("files", []) if name.startswith(".")]
    return damage_in(folder, manifest, lambda _: names)


def damage_in(
    folder: Path, manifest: dict[str, Any], share: Callable[[list[str]], list[str]] = list
) -> str | None:
    """What is wrong with a share of a checkpoint's files; None when nothing is."""
    if "damage" in manifest:
        return str(manifest["damage"])
    for name in share(sorted(manifest["files"])):
        try:
            if sha256_of(folder / name) != manifest["files"][name]:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def require_known_layout(run: Path) -> None:
    """Raise ValueError for a run folder of another program, or of an older layout.

    A run of this one, even without a checkpoint, is known by its config.yaml.
    """
    folder = run / "checkpoints"
    if complete_checkpoints(folder):
        return
    found = sorted(folder.glob("step_*"))
    if not (run / "config.yaml").is_file():
        files = sorted([*run.glob("*.*"), *run.glob("*/*.*")])
        found += [file for file in files if file.suffix in WEIGHTS]
    if found:
        raise ValueError(
            f"SAVE_DIR {run} is a run of another layout, which cannot go on: {found[0]} is there, "
            f"but no checkpoints/step_*/{MANIFEST}. Name another SAVE_DIR; paths.initial=STUDENT "
            "begins there with this one's weights"
        )
