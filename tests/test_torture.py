"""A run that is killed again and again ends as if nothing had happened.

One process of a two-rank run is ended by kill -9, and the same command is run again. Half of the
kills come at random moments of the processes' life; half are aimed at a drawn phase of the run, at
its beginning where it is short and at a random moment of it where it is long. SENSEFLOW_KILLS is
their number, SENSEFLOW_KILL_SEED the seed of all choices.
"""

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from torture_worker import (
    AFTER_FAKE,
    AFTER_IDA,
    DATA,
    DISCRIMINATOR,
    EXPORT,
    GENERATOR,
    IDA,
    LAUNCHER,
    PHASES,
    RESUME,
    SAVE,
    WATCHED,
    Post,
    write_python,
)
from training_runs import environment, line, timeless_rows

from senseflow.tiny.pictures import write_dataset

RECIPE, RANKS, INTERVAL, LENGTH = "flux_senseflow", 2, 3, 42
SETTINGS = [
    f"train.iter_num={LENGTH}",
    f"train.save_interval={INTERVAL}",
    "train.keep_last=2",
    "train.batch_size=2",
    "train.log_interval=1",
    "log.sample_interval=0",
    "log.tensorboard=false",
    "lr_scheduler.warmup_iterations=0",
    "lr_scheduler.decay_iterations=20",
]
LONG = (SAVE, EXPORT, RESUME)
SHORT = (IDA, AFTER_IDA, AFTER_FAKE, DATA, GENERATOR, DISCRIMINATOR)
AIMS = (*LONG, *SHORT, SAVE)
END_S = 60  # a rank that dies ends the others, and the command, within this


def newest(folder: Path) -> int:
    """The iteration of the newest checkpoint whose manifest is there; 0 without one."""
    manifests = (folder / "checkpoints").glob("step_*/manifest.json")
    return max((int(file.parent.name.removeprefix("step_")) for file in manifests), default=0)


@dataclass
class Kill:
    """What was wished for, what was hit, and what was left on the disk."""

    aim: str | None  # None is a random moment
    rank: int | None  # None is the launcher, before there is a rank
    phase: str
    iteration: int  # the one under way
    saved: int  # the last one whose checkpoint the run took for saved
    before: int  # the newest checkpoint when the kill came
    after: int = 0  # and when all processes had ended
    end_s: float = 0.0
    survivors: list[str] = field(default_factory=list)

    def check(self) -> None:
        """The command ended; no checkpoint was lost, and no iteration but those since."""
        assert self.end_s < END_S, self
        assert not self.survivors or self.rank is None, self
        assert self.after >= max(self.before, self.saved), self
        assert self.iteration - self.after <= INTERVAL, self


class Life:
    """One start of the command, to its end or to a kill."""

    def __init__(self, folder: Path, data: Path, watched: Path) -> None:
        self.folder, self.watched, self.began = folder, watched, time.monotonic()
        self.found = newest(folder)
        self.posts = [Post(watched, rank) for rank in range(RANKS)]
        for post in self.posts:
            for name, value in dict(phase=0, pid=0, iteration=0, hold=-1, resumed=-1).items():
                post[name] = value
        self.output = watched / "output"
        self.launcher = psutil.Popen(
            line(RECIPE, folder, f"paths.dataset={data}", *SETTINGS, ranks=RANKS),
            env=environment(**write_python(watched)),
            stderr=self.output.open("w"),
            start_new_session=True,
        )

    def wait(self, reached: Callable[[], bool], look: Callable[["Life"], None]) -> bool:
        """Look on until `reached()`; False when the run ended before."""
        while self.launcher.poll() is None:
            if reached():
                return True
            look(self)
            time.sleep(0.002)
        return False

    def processes(self) -> Iterator[psutil.Process]:
        """All that live of this run."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(WATCHED) == str(self.watched):
                    yield process

    def kill(self, aim: str | None, rank: int) -> Kill:
        """kill -9 of this rank, or of the launcher where there is none yet; waits for the end."""
        post, before = self.posts[rank], newest(self.folder)
        victims = [process for process in self.processes() if process.pid == post["pid"]]
        with contextlib.suppress(psutil.NoSuchProcess):  # it may just have finished
            (victims[0] if victims else self.launcher).kill()
        killed = time.monotonic()
        phase = post.phase if victims else LAUNCHER
        saved = max(post["saved"] for post in self.posts)
        kill = Kill(aim, rank if victims else None, phase, post["iteration"], saved, before)
        with contextlib.suppress(psutil.TimeoutExpired):
            self.launcher.wait(END_S)
        kill.end_s = time.monotonic() - killed
        kill.survivors = self.clear()
        kill.after = newest(self.folder)
        return kill

    def clear(self) -> list[str]:
        """End what is left of the run, and tell what that was."""
        left = list(self.processes())
        names = [" ".join(process.cmdline()) for process in left]
        for process in left:
            process.kill()
        psutil.wait_procs(left)
        return names

    def check(self) -> None:
        """It went on from the newest complete checkpoint, and said so."""
        resumed = {post["resumed"] for post in self.posts} - {-1}
        assert resumed <= {self.found}, (resumed, self.found, self.output.read_text())
        if self.posts[0]["resumed"] > 0:
            name = f"{self.folder}/checkpoints/step_{self.found:07d}"
            assert f"going on from {name}" in self.output.read_text()


class Tormentor:
    """Chooses moments."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.aims: list[str | None] = []
        self.life_s = 0.0  # from the start of the command to the second checkpoint
        self.lasted_s: dict[str, float] = {}
        self.phase, self.since = LAUNCHER, 0.0

    def look(self, life: Life) -> None:
        """Learn how long a life and its phases are."""
        post, now = life.posts[0], time.monotonic()
        if post.phase != self.phase:
            self.lasted_s[self.phase] = now - self.since
            self.phase, self.since = post.phase, now
            if post["iteration"] == life.found + 2 * INTERVAL:
                self.life_s = now - life.began

    def aim(self) -> str | None:
        """A phase, each equally often, or None for a random moment, as often as all phases."""
        if not self.aims:
            self.aims = [*AIMS, *[None] * len(AIMS)]
            self.draw.shuffle(self.aims)
        return self.aims.pop()

    def moment(self, life: Life, aim: str | None, rank: int) -> Callable[[], bool]:
        """Tells when to kill."""
        if aim is None:
            end = life.began + self.draw.uniform(0, self.life_s)
            return lambda: time.monotonic() >= end
        post, delay = life.posts[rank], self.draw.random()
        first = 0 if aim == RESUME else life.found + self.draw.randint(1, 2 * INTERVAL)
        if aim in SHORT:
            post["hold_from"], post["hold"] = first, PHASES.index(aim)
        since: list[float] = []

        def reached() -> bool:
            if post.phase == aim and post["iteration"] >= first:
                since.append(time.monotonic())
            late = delay * self.lasted_s.get(aim, 0.0) if aim in LONG else 0.0
            return bool(since) and time.monotonic() - since[0] >= late

        return reached


