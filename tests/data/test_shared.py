"""What a spawned worker costs: lists of a data set are mapped, not copied."""

import json
import multiprocessing
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from python import PYTHON

from senseflow.data.json_images import JsonImages
from senseflow.data.sampler import Share, batches
from senseflow.data.shared import SharedArray, Texts

TEXTS = ["", "a red fox", "\u00e9t\u00e9 \U0001f98a", "half an emoji \ud83e", "two\nlines\0", ""]


def write(folder, num):
    """A data set of one picture and as many prompts as wanted."""
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a_name_as_long_as_those_of_a_large_data_set.png")
    lists = {
        "keys": [""] * num,
        "image_paths": ["a_name_as_long_as_those_of_a_large_data_set.png"] * num,
        "prompts": [
            f"a photograph of thing number {i} on a table, seen from above" for i in range(num)
        ],
    }
    (folder / "data.json").write_text(json.dumps(lists))
    return JsonImages(folder / "data.json", (8, 8))


def test_texts_are_the_list_they_are_made_of():
    texts = Texts(TEXTS)
    assert len(texts) == len(TEXTS)
    assert [*texts] == [texts[i] for i in range(len(TEXTS))] == TEXTS
    assert len(Texts([])) == 0 and [*Texts([])] == []


def test_arrays_keep_their_type_and_are_not_copied():
    keys = np.array([b"b", b"ab", b""], "S2")
    shared = SharedArray(keys)
    assert shared.array.tolist() == keys.tolist() and shared.array.dtype == keys.dtype
    assert np.shares_memory(shared.array, shared.array)


def test_a_worker_is_sent_none_of_the_samples(tmp_path):
    data = write(tmp_path / "set", 5_000)
    assert len(ForkingPickler.dumps(data)) < 5_000  # bytes


def worker_mb(data):
    """Megabytes of a loading worker that has read a batch: its own, and its part of shared ones."""
    before = set(psutil.Process().children())
    share = Share(seed=0, batch_size=2)
    samples = batches(data, share, num_workers=1, pin_memory=False, start=1)
    (batch,) = next(samples)
    assert torch.equal(batch.images, -torch.ones(2, 3, 8, 8))
    (worker,) = [p for p in set(psutil.Process().children()) - before if is_worker(p)]
    memory = worker.memory_full_info()
    return memory.uss / 1e6, memory.pss / 1e6


def is_worker(process):
    """Not the tracker of shared memory, which multiprocessing starts beside the first one."""
    return "spawn_main" in " ".join(process.cmdline())


@pytest.fixture
def own_python():
    """Workers are Python's own processes, not forks of the tests' (tests/parts/python.py)."""
    multiprocessing.set_executable(sys.executable)
    yield
    multiprocessing.set_executable(PYTHON)


@pytest.mark.long
def test_a_million_samples_cost_a_worker_next_to_nothing(tmp_path, own_python):
    few, many = worker_mb(write(tmp_path / "few", 10)), worker_mb(write(tmp_path / "many", 10**6))
    print(f"USS, PSS of a worker: {few} MB with 10 samples, {many} MB with a million")
    assert all(more - less < 20 for less, more in zip(few, many, strict=True))
