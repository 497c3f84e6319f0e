"""What is on the Hub, where a path of this machine is meant."""

import re
from pathlib import Path

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def said_missing(path: Path) -> str:
    """That a path does not exist; of a name such as the Hub has, how to download what it names."""
    if NAME.fullmatch(str(path)) and not path.parent.exists():
        return (
            "does not exist; what has this name on the Hub is downloaded by `hf download "
            f"{path} --local-dir DIR`"
        )
    return "does not exist"


def in_cache(folder: Path) -> Path | None:
    """The newest of the downloads in an outer folder of the Hub's cache; None for other folders."""
    held = [snapshot for snapshot in folder.glob("snapshots/*") if snapshot.is_dir()]
    return max(held, key=lambda snapshot: snapshot.stat().st_mtime, default=None)
