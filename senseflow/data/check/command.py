"""What `python -m senseflow.data.check` does, behind its flags."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from senseflow.common.files import write_whole
from senseflow.common.pictures import save_whole
from senseflow.common.tables import has_prompts_alone
from senseflow.config.config import Config, load_config
from senseflow.config.load import require_no_images
from senseflow.config.recipes import RECIPES
from senseflow.config.teacher import teacher_settings
from senseflow.data.check.findings import Checked, Finding, Limits, Place, plain
from senseflow.data.check.images import image_findings, image_numbers
from senseflow.data.check.latents import latent_findings, latent_numbers, read_rows
from senseflow.data.check.looking import look_at_all
from senseflow.data.check.pictures import draw_images, draw_latents, draw_prompts, draw_sheet
from senseflow.data.check.wording import (
    Reader,
    caption_findings,
    caption_numbers,
    read_tokenizers,
)
from senseflow.data.dataset import DataSet, open_dataset
from senseflow.data.image_lists import one_line
from senseflow.data.items import Position, UnreadableItem
from senseflow.data.json_images import JsonImages
from senseflow.data.latents_lmdb import LatentsScaling
from senseflow.data.prompt_list import PromptList
from senseflow.teachers.family import Family
from senseflow.teachers.folder import INDEX, TeacherSettings

logger = logging.getLogger("senseflow")

NUM_SAID = 3  # places named on the terminal, of each finding
MARKS = {"stops": "STOPS THE RUN", "warning": "look at", "note": "note"}


@dataclass(frozen=True)
class Training:
    """The run that is asked about, where its configuration and its teacher are there."""

    config: Config
    family: Family
    settings: TeacherSettings

    def open(self, dataset: Path) -> DataSet:
        """The data set as the run opens it; raises ValueError where it would end."""
        self.family.require(self.settings)
        if has_prompts_alone(dataset):
            require_no_images(self.config)
        return open_dataset(
            dataset,
            self.settings.resolution,
            self.family.latent_shape(self.settings),
            max_unreadable=self.config.data.max_unreadable,
            latents_scaling=partial(LatentsScaling.of_vae, self.settings.folder / "vae"),
            latents_scaled=self.config.data.latents_scaled,
        )


@dataclass(frozen=True)
class Setting:
    """What the flags and the configuration say."""

    limits: Limits
    readers: list[Reader]  # of captions
    training: Training | None = None
    samples: int = 0  # that the run draws; 0: not known


def run(dataset: Path, setting: Setting, output: Path, num_workers: int) -> bool:
    """Check, say, write to the folder `output`; whether something would stop the run.

    dataset: a JSON file, the folder of an LMDB of latents, or a list of prompts. num_workers:
    processes that open images. Raises ValueError for a data set that cannot be opened at all.
    """
    start = time.monotonic()
    if dataset.is_dir():
        checked, names, places, pictures = check_latents(dataset, setting)
    elif has_prompts_alone(dataset):
        checked, names, places, pictures = check_prompts(dataset, setting)
    else:
        checked, names, places, pictures = check_images(dataset, setting, num_workers)
    time_s = time.monotonic() - start
    output.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        save_whole(picture, output / name)
    tree = as_tree(checked, names, str(dataset), time_s)
    write_whole(output / "check.json", json.dumps(tree, indent=1) + "\n")
    logger.info("%s: %s samples, %.1f s, %.0f per second", dataset, f"{checked.num:,}", time_s,
                checked.num / max(time_s, 1e-3))  # fmt: skip
    say(checked, places, setting)
    logger.info("%s. All of it: %s, pictures beside it", outcome(checked), output / "check.json")
    return checked.stops


def outcome(checked: Checked) -> str:
    """What it comes to, in a few words."""
    if checked.stops:
        return "a run would be stopped"
    warned = [finding.name for finding in checked.findings if finding.level == "warning"]
    return "nothing would stop a run" + (f", but look at: {'; '.join(warned)}" if warned else "")


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
        return Setting(Limits(sides), read_tokenizers(teacher, None) if teacher else [])
    config = load_config(file, overrides)
    teacher = teacher or Path(config.paths.pretrained_model)
    sides = sides if resolution else config.train.resolution
    limits = Limits(sides, config.data.max_unreadable, config.data.crop == "random")
    samples = config.train.iter_num * config.train.batch_size
    if not (teacher / INDEX).is_file():
        logger.warning(
            "teacher %s is not there: caption lengths are in words, and whether it takes this "
            "resolution is not known", teacher,
        )  # fmt: skip
        return Setting(limits, [], None, samples)
    settings = replace(teacher_settings(config), folder=teacher, resolution=sides)
    training = Training(config, RECIPES[config.recipe].family, settings)
    readers = read_tokenizers(teacher, config.data.max_sequence_length)
    return Setting(limits, readers, training, samples)


def misfit(dataset: Path, setting: Setting) -> list[Finding]:
    """What a run would say before it began."""
    if setting.training is None:
        return []
    try:
        setting.training.open(dataset)
    except ValueError as error:
        return [Finding("does not fit", "stops", one_line(str(error)))]
    return []


# --------------------------------------------------------------------------------- three data sets

# what is found, each row as the data set calls it, where it can be opened, and the pictures
Result = tuple[Checked, list[str], list[str], dict[str, Image.Image]]


def check_images(file: Path, setting: Setting, num_workers: int) -> Result:
    """What is found in a JSON data set of images."""
    resolution = setting.limits.resolution
    data = JsonImages(file, resolution, max_unreadable=setting.limits.max_unreadable)
    paths, refused = [*data.paths], refusals(data)
    prompts = ["" if i in refused else prompt for i, prompt in enumerate(data.prompts)]
    files = [data.resolve(path) for path in paths]
    looks = look_at_all(files, num_workers)
    seen = [refused.get(place, look) for place, look in enumerate(looks)]
    lengths = {reader.name: reader.lengths(prompts) for reader in setting.readers}
    limits = {reader.name: reader.limit for reader in setting.readers}
    findings = [*misfit(file, setting), *image_findings(paths, seen, setting.limits)]
    sheet = draw_sheet(files, prompts, seen, findings, resolution)
    findings += caption_findings(prompts, lengths, limits, refused)
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
    places = [os.path.normpath(file) for file in files]
    return Checked(len(paths), findings, numbers), paths, places, pictures


def refusals(data: JsonImages) -> dict[int, str]:
    """Rows that a run passes over whatever their images are, and why."""
    refused = {}
    for row in range(len(data)):
        try:
            data.listed(Position(1, 0, row), row)
        except UnreadableItem as error:
            refused[row] = error.reason
    return refused


def check_latents(folder: Path, setting: Setting) -> Result:
    """What is found in an LMDB of latents."""
    rows = read_rows(folder)
    findings = [*misfit(folder, setting), *latent_findings(rows, setting.limits.max_unreadable)]
    found, captions = of_captions(rows.captions, setting, [row for row, _ in rows.unreadable])
    findings += found
    numbers = {"latents": latent_numbers(rows), "captions": captions}
    names = [f"row {row}" for row in range(len(rows.captions))]
    words = [len(caption.split()) for caption in rows.captions]
    pictures = {"numbers.png": draw_latents(rows.deviations, words)}
    return Checked(len(names), findings, numbers), names, names, pictures


def check_prompts(file: Path, setting: Setting) -> Result:
    """What is found in a list of prompts without images."""
    data = PromptList(file)
    prompts, rows = [*data.prompts], map(json.loads, data.rows)
    findings, captions = of_captions(prompts, setting)
    numbers = {"columns": Counter(name for row in rows for name in row), "captions": captions}
    names = [f"prompt {number}" for number in range(len(prompts))]
    drawn = draw_prompts([len(prompt.split()) for prompt in prompts])
    checked = Checked(len(names), [*misfit(file, setting), *findings], numbers)
    return checked, names, names, {"numbers.png": drawn}


def of_captions(
    captions: list[str], setting: Setting, unread: Collection[int] = ()
) -> tuple[list[Finding], dict[str, Any]]:
    """What is found in captions, and their numbers. unread: see `caption_findings`."""
    lengths = {reader.name: reader.lengths(captions) for reader in setting.readers}
    limits = {reader.name: reader.limit for reader in setting.readers}
    findings = caption_findings(captions, lengths, limits, unread)
    return findings, caption_numbers(captions, lengths)


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
        times = plain(setting.samples / checked.num)
        logger.info("the run draws %s samples: each %s times", f"{setting.samples:,}", times)
    for finding in sorted(checked.findings, key=lambda found: list(MARKS).index(found.level)):
        logger.info("%s: %s. %s", MARKS[finding.level], finding.name, finding.words)
        for number, place in enumerate(finding.places[:NUM_SAID]):
            group = place if isinstance(place, list) else [place]
            reason = f": {finding.reasons[number]}" if finding.reasons else ""
            named = " = ".join(one_line(names[i]) for i in group[:NUM_SAID])
            logger.info("    %s%s%s", named, " = ..." * (len(group) > NUM_SAID), reason)
        if len(finding.places) > NUM_SAID:
            logger.info("    and %d more", len(finding.places) - NUM_SAID)
