"""Results of measurements: what an entry of a results file holds, and which entries agree."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,),  # the row of the table
    "metric": (str,),  # its column
    "value": (int, float),
    "num_images": (int,),
    "num_prompts": (int, type(None)),
    "images": (str, type(None)),
    "reference": (str, type(None)),
    "weights": (list,),  # of {"file": path, "sha256": hex}
    "model": (str, type(None)),
    "preprocessing": (str, type(None)),
    "versions": (dict,),
    "settings": (dict,),
    "notes": (list,),
}
REQUIRED = ("name", "metric", "value", "num_images")
EMPTY: dict[str, Any] = {"weights": [], "versions": {}, "settings": {}, "notes": []}
OPTIONAL = {"image_size": (str,), "reference_digest": (str, type(None))}  # what `score` says too
PROTOCOL = (
    "num_images", "num_prompts", "image_size", "model", "preprocessing", "settings", "versions",
)  # fmt: skip
SAME_VALUE = 1e-5  # relative: two machines' roundings of one measurement


def official_result(
    name: str,
    metric: str,
    scores: Sequence[float],
    num_prompts: int | None,
    file: Path,
    model: str,
    notes: Sequence[str] = (),
) -> Result:
    """The mean of an official result file's scores, one per image, as an entry."""
    return check_result(
        {
            "name": name,
            "metric": metric,
            "value": math.fsum(scores) / len(scores),
            "num_images": len(scores),
            "num_prompts": num_prompts,
            "images": str(file),
            "model": model,
            "notes": list(notes),
        },
        str(file),
    )


def read_results(file: Path) -> list[Result]:
    """The entries of a results file; raises ValueError naming the file, the entry and the key."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not a results file: {error}") from error
    if not isinstance(tree, list):
        raise ValueError(f"{file} is not a results file: it holds no list")
    return [check_result(entry, f"{file}, entry {n}") for n, entry in enumerate(tree)]


def check_result(entry: Any, where: str) -> Result:
    """The entry with all of TYPES; raises ValueError, beginning with `where`, when one is wrong.

    Keys besides are kept, and not looked at.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is no result: {entry!r}")
    missing = [key for key in REQUIRED if key not in entry]
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; the keys are {', '.join(TYPES)}")
    whole = {**{key: EMPTY.get(key) for key in TYPES}, **entry}
    for key, types in {**TYPES, **OPTIONAL}.items():
        if key in whole and (not isinstance(whole[key], types) or isinstance(whole[key], bool)):
            raise ValueError(f"{where}: {key} is {whole[key]!r}, not {types[0].__name__}")
    if not math.isfinite(whole["value"]):
        raise ValueError(f"{where}: value {whole['value']} is not finite")
    _check_weights(whole["weights"], where)
    return whole


def _check_weights(weights: list[Any], where: str) -> None:
    for item in weights:
        texts = [item.get("file"), item.get("sha256")] if isinstance(item, dict) else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{where}: weights must be a list of file and sha256, not {item!r}")


def protocol(entry: Result) -> str:
    """What two values must share to be comparable, as a key.

    Where weights lie does not count, nor where the reference does when its digest is known.
    """
    tree = {key: entry.get(key) for key in PROTOCOL}
    tree["weights"] = [item["sha256"] for item in entry["weights"]]
    tree["reference"] = entry.get("reference_digest") or entry["reference"]
    return json.dumps(tree, sort_keys=True)


def merge(results: Iterable[Result]) -> list[Result]:
    """The results without repetitions.

    Raises ValueError when one name has two values of a metric measured in the same way: one of
    them is old, or of other images.
    """
    merged: dict[tuple[str, str, str], Result] = {}
    for entry in results:
        key = (entry["name"], entry["metric"], protocol(entry))
        first = merged.setdefault(key, entry)
        if not math.isclose(first["value"], entry["value"], rel_tol=SAME_VALUE, abs_tol=1e-9):
            raise ValueError(
                f"{entry['name']!r} has two values of {entry['metric']} measured in the same way: "
                f"{first['value']:.10g} (images {first['images']}) and {entry['value']:.10g} "
                f"(images {entry['images']}): remove one, or give it another name"
            )
    return list(merged.values())
