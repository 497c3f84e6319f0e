"""Drawing images with students and teachers, from Python; docs/sampling.md."""

from senseflow.sampling.api import load_student, load_teacher, sample
from senseflow.sampling.drawing import Drawing

__all__ = ["Drawing", "load_student", "load_teacher", "sample"]
