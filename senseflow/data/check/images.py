"""What the images of a data set would do to a run: unreadable, small, cut, flat, equal ones."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from senseflow.data.check.duplicates import BITS, exact_groups, near_groups
from senseflow.data.check.findings import Finding, Limits, percent, percentiles, plain, share
from senseflow.data.check.looking import Look, Seen

MOST_CUT = 0.4  # of the picture, by the crop: at 1:1 an aspect beyond 5:3
FLAT = 3.0  # levels of 255: nearly one colour
USUAL_MODES = ("RGB", "L")


def enlargement(look: Look, resolution: tuple[int, int]) -> float:
    """How many times larger a picture is made to cover the resolution; below 1: smaller."""
    return max(resolution[0] / look.height, resolution[1] / look.width)


def cut_away(look: Look, resolution: tuple[int, int]) -> float:
    """The share of a picture that the crop takes away, in [0, 1)."""
    covered = look.width * look.height * enlargement(look, resolution) ** 2
    return 1 - resolution[0] * resolution[1] / covered


def image_findings(paths: list[str], seen: Sequence[Seen], limits: Limits) -> list[Finding]:
    """All that is to be said of the images, those that stop a run first."""
    looks = [found if isinstance(found, Look) else None for found in seen]
    findings = [
        _unreadable(paths, seen, limits.max_unreadable),
        _small(looks, limits.resolution),
        _cut(looks, limits),
        _flat(looks),
        *_equal(paths, looks),
        *_odd(looks),
    ]
    return [finding for finding in findings if finding is not None]


def image_numbers(seen: Sequence[Seen], resolution: tuple[int, int]) -> dict[str, Any]:
    """Sizes, formats and disk, as plain values."""
    looks = [found for found in seen if isinstance(found, Look)]
    return {
        "readable": len(looks),
        "bytes": sum(look.num_bytes for look in looks),
        "short_side": percentiles(min(look.width, look.height) for look in looks),
        "aspect": percentiles(look.width / look.height for look in looks),
        "enlargement": percentiles(enlargement(look, resolution) for look in looks),
        "cut_away": percentiles(cut_away(look, resolution) for look in looks),
        "modes": dict(Counter(look.mode for look in looks).most_common()),
    }


def _unreadable(paths: list[str], seen: Sequence[Seen], limit: int) -> Finding | None:
    found = [(place, why) for place, why in enumerate(seen) if isinstance(why, str)]
    if not found:
        return None
    # A run counts a file once, however many rows name it.
    num_files = len({(paths[place], why) for place, why in found})
    stops = num_files > limit or len(found) == len(seen)
    said = f"{share(len(found), len(seen))} cannot be read"
    allowed = f"data.max_unreadable allows {limit}"
    words = f"{said}; {allowed}" if stops else f"{said} and would be passed over; {allowed}"
    places, reasons = [place for place, _ in found], [why for _, why in found]
    return Finding("unreadable", "stops" if stops else "warning", words, [*places], reasons)


def _small(looks: list[Look | None], resolution: tuple[int, int]) -> Finding | None:
    scales = {i: enlargement(look, resolution) for i, look in enumerate(looks) if look is not None}
    places = sorted((i for i, scale in scales.items() if scale > 1), key=lambda i: -scales[i])
    if not places:
        return None
    height, width = resolution
    words = (
        f"{share(len(places), len(looks))} are smaller than {width}x{height} and would be "
        f"enlarged, up to {plain(scales[places[0]])} times: they teach blur"
    )
    return Finding("small", "warning", words, [*places], [f"{plain(scales[i])} x" for i in places])


def _cut(looks: list[Look | None], limits: Limits) -> Finding | None:
    resolution = limits.resolution
    cuts = {i: cut_away(look, resolution) for i, look in enumerate(looks) if look is not None}
    places = sorted((i for i, cut in cuts.items() if cut > MOST_CUT), key=lambda i: -cuts[i])
    if not places:
        return None
    where = "random" if limits.random_crop else "centre"
    words = (
        f"{share(len(places), len(looks))} lose more than {percent(MOST_CUT)} to the {where} "
        f"crop, up to {percent(cuts[places[0]])}: captions may name what is cut away"
    )
    return Finding("cut", "warning", words, [*places], [f"-{percent(cuts[i])}" for i in places])


def _flat(looks: list[Look | None]) -> Finding | None:
    spreads = {i: look.spread for i, look in enumerate(looks) if look and look.spread < FLAT}
    if not spreads:
        return None
    words = f"{share(len(spreads), len(looks))} are nearly one colour"
    return Finding("flat", "warning", words, [*sorted(spreads, key=lambda i: spreads[i])])


def _equal(paths: list[str], looks: list[Look | None]) -> list[Finding]:
    """Files listed twice, pictures with equal pixels, pictures that nearly are one."""
    first: dict[str, int] = {}
    again: list[int] = []
    for place, path in enumerate(paths):
        if first.setdefault(path, place) != place:
            again.append(place)
    repeats = set(again)
    once = [None if place in repeats else look for place, look in enumerate(looks)]
    findings = []
    if again:
        words = f"{share(len(again), len(paths))} name a file that an earlier row names too"
        findings.append(Finding("listed again", "note", words, [*again]))
    nearly, apart = "are nearly the picture", f"; at most {BITS} of 64 bits of a DCT hash apart"
    for name, groups, said, how in (
        ("duplicates", exact_groups(once), "repeat the pixels", ""),
        ("near duplicates", near_groups(once), nearly, apart),
    ):
        if groups:
            more = share(sum(len(group) - 1 for group in groups), len(looks))
            num = f"{len(groups)} group{'s' if len(groups) > 1 else ''}"
            places = sorted(groups, key=lambda group: -len(group))
            words = f"{more} {said} of another ({num}{how})"
            findings.append(Finding(name, "warning", words, [*places]))
    return findings


def _odd(looks: list[Look | None]) -> list[Finding]:
    """What the reader changes without harm, said so that no one wonders."""
    known = [(i, look) for i, look in enumerate(looks) if look is not None]
    cases = [
        ("turned", "are turned upright by their EXIF orientation",
         [i for i, look in known if look.turned]),
        ("animated", "are animations, of which the first frame is read",
         [i for i, look in known if look.num_frames > 1]),
        ("converted", "are not RGB or 8-bit grey and are converted (transparency to white; colour "
         "profiles are not applied)", [i for i, look in known if look.mode not in USUAL_MODES]),
    ]  # fmt: skip
    return [
        Finding(name, "note", f"{share(len(places), len(looks))} {words}", [*places])
        for name, words, places in cases
        if places
    ]
