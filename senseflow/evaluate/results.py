"""The file of results: a list of measurements, of which a run replaces or adds its own."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from senseflow.common.files import alone_in, write_whole
from senseflow.evaluate import entries as results

Entry = dict[str, Any]
PLACE = ("name", "metric", "model", "settings", "weights")  # one entry for each in a file
SAME = (*PLACE, "images_digest", "reference_digest")  # all that a value depends on but versions


def read_results(file: Path) -> list[Entry]:
    """The entries of a results file, none where there is no file yet; ValueError for another."""
    return results.read_results(file) if file.exists() else []


def check_output(file: Path) -> None:
    """Make the folder of a results file; raises ValueError where it could not be written later."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {file} cannot be written: {error}") from error
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ValueError(f"--output {file} cannot be written: permission denied")
    read_results(file)


def held(entries: list[Entry], wanted: Entry) -> Entry | None:
    """The entry that measured exactly this already; `wanted` needs no value."""
    return next((entry for entry in entries if _told(entry, SAME) == _told(wanted, SAME)), None)


def _told(entry: Entry, keys: tuple[str, ...]) -> list[Any]:
    """Some fields of an entry; the hashes of weights count, not where they lie."""
    weights = [part["sha256"] for part in entry.get("weights") or []]
    return [weights if key == "weights" else entry.get(key) for key in keys]


def put(file: Path, entry: Entry) -> None:
    """Write an entry in place of the one measured in the same way, or at the end; whole or not.

    Several processes may do so at once.
    """
    with alone_in(file.parent):
        entries = read_results(file)
        old = [i for i, e in enumerate(entries) if _told(e, PLACE) == _told(entry, PLACE)]
        if old:
            entries[old[0]] = entry
        else:
            entries.append(entry)
        write_whole(file, json.dumps(entries, indent=2) + "\n")


def of_other_images(entries: list[Entry], entry: Entry) -> list[str]:
    """Metrics of the same row that were measured on other images."""
    return [
        e["metric"]
        for e in entries
        if e["name"] == entry["name"]
        and e["metric"] != entry["metric"]
        and e.get("images_digest") != entry["images_digest"]
    ]


def sha256_of(file: Path) -> str:
    """Of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
