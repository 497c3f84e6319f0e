"""Steps that are not finite: counted, skipped, and what a run that has too many leaves.

The numbers are made NaN in the losses themselves, in whole runs of the loop on toy networks.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from sharded import assert_same, values
from torch import Tensor
from toy import toy_batch, toy_config, toy_distillation

from senseflow.common.ranks import Ranks, start_ranks
from senseflow.common.signals import StopRequest
from senseflow.config.config import Config
from senseflow.config.sections import LogConfig
from senseflow.distill import algorithm
from senseflow.distill.measures import Step
from senseflow.engine import loop
from senseflow.engine.checkpoint_folders import read_manifest
from senseflow.engine.loop import NonFiniteError, Run
from senseflow.engine.parallel import shard
from senseflow.engine.skips import Skips, in_words

LENGTH = 8
Bad = Callable[[str, int, int], bool]  # whether a network's loss is NaN: its name, iteration, retry


def config_of(**train) -> Config:
    """No adversary; theta's turn is every second iteration."""
    settings = dict(iter_num=LENGTH, save_interval=4, log_interval=1) | train
    config = toy_config(adversarial=dict(kind="none"), train=settings)
    return replace(config, log=LogConfig(sample_interval=0, tensorboard=False))


def toy_run(folder: Path, ranks: Ranks, config: Config) -> Run:
    folder.mkdir(exist_ok=True)
    parts = toy_distillation(config)
    for trained in (parts.generator, parts.fake_score):
        shard(trained.network, [], ranks.mesh)
    parts = replace(
        parts,
        generator=type(parts.generator).build(parts.generator.network, 1e-2, config.optimizer),
        fake_score=type(parts.fake_score).build(parts.fake_score.network, 1e-2, config.optimizer),
    )
    size = 4 // ranks.world_size
    batches = [toy_batch(size, first=size * ranks.rank)]
    return Run(config, parts, ranks, lambda start: iter(lambda: batches, None), None, folder)


def train(run: Run, bad: Bad, stop: StopRequest | None = None) -> Run:
    """To its end, with losses of NaN where `bad` says so."""
    now = [0, 0]

    def iteration(parts, batches, number, measures):
        now[:] = number, parts.retry
        return train_iteration(parts, batches, number, measures)

    def spoilt(name: str, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args: loss(*args) * (torch.nan if bad(name, *now) else 1)

    patch, train_iteration = pytest.MonkeyPatch(), algorithm.train_iteration
    with patch.context() as patched:
        patched.setattr(loop, "train_iteration", iteration)
        patched.setattr(Run, "write_students", lambda *args, **kwargs: None)
        for name, loss in (("generator", "dmd_loss"), ("fake_score", "fake_score_loss")):
            patched.setattr(algorithm, loss, spoilt(name, getattr(algorithm, loss)))
        with run.checkpoints:
            run.train(run.resume(), stop or StopRequest(), show=False)
    return run


def everywhere(*iterations: int) -> Bad:
    """All losses of these iterations, at the first try alone."""
    return lambda name, iteration, retry: iteration in iterations and retry == 0


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(row) for row in (folder / "stats.jsonl").read_text().splitlines()]


def skipped_in(folder: Path) -> dict[int, set[str]]:
    found = {
        int(row["iteration"]): {k.removeprefix("skipped/") for k in row if k.startswith("skipped/")}
        for row in rows(folder)
    }
    return {iteration: names for iteration, names in found.items() if names}


def test_a_stop_leaves_as_long_as_the_last_save_took(tmp_path):
    """Of what the loop hands on; what a request makes of it is in common/test_stop.py."""
    stop = StopRequest()
    run = train(toy_run(tmp_path, start_ranks(), config_of(iter_num=1)), everywhere(), stop)
    assert stop.lead_s == run.checkpoints.seconds > 0


# ------------------------------------------------------------------------------------ the rule


