"""How a run is asked to save and stop: by a signal or by its time limit, at any moment.

The launcher blocks STOP_SIGNALS in its main thread, and what is blocked is inherited by the
processes it starts: a signal that reaches a worker at its very start waits until `StopRequest`
takes it up. Nothing is lost, and nothing dies of it. Before there are processes there is nothing to
lose, and the launcher ends at once.
"""

import atexit
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType

import psutil

STOP_SIGNALS = (  # SIGUSR1: Slurm's warning; SIGHUP: the terminal is closed
    *(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1),
    *([] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]),  # nohup
)
logger = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1  # linux/prctl.h
libc = ctypes.CDLL(None, use_errno=True)
STARTED = "SENSEFLOW_STARTED"  # in the environment: time.monotonic() when the launcher started


class StopRequest:
    """Whether this process was asked to save and stop, and why; first thing in a worker's `main`.

    A process whose launcher is gone is asked to stop by that: run again, the same command must not
    meet it in the run folder.

    time_limit_s: seconds after `started` at which the run is to have stopped; None: never. lead_s:
    as many before that it is asked to, which saving takes. The
    clock is the launcher's (time.monotonic(), one for all processes of this host): a restart of the
    workers does not set it back.
    """

    def __init__(self) -> None:
        self.time_limit_s: float | None = None
        self.lead_s = 0.0
        self.started = float(os.environ.get(STARTED, time.monotonic()))
        self.received: str | None = None
        self.launcher = os.getppid() if STARTED in os.environ else None
        signal.set_wakeup_fd(-1)  # a fork of the launcher has the launcher's: see Forwarder
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        atexit.register(ignore_stop_signals)  # Python would set the deadly default again

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """Such as "SIGTERM" or "time limit of 24 h"; None while the run is to go on."""
        limit = self.time_limit_s
        if self.orphaned:  # of which torchrun's processes hear by SIGINT
            return "the end of its launcher"
        if self.received:
            return self.received
        if limit is not None and time.monotonic() - self.started >= limit - self.lead_s:
            return f"time limit of {limit / 3600:.4g} h"
        return None

    @property
    def orphaned(self) -> bool:
        """Whether the launcher is gone."""
        return self.launcher is not None and os.getppid() != self.launcher

    def save_first(self) -> None:
        """From now on there is something to save: the end of the launcher asks for it, where before
        it ended this process."""
        if self.launcher is not None:
            signal_at_end_of(self.launcher, signal.SIGINT)

    def finish(self) -> None:
        """The work is done, and a rank waits for the others to be told so by the launcher: it ends
        where there is none to do that."""

        def hear(number: int, frame: FrameType | None) -> None:
            if self.orphaned:
                os._exit(0)

        signal.signal(signal.SIGINT, hear)
        hear(signal.SIGINT, None)


class Forwarder(threading.Thread):
    """In the launcher: passes a stop signal on, once to each worker, also to one started later; as
    long as none is to be started, it ends the launcher.

    Signals are blocked in the main thread (workers inherit that) and read in this one from Python's
    wake-up pipe, so that no call into C++ of the main thread keeps them from it.
    """

    def __init__(self) -> None:
        super().__init__(name="forward stop signals", daemon=True)
        self.received: int | None = None
        self.forwards = False
        self.turn = threading.Lock()  # a signal comes before `forward` or after it
        self.pipe, written = os.pipe()
        os.set_blocking(written, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda number, frame: None)  # a handler, for the pipe's sake
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    @property
    def reason(self) -> str | None:
        """The name of the signal that came, if one did."""
        return signal.Signals(self.received).name if self.received else None

    def forward(self) -> None:
        """From now on there are processes to be told, which save and stop."""
        with self.turn:
            self.forwards = True

    def run(self) -> None:
        """Wait for a stop signal, then hand it to every child there is or will be, or end."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        while self.received is None:
            number = os.read(self.pipe, 1)[0]
            self.received = number if number in STOP_SIGNALS else None
        with self.turn:
            if not self.forwards:
                logger.info("stopped by %s before the processes were started", self.reason)
                os._exit(0)  # the main thread may be in an import of seconds
        told: set[int] = set()
        while True:
            time.sleep(0.2)
            for child in psutil.Process().children():
                if child.pid not in told:
                    told.add(child.pid)
                    with suppress(psutil.NoSuchProcess):
                        child.send_signal(self.received)


def signal_at_end_of(parent: int, number: signal.Signals) -> None:
    """Have this fork of `parent` get a signal when that process ends, at once where it has ended;
    another call changes the signal."""
    if libc.prctl(PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:  # before the call: the kernel tells of it no more
        os.kill(os.getpid(), number)


def ignore_stop_signals(worker: int = 0) -> None:
    """For a process that must outlive the signal: the run saves, stops and ends it itself."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the block: no signal meets them before they ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    resource_tracker.ensure_running()  # Python's own helper, which unblocks them here again
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
