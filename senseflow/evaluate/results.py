"""Files of results: what an entry holds, which entries were measured alike, and writing one.

A file is a JSON list of entries, one per value. `check_result` says what an entry must hold: files
of older versions, which lack some of its keys, are read with these empty.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from senseflow.common.files import alone_in, parse_json, write_whole

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

PLACE = ("name", "metric", "model", "settings", "weights")  # one entry for each in a file
SAME = (*PLACE, "images_digest", "reference_digest")  # all that a value depends on but versions
PROTOCOL = (
    "num_images", "num_prompts", "image_size", "model", "preprocessing", "settings", "versions",
)  # fmt: skip
SAME_VALUE = 1e-5  # relative: two machines' roundings of one measurement


def read_results(file: Path) -> list[Result]:
    """The entries of a results file; raises ValueError naming the file, the entry and the key."""
    tree = parse_json(read_text(file), f"{file} is not a results file: it")
    if not isinstance(tree, list):
        raise ValueError(f"{file} is not a results file: it holds no list")
    return [check_result(entry, f"{file}, entry {n}") for n, entry in enumerate(tree)]


def read_text(file: Path) -> str:
    """A file's text; raises ValueError naming one that cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


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
        # True is an int to Python, and no number to anyone else
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


# What `score` finds in its own file and puts there


def results_so_far(file: Path) -> list[Result]:
    """The entries of the file that `score` adds to, none where there is no file yet."""
    return read_results(file) if file.exists() else []


def check_output(file: Path) -> None:
    """Make the folder of a results file; raises ValueError where it could not be written later."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {file} cannot be written: {error}") from error
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"--output {file} cannot be written: permission denied")
    results_so_far(file)


def find_held(file: Path, wanted: Result) -> Result | None:
    """The entry of a file that measured exactly this already; `wanted` needs no value."""
    alike = (e for e in results_so_far(file) if _told(e, SAME) == _told(wanted, SAME))
    return next(alike, None)


def _told(entry: Result, keys: tuple[str, ...]) -> list[Any]:
    """Some fields of an entry; the hashes of weights count, not where they lie."""
    weights = [part["sha256"] for part in entry.get("weights") or []]
    return [weights if key == "weights" else entry.get(key) for key in keys]


def put(file: Path, entry: Result) -> None:
    """Write an entry in place of the one measured in the same way, or at the end; whole or not.

    Several processes may do so at once.
    """
    with alone_in(file.parent):
        entries = results_so_far(file)
        old = [i for i, e in enumerate(entries) if _told(e, PLACE) == _told(entry, PLACE)]
        if old:
            entries[old[0]] = entry
        else:
            entries.append(entry)
        write_whole(file, json.dumps(entries, indent=2) + "\n")


def of_other_images(entries: list[Result], entry: Result) -> list[str]:
    """Metrics of the same row that were measured on other images."""
    return [
        e["metric"]
        for e in entries
        if e["name"] == entry["name"]
        and e["metric"] != entry["metric"]
        and e.get("images_digest") != entry["images_digest"]
    ]
