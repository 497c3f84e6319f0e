"""Small files, written whole, by several processes at once."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from PIL import Image
from small_disk import fill, read_only, small_disk

from senseflow.common.commands import exit_status
from senseflow.common.files import (
    only_writer,
    parse_json,
    read_json,
    require_writable,
    write_whole,
)
from senseflow.common.pictures import save_whole
from senseflow.common.weights_files import fault_of
from senseflow.data.cache_index import read_index
from senseflow.data.check import __main__ as check
from senseflow.data.image_lists import read_lists
from senseflow.engine.checkpoint_folders import read_manifest
from senseflow.engine.hold import HOLD, require_free
from senseflow.evaluate import results
from senseflow.plan import __main__ as plan
from senseflow.reconstruction_error.measure import Rows
from senseflow.report import run_folder
from senseflow.sampling.job import read_sidecar
from senseflow.teachers.folder import base_config
from senseflow.weights.stored import shards_of

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


def test_a_folder_that_can_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (Path(), Path("new/and/deeper"), tmp_path / "new"):
        require_writable("--output", folder)
    assert not [*tmp_path.iterdir()]


def test_one_that_cannot_is_said_before_any_work(tmp_path, capsys):
    file = tmp_path / "data.json"
    file.write_text("{")  # which is not read either
    assert plan.main(["--table", "--output", str(file / "plan.md")]) == 2
    assert f"--output {file} is a file: name a folder" in capsys.readouterr().err
    words = [str(file), "--resolution", "8", "--output", str(file / "a" / "b")]
    assert check.main(words) == 2
    assert f"b is under {file}, which is a file: name a folder" in capsys.readouterr().err
    read = "new cannot be written: Read-only file system"
    with read_only(tmp_path / "disk") as disk, pytest.raises(ValueError, match=read):
        require_writable("--output", disk / "new")


def test_a_pipe_or_device_is_written_to_and_stays(tmp_path):
    """`senseflow.plan --output /dev/null`, as root, would leave a file in the device's place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        write_whole(pipe, "a plan\n")
        assert reader.read() == "a plan\n"
    assert pipe.is_fifo() and [*tmp_path.iterdir()] == [pipe]


def test_a_full_disk_is_named_and_the_earlier_file_stays(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "64k") as disk:
        write_whole(disk / "data.json", "earlier")

        def work() -> None:
            write_whole(disk / "data.json", "x" * 2**17)

        assert exit_status(work, "") == 2
        assert [f.name for f in disk.iterdir()] == ["data.json"]
        assert (disk / "data.json").read_text() == "earlier"
    said = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path}/disk/data.json'. Free some of the disk" in said


def test_a_picture_that_a_full_disk_has_no_room_for_is_named(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        fill(disk)
        with pytest.raises(OSError, match=r"No space left on device: '.*disk/a.png'"):
            save_whole(Image.new("RGB", (8, 8)), disk / "a.png")
        assert [f.name for f in disk.iterdir()] == ["fill"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32-le"])
def test_json_in_any_of_utfs_encodings(tmp_path, encoding):
    """As editors of other systems save it; utf-16 writes a byte order mark too."""
    file = tmp_path / "a.json"
    file.write_text('{"a": "é \U0001f600"}', encoding=encoding)
    assert read_json(file) == {"a": "é \U0001f600"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("[" * 5000, "nested too deeply"), ("{", "Expecting"), (b"\xff", "utf-8"), ("", "Expecting")],
)
def test_what_is_no_json_is_one_line_with_its_name(text, message):
    with pytest.raises(ValueError, match=f"^the file is not valid JSON: .*{message}"):
        parse_json(text, "the file")


def test_brackets_thousands_deep_are_damage_to_every_reader_of_json(tmp_path):
    deep = '{"a":' * 5000
    for name in ("manifest.json", "index.json", "config.json"):
        (tmp_path / name).write_text(deep)
    assert "nested too deeply" in read_manifest(tmp_path)["damage"]
    assert read_sidecar(tmp_path / "config.json") is None and run_folder._row(deep) is None
    (tmp_path / "metrics.jsonl").write_text(f"{deep}\n{json.dumps({'sample': 0})}\n")
    assert Rows(tmp_path / "metrics.jsonl", {"sample": 0}).rows == []
    (tmp_path / HOLD).write_text(deep[:4096])
    require_free(tmp_path)
    header = f"{deep}1".encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert "whose header is none" in (fault_of(tmp_path / "x.safetensors") or "")
    for read in (
        lambda: read_index(tmp_path),
        lambda: base_config(tmp_path.parent, tmp_path.name),
        lambda: read_lists(tmp_path / "index.json"),
        lambda: shards_of(tmp_path / "index.json"),
    ):
        with pytest.raises(ValueError, match="nested too deeply"):
            read()


def test_two_that_write_one_output_do_not_mix_their_files(tmp_path):
    output = tmp_path / "new" / "student"
    with only_writer(output):
        said = "student is being written by another process"
        with pytest.raises(ValueError, match=said), only_writer(output):
            pass
        with only_writer(output.with_name("other")):
            output.mkdir()
    assert [f.name for f in output.parent.iterdir()] == ["student"]
    with only_writer(output):  # the first is done
        pass
