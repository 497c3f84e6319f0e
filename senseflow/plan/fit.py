"""The smallest set of changes with which a run fits, the cheapest first, each claim traced.

Changes are taken in the order of `senseflow.plan.remedies.candidates`. Of the beginnings of that
list the shortest that fits is found by halving, as a further change should not add to a peak (one
that may is traced alone, and is none where it does); then each change but the last, the dearest
first, is left out where it fits without. So a change of fidelity is made only where all that cost
none are not enough, and none of the set can be spared. If a change adds to a peak after all, the
set may not be the smallest; that it fits was traced in any case.

A rehearsal ends at the first kind of iteration that does not fit. Sets are compared by the kind in
which the configuration does not; the one that is named has been traced with all kinds, and where
another does not fit in it, sets are compared by both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from senseflow.plan.costs import Gpu
from senseflow.plan.plan import Plan, Wanted, make_plan
from senseflow.plan.rehearsal import Kind
from senseflow.plan.remedies import Change, candidates, changed, passed_over, together

Changes = tuple[Change, ...]


@dataclass(frozen=True)
class Rehearsed:
    """One rehearsal: of what, and what it said."""

    changes: Changes
    num_kinds: int  # of iterations that were traced
    peak: int  # bytes, of these kinds
    fits: bool


@dataclass(frozen=True)
class Fit:
    """The changes that fit, or, where none do, all of them."""

    wanted: Wanted
    plan: Plan  # with them, of all kinds
    changes: Changes
    rehearsals: list[Rehearsed]


def fit(wanted: Wanted, gpu: Gpu) -> Fit:
    """Trace until a set is found; raises ValueError as a run would for its configuration."""
    search = Search(wanted, gpu)
    plan = search.trace((), None)
    if plan.fits(gpu):
        return Fit(wanted, plan, (), search.rehearsals)
    all_kinds, kinds = plan.kinds, [plan.costs.worst()]
    every = search.useful(plan, kinds)
    while True:
        chosen = search.smallest(every, kinds)
        plan = search.trace(chosen, all_kinds)
        if not plan.fits(gpu) and chosen == every:
            plan = search.trace(chosen, all_kinds, to_the_end=True)
        if plan.fits(gpu) or chosen == every:
            return Fit(wanted, plan, chosen, search.rehearsals)
        kinds.append(plan.costs.worst())


@dataclass
class Search:
    """What has been traced of a configuration and its changes."""

    wanted: Wanted
    gpu: Gpu
    plans: dict[Changes, Plan] = field(default_factory=dict)
    rehearsals: list[Rehearsed] = field(default_factory=list)

    def trace(
        self, changes: Changes, kinds: Sequence[Kind] | None, to_the_end: bool = False
    ) -> Plan:
        """The plan with these changes, of these kinds (None: of all) or until one does not fit."""
        known = self.plans.get(changes)
        if known and {*(kinds or known.kinds)} <= known.costs.traced.keys():
            return known
        if known and not known.fits(self.gpu) and not to_the_end:
            return known
        within = None if to_the_end else self.gpu
        plan = make_plan(changed(self.wanted, changes), kinds, within)
        self.plans[changes] = plan
        num_kinds, fits = len(plan.costs.traced), plan.fits(self.gpu)
        self.rehearsals.append(Rehearsed(changes, num_kinds, plan.peak, fits))
        return plan

    def useful(self, plan: Plan, kinds: Sequence[Kind]) -> Changes:
        """The candidates but those that add to the plan's peak, which is of these kinds.

        Where all together do not fit, their first ones that do: a step in fewer bits works on
        pieces of a fixed size, and recomputation keeps some, which is more than a small network.
        """
        found = tuple(c for c in candidates(plan) if self.saves(c, plan, kinds))
        if self.trace(found, kinds).fits(self.gpu):
            return found
        beginnings = (found[:num] for num in range(1, len(found)))
        return next((b for b in beginnings if self.trace(b, kinds).fits(self.gpu)), found)

    def saves(self, change: Change, plan: Plan, kinds: Sequence[Kind]) -> bool:
        """Whether a change lowers the plan's peak; where it may not, or may not be for this run,
        it is traced alone."""
        if not (change.may_add or change.may_fail):
            return True
        try:
            return self.trace((change,), kinds).peak < plan.peak
        except ValueError as error:
            passed_over(change, error)
            return False

    def smallest(self, every: Changes, kinds: Sequence[Kind]) -> Changes:
        """The set that fits by these kinds, of which one alone does not fit without changes;
        `every` change where not even they do.

        A change that a later one supersedes (what is recomputed in part by what is recomputed
        whole) is left out without a rehearsal.
        """

        def fits(changes: Changes) -> bool:
            return self.trace(changes, kinds).fits(self.gpu)

        if not fits(every):
            return every
        too_few, enough = 0, len(every)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            if fits(every[:middle]):
                enough = middle
            else:
                too_few = middle
        chosen = every[:enough]
        for change in reversed(chosen[:-1]):
            fewer = tuple(c for c in chosen if c is not change)
            if {*together(fewer)} == {*together(chosen)} or fits(fewer):
                chosen = fewer
        return chosen
