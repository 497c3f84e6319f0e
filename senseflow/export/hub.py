"""To the Hugging Face Hub: what would go, and sending it; nothing is sent unless asked for."""

import logging
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of its own client
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from senseflow.weights.card import CARD

logger = logging.getLogger("senseflow")
UNITS = ("B", "KB", "MB", "GB")


def check_push(repo: str, dry_run: bool) -> None:
    """Raise ValueError for no name of a repository, or without a token, before any work is done."""
    validate_repo_id(repo)
    if "/" not in repo:
        raise ValueError(f"--push_to_hub {repo}: name the owner too, such as me/{repo}")
    if not dry_run and not get_token():
        raise ValueError(
            "--push_to_hub: no token of the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN"
        )


def check_shipped(folder: Path) -> None:
    """Raise ValueError unless a folder is one that this command wrote."""
    if not (folder / "README.md").is_file() or not any(folder.rglob(CARD)):
        raise ValueError(
            f"--output {folder} is no exported student (README.md and {CARD}): name a run or "
            "checkpoint to export"
        )


def listing(folder: Path, repo: str, public: bool) -> str:
    """What would go, in lines; links count as what they stand for."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
    total = said_size(sum(sizes.values()))
    lines = [f"{said_size(size):>9}  {name}" for name, size in sizes.items()]
    kind = "public" if public else "private"
    head = f"{len(files)} files, {total}, would go to {kind} {repo}; nothing was sent"
    return "\n".join([head, *lines])


def said_size(size: float) -> str:
    """In the largest unit of 1000 that is not above it."""
    for unit in UNITS[:-1]:
        if size < 1000:
            return f"{size:.3g} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} {UNITS[-1]}"


def push(folder: Path, repo: str, public: bool) -> None:
    """Send a folder in one commit; the repository is made if it is not there, private by default.

    Raises ValueError for a public one that was not asked for, OSError when the Hub refuses or is
    not there.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.repo_info(repo).private:
            raise ValueError(f"{repo} is there and public: say --public, or name another")
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="A student in few steps"
        )
    except (HTTPError, ConnectionError) as error:
        raise OSError(
            f"{repo} was not reached or refused: {' '.join(str(error).split())}. {folder} is "
            f"whole; send it by --output {folder} --push_to_hub {repo} without a run"
        ) from error
    logger.info("sent to %s", commit.commit_url)
