"""docs/cards.md is what the peaks beside it say, and those fall with the number of GPUs."""

import re
from argparse import Namespace
from itertools import pairwise

from senseflow.common.files import ROOT
from senseflow.plan.__main__ import recipe_files
from senseflow.plan.cards import Peaks, page
from senseflow.plan.costs import Gpu

PEAKS = Peaks.of(ROOT / "docs" / "cards.json")


def test_the_page_is_of_the_peaks():
    found = page(recipe_files(Namespace(config=None)), PEAKS, Gpu(80, 0.4))
    assert found == (ROOT / "docs" / "cards.md").read_text()


def test_more_gpus_hold_no_more_each():
    """What the command goes by: a peak on fewer bounds one on more."""
    by_count: dict[str, dict[int, int]] = {}
    for key, peak in PEAKS.known.items():
        batch = re.search(r"train\.batch_size=(\d+)", key)
        assert batch, key
        if peak is not None:
            by_count.setdefault(key.replace(batch[0], ""), {})[int(batch[1])] = peak
    several = [[peaks[n] for n in sorted(peaks)] for peaks in by_count.values() if len(peaks) > 1]
    assert len(several) > 20
    assert all(more <= fewer for peaks in several for fewer, more in pairwise(peaks))
