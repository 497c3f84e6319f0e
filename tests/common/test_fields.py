"""What a user gives: bounds, and how the error names it."""

import math

import pytest

from senseflow.common.fields import FieldError, check_range


@pytest.mark.parametrize("most", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, -math.inf, -1e-9])
def test_what_is_not_in_the_range_is_refused(value, most):
    with pytest.raises(FieldError, match=r"^weight \S+ must be (at least 0|from 0 to 1)"):
        check_range("weight", value, 0, most)


def test_the_ends_and_none_are_in_the_range():
    for value in (None, 0, 0.5, 1.0):
        check_range("weight", value, 0, 1.0)
    check_range("weight", 1e30, 0)
