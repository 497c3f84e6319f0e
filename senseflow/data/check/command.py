"""What `python -m senseflow.data.check` does, behind its flags."""

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from senseflow.common.files import write_whole
from senseflow.common.pictures import save_whole
from senseflow.data.check.findings import Checked, Finding, Limits, Place
from senseflow.data.check.images import image_findings, image_numbers
from senseflow.data.check.looking import look_at_all
from senseflow.data.check.pictures import draw_images, draw_latents, draw_sheet
from senseflow.data.check.wording import (
    Reader,
    caption_findings,
    caption_numbers,
    read_tokenizers,
)
from senseflow.data.image_lists import read_lists, resolve

logger = logging.getLogger("senseflow")

NUM_SAID = 3  # places named on the terminal, of each finding
MARKS = {"stops": "STOPS THE RUN", "warning": "look at", "note": "note"}


@dataclass(frozen=True)
class Setting:
    """What the flags and the configuration say."""

    limits: Limits
    readers: list[Reader]  # of captions
    teacher: Path | None = None
    latents_scaled: bool | None = None
    samples: int = 0  # that the run draws; 0: not known


def run(dataset: Path, setting: Setting, output: Path, num_workers: int) -> bool:
    """Check, say, write to the folder `output`; whether something would stop the run.

    dataset: a JSON file, or the folder of an LMDB of latents. num_workers: processes that open
    images. Raises ValueError for a data set that cannot be opened at all.
    """
    start = time.monotonic()
    if dataset.is_dir():
        checked, names, pictures = check_latents(dataset, setting)
    else:
        checked, names, pictures = check_images(dataset, setting, num_workers)
    time_s = time.monotonic() - start
    output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        save_whole(picture, output / name)
    tree = as_tree(checked, names, str(dataset), time_s)
    write_whole(output / "check.json", json.dumps(tree, indent=1) + "\n")
    logger.info("%s: %s samples, %.1f s, %.0f per second", dataset, f"{checked.num:,}", time_s,
                checked.num / max(time_s, 1e-3))  # fmt: skip
    say(checked, names, setting)
    outcome = "a run would be stopped" if checked.stops else "nothing would stop a run"
    logger.info("%s. All of it: %s, pictures beside it", outcome, output / "check.json")
    return checked.stops


def read_setting(
    file: Path | None, overrides: list[str], resolution: list[int] | None, teacher: Path | None
) -> Setting:
    """Limits and tokenizers of the run with this YAML, where there is one.

    resolution: one side in pixels, or height and width; None: the run's. teacher: its diffusers
    folder; None: the run's.
    """
    pixels = resolution or [1, 1]  # an LMDB without a configuration has its own
    sides = (pixels[0], pixels[-1])
    if file is None:
        return Setting(Limits(sides), read_tokenizers(teacher, None) if teacher else [], teacher)
    from senseflow.config.config import load_config  # torch, seconds

    config = load_config(file, overrides)
    teacher = teacher or Path(config.paths.pretrained_model)
    if not (teacher / "model_index.json").is_file():
        logger.warning("teacher %s is not there: caption lengths are in words", teacher)
        teacher = None
    length = config.data.max_sequence_length
    return Setting(
        Limits(
            sides if resolution else config.train.resolution,
            config.data.max_unreadable,
            config.data.crop == "random",
        ),
        read_tokenizers(teacher, length) if teacher else [],
        teacher,
        config.data.latents_scaled,
        config.train.iter_num * config.train.batch_size,
    )


# ----------------------------------------------------------------------------------- two data sets

Result = tuple[Checked, list[str], dict[str, Image.Image]]  # and names of rows, and pictures


