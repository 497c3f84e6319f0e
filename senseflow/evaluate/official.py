"""The result files of GenEval and T2I-CompBench, as their own programs write them."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from senseflow.common.files import parse_json
from senseflow.distill.scorers.metric import Column
from senseflow.evaluate.layouts import CATEGORIES, GENEVAL_TASKS, SAMPLES
from senseflow.evaluate.results import Result, check_result, read_text

logger = logging.getLogger(__name__)

# By category: whose program, and where it leaves the scores; UniDet's folder has had two names.
PROGRAMS = {
    "color": ("BLIP-VQA", ["annotation_blip"]),
    "shape": ("BLIP-VQA", ["annotation_blip"]),
    "texture": ("BLIP-VQA", ["annotation_blip"]),
    "spatial": (
        "UniDet, 2D",
        ["labels/annotation_obj_detection_2d", "labels/annotation_obj_detection"],
    ),
    "non_spatial": ("CLIP ViT-B/32", ["annotation_clip"]),
    "complex": ("3-in-1 of BLIP-VQA, UniDet, CLIP", ["annotation_3_in_1"]),
}
COLUMNS = (
    Column("geneval", "GenEval"),
    *(Column(f"geneval_{task}", f"GenEval {task.replace('_', ' ')}") for task in GENEVAL_TASKS),
    *(Column(f"t2i_compbench_{c}", f"T2I-CompBench {c.replace('_', '-')}") for c in CATEGORIES),
)
GENEVAL = "GenEval's own program"


def read_geneval(name: str, file: Path) -> list[Result]:
    """The accuracy of each task over its images, and their mean when all six are there."""
    rows = _geneval_rows(file)
    tasks = []
    for task in GENEVAL_TASKS:
        own = [row for row in rows if row["tag"] == task]
        if own:
            scores = [float(row["correct"]) for row in own]
            metric, num = f"geneval_{task}", _num_prompts(own)
            tasks.append(mean_result(name, metric, scores, num, file, GENEVAL))
    found = {entry["metric"].removeprefix("geneval_") for entry in tasks}
    if missing := [task for task in GENEVAL_TASKS if task not in found]:
        logger.warning("%s: no mean, as it holds no image of %s", file, ", ".join(missing))
        return tasks
    mean = math.fsum(entry["value"] for entry in tasks) / len(tasks)
    overall = {"metric": "geneval", "value": mean, "num_images": len(rows)}
    return [{**tasks[0], **overall, "num_prompts": _num_prompts(rows)}, *tasks]


def _num_prompts(rows: list[dict[str, Any]]) -> int:
    return len({row["metadata"] for row in rows})


def _geneval_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        row = parse_json(line, where)
        if not isinstance(row, dict) or not isinstance(row.get("correct"), bool):
            raise ValueError(f"{where} is no result of GenEval: it has no 'correct'")
        if row.get("tag") not in GENEVAL_TASKS or not isinstance(row.get("metadata"), str):
            raise ValueError(f"{where} is no result of GenEval: tag {row.get('tag')!r}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} holds no results")
    return rows


def read_t2i_compbench(name: str, folder: Path) -> list[Result]:
    """The mean score of each category that was measured in a folder of `generate`."""
    if not folder.is_dir():
        raise ValueError(f"--t2i_compbench {folder} is not a folder")
    results, missing = [], []
    for category in CATEGORIES:
        _, places = PROGRAMS[category]
        files = [folder / category / place / "vqa_result.json" for place in places]
        found = [file for file in files if file.is_file()]
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both there: remove the older one")
        if found:
            results.append(_category(name, category, found[0], folder / category / SAMPLES))
        else:
            missing.append(category)
    if not results:
        raise ValueError(
            f"--t2i_compbench {folder} holds no scores, such as color/annotation_blip/"
            "vqa_result.json: it is to be the folder that `generate` filled"
        )
    if missing:
        logger.warning("%s: no scores of %s", folder, ", ".join(missing))
    return results


def _category(name: str, category: str, file: Path, samples: Path) -> Result:
    answers = _answers(file)
    pictures = [f.stem for f in samples.glob("*.png")] if samples.is_dir() else []
    notes = []
    if pictures and len(pictures) != len(answers):
        notes.append(f"{category}: scores of {len(answers)} of {len(pictures)} images")
        logger.warning("%s, in %s", notes[0], file)
    num_prompts = len({stem.rpartition("_")[0] for stem in pictures}) or None
    model = f"T2I-CompBench's own program ({PROGRAMS[category][0]})"
    metric = f"t2i_compbench_{category}"
    return mean_result(name, metric, answers, num_prompts, file, model, notes)


def mean_result(
    name: str,
    metric: str,
    scores: Sequence[float],
    num_prompts: int | None,
    file: Path,
    model: str,
    notes: Sequence[str] = (),
) -> Result:
    """The mean of an official result file's scores, one per image, as an entry."""
    entry = dict(
        name=name, metric=metric, value=math.fsum(scores) / len(scores), num_images=len(scores),
        num_prompts=num_prompts, images=str(file), model=model, notes=list(notes),
    )  # fmt: skip
    return check_result(entry, str(file))


def _answers(file: Path) -> list[float]:
    """The scores of a vqa_result.json, which are numbers or numbers as text."""
    entries = parse_json(read_text(file), str(file))
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file} holds no list of answers")
    answers = []
    for entry in entries:
        try:
            answers.append(float(entry["answer"]))
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{file}: {entry!r} has no number as its answer") from error
    if not all(map(math.isfinite, answers)):
        raise ValueError(f"{file} holds answers that are not finite")
    return answers
