"""A student's card, `senseflow.json` beside its weights: how it was trained, how it is sampled."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from senseflow.core.levels import counted

CARD = "senseflow.json"  # beside a student's weights: how it was trained
CARD_FORMAT = 1


@dataclass(frozen=True)
class StudentCard:
    """How a student was trained, and so how it is to be sampled: `senseflow.json` beside it."""

    family: str
    anchors: tuple[float, ...]  # from noisy to clean: sigmas, or SDXL's timesteps as int
    height: int  # pixels trained at
    width: int
    guidance: float | None  # embedded guidance, if the network has it
    max_sequence_length: int | None  # T5 tokens; None: no T5
    base_name: str
    base_fingerprint: str  # of the teacher's weights, see base_fingerprint
    iteration: int
    ema: float | None = None  # decay, when the weights are the student's average

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", counted(self.anchors))


def write_card(folder: Path, card: StudentCard) -> None:
    """Write `senseflow.json` to a student's folder."""
    tree = dataclasses.asdict(card)
    base = {"name": tree.pop("base_name"), "fingerprint": tree.pop("base_fingerprint")}
    (folder / CARD).write_text(
        json.dumps({"format": CARD_FORMAT, **tree, "base": base}, indent=2) + "\n"
    )


def read_card(folder: Path) -> StudentCard | None:
    """The card in a student's folder, None without one; raises ValueError when damaged."""
    file = folder / CARD
    if not file.is_file():
        return None
    try:
        tree = json.loads(file.read_text())
        number, base = tree.pop("format"), tree.pop("base")
        if number != CARD_FORMAT:
            raise ValueError(f"format {number}; this version reads format {CARD_FORMAT}")
        card = StudentCard(**tree, base_name=base["name"], base_fingerprint=base["fingerprint"])
    except KeyError as error:
        raise ValueError(f"{file} is not a student's card: it has no {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a student's card: {error}") from error
    return card