def steps(text: str) -> list[Step]:
    """Such as "g1 f2!": the generator's step of iteration 1, fake's of 2, which was skipped."""
    return [Step(int(w[1:].rstrip("!")), w[0], not w.endswith("!")) for w in text.split()]


def test_each_network_counts_its_own_steps_in_a_row():
    """One that steps rarely is stopped too, however fine the others are in between."""
    skips = Skips(limit=1)
    assert skips.note(steps("f1 f2! g2! f3 f4")) == {"f": [2], "g": [2]}
    assert skips.in_a_row == {"g": 1} and not skips.too_many and skips.good == 4
    assert skips.note(steps("f5 g5!")) == {"g": [5]}
    assert skips.in_a_row == {"g": 2} and skips.too_many


def test_too_many_in_a_row_are_seen_after_they_are_over():
    skips = Skips(limit=0)
    skips.note(steps("f1 f2! f3"))
    assert skips.too_many and skips.in_a_row == {} and skips.good == 3


def test_good_is_the_last_iteration_in_which_anything_moved():
    skips = Skips(limit=3, good=6)
    skips.note(steps("f7! g8! f8! f9!"))
    assert skips.good == 6
    skips.note(steps("f10! h10"))
    assert skips.good == 10


def test_words_name_networks_and_iterations():
    assert in_words({"generator": [10], "fake_score": list(range(1, 8))}) == (
        "generator in 10; fake_score in 1, 2, 3, 4, 5, ..."
    )


# ------------------------------------------------------------------------------------- one rank


@pytest.mark.parametrize("bad", [(3,), (3, 4, 5)])
def test_a_run_goes_on_past_a_few(bad, tmp_path, caplog):
    run = train(toy_run(tmp_path, start_ranks(), config_of()), everywhere(*bad))
    turns = {i: {"fake_score"} | ({"generator"} if i % 2 == 0 else set()) for i in bad}
    assert skipped_in(tmp_path) == turns and run.skips.in_a_row == {}
    assert [row["iteration"] for row in rows(tmp_path)] == list(range(1, LENGTH + 1))
    assert "loss/fake" not in rows(tmp_path)[2] and "loss/fake" in rows(tmp_path)[1]
    said = "grad_norm/fake_score, loss/fake not finite in iterations 3 to 3; steps skipped: "
    assert f"{said}fake_score in 3. The run goes on: up to 3 in a row" in caplog.text


def test_no_step_of_a_skipped_iteration_leaves_a_trace(tmp_path):
    whole = train(toy_run(tmp_path / "a", start_ranks(), config_of(iter_num=4)), everywhere())
    # The iterations after 4 change nothing, and so does their IDA.
    more = train(toy_run(tmp_path / "b", start_ranks(), config_of(iter_num=7)), everywhere(5, 6, 7))
    assert_same(values(whole.trained), values(more.trained))


def test_too_many_save_and_stop_and_the_same_command_goes_on(tmp_path, caplog):
    """From before the steps that changed nothing, with other draws, and to the end."""
    caplog.set_level(logging.INFO, "senseflow")
    whole = train(toy_run(tmp_path / "a", start_ranks(), config_of(iter_num=5)), everywhere())
    forever, folder = everywhere(*range(6, LENGTH + 20)), tmp_path / "b"
    config = config_of(iter_num=LENGTH + 20, save_interval=100, log_interval=5)
    stopped = toy_run(folder, start_ranks(), config)
    with pytest.raises(NonFiniteError) as error:
        train(stopped, forever)
    assert "not finite in iterations 6 to 10; steps skipped: " in str(error.value)
    assert "fake_score in 6, 7, 8, 9, 10" in str(error.value) and "generator in 6, 8" in str(
        error.value
    )
    assert f"Iteration 5 is saved in {folder / 'checkpoints'}, without them" in str(error.value)
    assert_same(values(whole.trained), values(stopped.trained))
    (saved,) = (folder / "checkpoints").iterdir()
    assert saved.name == "step_0000005" and (folder / "last_iter").read_text() == "5\n"
    facts = read_manifest(saved)
    assert facts["retry"] == 1 and facts["skipped"] == {}
    again = toy_run(folder, start_ranks(), replace(config, train=replace(config.train, iter_num=8)))
    assert train(again, forever).parts.retry == 1
    assert rows(folder)[-1]["iteration"] == 8 and rows(folder)[-1]["skipped/stops"] == 1
    assert skipped_in(folder) == {8: {"stops"}}


