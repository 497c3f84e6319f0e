"""Steps that were not finite: which were skipped, and when they are too many in a row."""

from dataclasses import dataclass, field

from senseflow.distill.measures import Step

SHOWN = 5  # iterations named of one network


@dataclass
class Skips:
    """What the steps of all networks come to; every rank counts alike.

    limit: a network may skip so many steps in a row. in_a_row: those that it has skipped up to now,
    by its name; a checkpoint keeps them. longest: the most that this process saw. good: the
    iteration to go on from: the last in which any network took its step, or the newest saved.
    """

    limit: int
    in_a_row: dict[str, int] = field(default_factory=dict)
    longest: int = 0
    good: int = 0

    def note(self, steps: list[Step]) -> dict[str, list[int]]:
        """Count steps, in their order; returns the iterations of the skipped ones by network."""
        skipped: dict[str, list[int]] = {}
        for step in steps:
            if step.taken:
                self.in_a_row.pop(step.network, None)
                self.good = max(self.good, step.iteration)
            else:
                self.in_a_row[step.network] = self.in_a_row.get(step.network, 0) + 1
                self.longest = max(self.longest, self.in_a_row[step.network])
                skipped.setdefault(step.network, []).append(step.iteration)
        return skipped

    @property
    def too_many(self) -> bool:
        """Whether a network skipped more in a row than it may, in this process."""
        return self.longest > self.limit


def in_words(skipped: dict[str, list[int]]) -> str:
    """Such as "generator in 10; fake_score in 7, 8, 9, 10"."""
    parts = []
    for network, iterations in skipped.items():
        more = ", ..." if len(iterations) > SHOWN else ""
        parts.append(f"{network} in {', '.join(map(str, iterations[:SHOWN]))}{more}")
    return "; ".join(parts) or "none"
