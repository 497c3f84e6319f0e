"""The Python that tests start processes with: quick_python.py's, where conftest.py keeps it."""

import os
import sys

from quick_python import VARIABLE

PYTHON = os.environ.get(VARIABLE, sys.executable)