def torture(
    folder: Path, data: Path, watched: Path, tormentor: Tormentor, num: int
) -> Iterator[Kill]:
    """Run to the end, killed up to `num` times on the way."""
    finished = False
    while not finished:
        life = Life(folder, data, watched)
        try:
            aim, rank = tormentor.aim(), tormentor.draw.randrange(RANKS)
            moment = tormentor.moment(life, aim, rank) if num else lambda: False
            finished = not life.wait(moment, tormentor.look)
            if not finished:
                num -= 1
                yield life.kill(aim, rank)
            life.check()
        finally:
            life.clear()
    assert life.launcher.returncode == 0, life.output.read_text()


def left_behind(folder: Path) -> dict[str, bytes]:
    """What a run leaves for its user: every student, and which checkpoints there are."""
    files = {f for f in folder.glob("student/*/*") if f.suffix == ".safetensors"}
    students = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    checkpoints = sorted(file.name for file in (folder / "checkpoints").iterdir())
    return {
        **students,
        "checkpoints": " ".join(checkpoints).encode(),
        "last_iter": (folder / "last_iter").read_bytes(),
    }


def report(kills: list[Kill], seed: int, began: float) -> str:
    """The histogram of the phases that were hit."""
    text = [f"{len(kills)} kills in {time.monotonic() - began:.0f} s, SENSEFLOW_KILL_SEED={seed}"]
    text += [f"{'phase':38} random  aimed"]
    for phase in PHASES:
        at_random, aimed = (
            sum(k.phase == phase and (k.aim is None) == chance for k in kills)
            for chance in (True, False)
        )
        text.append(f"{phase:38} {at_random:6} {aimed:6}  {'#' * (at_random + aimed)}")
    missed = Counter((k.aim, k.phase) for k in kills if k.aim not in (None, k.phase))
    text += [f"aimed at {aim}, met {phase}: {n}" for (aim, phase), n in missed.items()]
    slowest = max(kills, key=lambda kill: kill.end_s)
    lost = [k.iteration - k.after for k in kills if k.iteration]
    text.append(f"longest from a kill to the end of the command: {slowest.end_s:.1f} s ({slowest})")
    text.append(f"iterations lost per kill in training: {Counter(lost)}")
    return "\n".join(text)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A JSON data set of embedded pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, num=24, seed=0, num_prompts=2)
    return folder / "data.json"


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one(data, tmp_path, capsys):
    num = int(os.environ.get("SENSEFLOW_KILLS", 24))
    seed = int(os.environ.get("SENSEFLOW_KILL_SEED", random.SystemRandom().randrange(10**6)))
    tormentor, began, kills = Tormentor(seed), time.monotonic(), []

    def run(name: str, num_kills: int) -> Path:
        watched = tmp_path / f"watched_{name}"
        watched.mkdir()
        for kill in torture(tmp_path / name, data, watched, tormentor, num_kills):
            kills.append(kill)
            with capsys.disabled():
                print(kill)
            kill.check()
        return tmp_path / name

    calm = run("calm", 0)
    while len(kills) < num:
        killed = run(f"killed_after_{len(kills)}", num - len(kills))
        assert timeless_rows(killed) == timeless_rows(calm)
        assert left_behind(killed) == left_behind(calm)
    with capsys.disabled():
        print("\n" + report(kills, seed, began))
    if num >= 2 * len(AIMS):  # every phase has been aimed at
        assert {SAVE, IDA, DATA, AFTER_IDA, AFTER_FAKE} <= {kill.phase for kill in kills}
