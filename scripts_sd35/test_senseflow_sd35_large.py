"""Sample images from an SD3.5 Large student; `--help` says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from senseflow.sampling.cli import main
from senseflow.teachers.sd35.family import SD35_LARGE

if __name__ == "__main__":
    sys.exit(main(SD35_LARGE))
