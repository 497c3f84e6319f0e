"""Sample images from a Z-Image student; `--help` says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

import senseflow

senseflow.end_on_ctrl_c()  # from here on

from senseflow.sampling.cli import main  # noqa: E402
from senseflow.teachers.z_image.family import Z_IMAGE  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(Z_IMAGE))
