"""The made-up run that the tests of the report read."""

from pathlib import Path

import pytest
from made_up_run import copy_of, make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """Not to be changed by a test."""
    return make_run(tmp_path_factory.mktemp("runs") / "my <run>")


@pytest.fixture
def own(run, tmp_path) -> Path:
    """A copy of it for one test."""
    return copy_of(run, tmp_path / "run")