def test_a_run_that_never_took_a_step_is_saved_as_it_began(tmp_path):
    with pytest.raises(NonFiniteError, match="Iteration 0 is saved"):
        train(toy_run(tmp_path, start_ranks(), config_of(max_skipped=0)), everywhere(1))
    assert (tmp_path / "last_iter").read_text() == "0\n"
    run = train(toy_run(tmp_path, start_ranks(), config_of(max_skipped=0)), everywhere(1))
    assert run.parts.retry == 1 and rows(tmp_path)[0]["iteration"] == 1


def test_a_stop_within_a_row_of_skips_forgets_nothing(tmp_path):
    """Two before a checkpoint and two after it are four, as they are without the stop."""
    config, bad = config_of(), everywhere(3, 4, 5, 6)
    for folder, lengths in ((tmp_path / "a", (8,)), (tmp_path / "b", (4, 8))):
        for length in lengths:
            run = toy_run(
                folder, start_ranks(), replace(config, train=replace(config.train, iter_num=length))
            )
            if length == 4:
                train(run, bad)
                facts = read_manifest(folder / "checkpoints" / "step_0000004")
                assert facts["skipped"] == {"fake_score": 2, "generator": 1}
                continue
            with pytest.raises(NonFiniteError, match=r"iterations 6 to 6.*Iteration 4 is saved"):
                train(run, bad)
    runs = [train(toy_run(tmp_path / n, start_ranks(), config), bad) for n in ("a", "b")]
    assert_same(*(values(run.trained) for run in runs))


def test_without_a_skip_a_checkpoint_of_before_goes_on_to_the_same_bits(tmp_path):
    whole = train(toy_run(tmp_path / "a", start_ranks(), config_of()), everywhere())
    folder = tmp_path / "b"
    train(toy_run(folder, start_ranks(), config_of(iter_num=4)), everywhere())
    file = folder / "checkpoints" / "step_0000004" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({key: manifest[key] for key in ("iteration", "files")}))
    run = train(toy_run(folder, start_ranks(), config_of()), everywhere())
    assert_same(values(whole.trained), values(run.trained))
    assert skipped_in(folder) == {}


# ------------------------------------------------------------------------------------ two ranks


def nan_on_the_second(rank: int, folder: str) -> None:
    """Both skip, both stop, and both go on."""
    ranks, config = start_ranks(), config_of()
    once = train(
        toy_run(Path(folder) / "once", ranks, config),
        lambda name, iteration, retry: iteration in (3, 4, 5) and rank == 1,
    )
    assert once.skips.longest == 3 and once.skips.good == LENGTH
    for last in (False, True):
        run = toy_run(Path(folder) / "ever", ranks, config)
        bad = lambda name, iteration, retry: iteration > 4 and rank == 1 and retry == 0  # noqa: E731
        if last:
            assert train(run, bad).parts.retry == 1
        else:
            with pytest.raises(NonFiniteError, match="Iteration 4 is saved"):
                train(run, bad)


def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path):
    on_ranks(2, nan_on_the_second, str(tmp_path))
    assert skipped_in(tmp_path / "once") == {
        3: {"fake_score"}, 4: {"fake_score", "generator"}, 5: {"fake_score"},
    }  # fmt: skip
    assert rows(tmp_path / "ever")[-1]["iteration"] == LENGTH
