"""Sample images from a Qwen-Image student; `--help` says how."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

import senseflow

senseflow.end_on_ctrl_c()  # from here on

from senseflow.sampling.cli import main  # noqa: E402
from senseflow.teachers.qwen_image.family import QWEN_IMAGE  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(QWEN_IMAGE))
