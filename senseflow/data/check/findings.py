"""What a check found: sentences, the samples they are about, and whether one ends the run."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["stops", "warning", "note"]
Place = int | list[int]  # of one sample, or of a group of equal ones


@dataclass(frozen=True)
class Finding:
    """One thing that is said. stops: a run would end by it."""

    name: str
    level: Level
    words: str
    places: list[Place] = field(default_factory=list)  # the worst first
    reasons: list[str] = field(default_factory=list)  # of each place, where they differ


@dataclass(frozen=True)
class Limits:
    """What a run with a configuration would do."""

    resolution: tuple[int, int]  # height, width
    max_unreadable: int = 100
    random_crop: bool = False


@dataclass(frozen=True)
class Checked:
    """All that is said of a data set."""

    num: int
    findings: list[Finding]
    numbers: dict[str, Any]  # plain values, for the JSON

    @property
    def stops(self) -> bool:
        """Whether a run would stop at what was found."""
        return any(finding.level == "stops" for finding in self.findings)


def share(count: int, num: int) -> str:
    """`3 of 400 (0.75 %)`."""
    return f"{count:,} of {num:,} ({percent(count / max(num, 1))})"


def percent(part: float) -> str:
    """`0.75 %`, `14 %`; never 0 % of some, nor 100 % of nearly all."""
    value = 100 * part
    if 0 < value < 0.01 or 99.5 <= value < 100:
        return "less than 0.01 %" if value < 1 else "nearly 100 %"
    return f"{plain(value)} %"


def plain(value: float) -> str:
    """Two digits, or a whole number, never an exponent: 0.034, 4.2, 27, 2,740."""
    return f"{value:,.0f}" if abs(value) >= 9.95 else f"{value:.2g}"


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Lowest, 1, 10, 50, 90, 99 %, highest; nothing of nothing."""
    ordered = sorted(values)
    if not ordered:
        return {}
    places = {"least": 0.0, "p1": 0.01, "p10": 0.1, "median": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: ordered[int(at * (len(ordered) - 1))] for name, at in places.items()}
    return {**found, "most": ordered[-1]}
