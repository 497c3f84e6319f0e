"""Strips are written by a thread, and what goes wrong there is said by the loop."""

import threading
import time

import pytest
import torch
from PIL import Image

from senseflow.engine import strips as module
from senseflow.engine.strips import Strips

CPU = torch.device("cpu")
COLUMNS = {"generated": torch.zeros(2, 3, 96, 96), "real": torch.ones(2, 3, 96, 96)}


def test_a_strip_is_there_at_the_end_and_nobody_waited_for_it(tmp_path, monkeypatch):
    allowed, write = threading.Event(), module.save_whole

    def slowly(picture, file):
        allowed.wait(10)
        write(picture, file)

    monkeypatch.setattr(module, "save_whole", slowly)
    with Strips(CPU) as strips:
        strips.write(tmp_path / "samples" / "step_0000001.png", COLUMNS)
        strips.check()
        assert not (tmp_path / "samples").exists()
        allowed.set()
    with Image.open(tmp_path / "samples" / "step_0000001.png") as strip:
        assert strip.size == (2 * 96, 16 + 2 * 96)
        assert strip.getpixel((10, 100)) == (128, 128, 128)
        assert strip.getpixel((100, 100)) == (255, 255, 255)


def unwritable(tmp_path):
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "step_0000001.png"


def test_a_failure_is_raised_by_whoever_is_next(tmp_path):
    file = unwritable(tmp_path)
    said = f"writing {file} failed: "
    strips = Strips(CPU)
    strips.write(file, COLUMNS)
    with pytest.raises(OSError, match=said):
        strips.write(tmp_path / "next.png", COLUMNS)
    strips.write(file, COLUMNS)
    with pytest.raises(OSError, match=said):
        for _ in range(1000):
            strips.check()
            time.sleep(0.01)
    strips.check()  # said once
    with pytest.raises(OSError, match=said), strips:
        strips.write(file, COLUMNS)


def test_a_failure_at_the_end_does_not_hide_why_the_run_ends(tmp_path, caplog):
    with pytest.raises(RuntimeError, match="another rank is gone"), Strips(CPU) as strips:
        strips.write(unwritable(tmp_path), COLUMNS)
        raise RuntimeError("another rank is gone")
    assert "failed: " in caplog.text