def check_images(file: Path, setting: Setting, num_workers: int) -> Result:
    """What is found in a JSON data set of images."""
    _, paths, prompts = read_lists(file)
    files = [resolve(file.parent, path) for path in paths]
    seen = look_at_all(files, num_workers)
    lengths = {reader.name: reader.lengths(prompts) for reader in setting.readers}
    limits = {reader.name: reader.limit for reader in setting.readers}
    resolution = setting.limits.resolution
    findings = image_findings(paths, seen, setting.limits)
    sheet = draw_sheet(files, prompts, seen, findings, resolution)
    findings += caption_findings(prompts, lengths, limits)
    numbers = {
        "resolution": list(resolution),
        "images": image_numbers(seen, resolution),
        "captions": caption_numbers(prompts, lengths),
    }
    tightest = min(limits, key=lambda name: limits[name], default=None)
    words = [len(prompt.split()) for prompt in prompts]
    drawn = draw_images(
        seen,
        resolution,
        lengths[tightest] if tightest else words,
        limits[tightest] if tightest else 0,
        f"tokens ({tightest})" if tightest else "words",
    )
    pictures = {"numbers.png": drawn, "suspicious.png": sheet}
    return Checked(len(paths), findings, numbers), paths, pictures


def check_latents(folder: Path, setting: Setting) -> Result:
    """What is found in an LMDB of latents."""
    from senseflow.data.check.latents import latent_findings, latent_numbers, read_rows, require_fit

    rows = read_rows(folder)
    findings = latent_findings(rows, setting.limits.max_unreadable)
    if setting.teacher and setting.samples:
        try:
            require_fit(folder, setting.teacher, setting.limits.resolution, setting.latents_scaled)
        except ValueError as error:
            findings.insert(0, Finding("other teacher", "stops", str(error)))
    lengths = {reader.name: reader.lengths(rows.captions) for reader in setting.readers}
    limits = {reader.name: reader.limit for reader in setting.readers}
    findings += caption_findings(rows.captions, lengths, limits)
    numbers = {
        "latents": latent_numbers(rows),
        "captions": caption_numbers(rows.captions, lengths),
    }
    names = [f"row {row}" for row in range(len(rows.captions))]
    words = [len(caption.split()) for caption in rows.captions]
    pictures = {"numbers.png": draw_latents(rows.deviations, words)}
    return Checked(len(names), findings, numbers), names, pictures


# ------------------------------------------------------------------------------------- what is said


def as_tree(checked: Checked, names: list[str], dataset: str, time_s: float) -> dict[str, Any]:
    """For check.json: every finding with all its samples."""

    def named(place: Place) -> Any:
        return [names[i] for i in place] if isinstance(place, list) else names[place]

    findings = [
        {**asdict(finding), "samples": [named(place) for place in finding.places]}
        for finding in checked.findings
    ]
    return {
        "dataset": dataset,
        "num": checked.num,
        "stops": checked.stops,
        "findings": findings,
        **checked.numbers,
        "time_s": round(time_s, 2),
    }


def say(checked: Checked, names: list[str], setting: Setting) -> None:
    """The findings on the terminal, the gravest first."""
    if images := checked.numbers.get("images"):
        sides = ", ".join(f"{name} {value:.0f}" for name, value in images["short_side"].items())
        logger.info("short side: %s; %.1f MiB on disk", sides, images["bytes"] / 2**20)
    if setting.samples:
        logger.info("the run draws %s samples: each %.3g times", f"{setting.samples:,}",
                    setting.samples / checked.num)  # fmt: skip
    for finding in sorted(checked.findings, key=lambda found: list(MARKS).index(found.level)):
        logger.info("%s: %s. %s", MARKS[finding.level], finding.name, finding.words)
        for number, place in enumerate(finding.places[:NUM_SAID]):
            group = place if isinstance(place, list) else [place]
            reason = f": {finding.reasons[number]}" if finding.reasons else ""
            named = " = ".join(names[i] for i in group[:NUM_SAID])
            logger.info("    %s%s%s", named, " = ..." * (len(group) > NUM_SAID), reason)
        if len(finding.places) > NUM_SAID:
            logger.info("    and %d more", len(finding.places) - NUM_SAID)
