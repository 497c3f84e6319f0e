"""Small files, written whole, by several processes at once."""

import json
import multiprocessing
from pathlib import Path

from senseflow.evaluation import results

NUM = 25


def put_many(file: Path, worker: int) -> None:
    for number in range(NUM):
        entry = {"name": f"{worker} {number}", "metric": "clip", "value": 1.0, "num_images": 2,
                 "weights": [], "model": "m", "settings": {}}  # fmt: skip
        results.put(file, entry)


def test_processes_that_write_one_file_of_results_lose_nothing(tmp_path):
    file = tmp_path / "results.json"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=put_many, args=(file, worker)) for worker in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    names = {entry["name"] for entry in json.loads(file.read_text())}
    assert names == {f"{worker} {number}" for worker in range(3) for number in range(NUM)}
    assert [f.name for f in tmp_path.iterdir()] == ["results.json"]
