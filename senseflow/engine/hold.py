"""One run at a time in a run folder, and who it is: `.running`, of rank 0.

The kernel's lock on that file tells (flock, which network file systems pass on to other nodes): it
ends with the process, however that ends. Where a file system has none, or keeps it to one node, the
beat tells: the file is touched every BEAT_S seconds. Needs no torch.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

HOLD = ".running"
BEAT_S = 2.0
SILENT_S = 20.0  # without a beat for so long a process that is not seen from here counts as gone
ENDING_S = 900.0  # what a run that lost its launcher may take to save and end
TOGETHER_S = 1.0  # between looking and writing one's name, at most
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
BOOT = Path("/proc/sys/kernel/random/boot_id")  # one for all containers of a machine


@dataclass(frozen=True)
class Holder:
    """The process that holds a run folder."""

    host: str
    pid: int
    since: float  # Unix time
    boot: str  # of its machine: a pid means something there alone
    born: int  # clock ticks after the boot: a later process may have its pid
    launcher: int | None  # the pid of the process that asks it to stop, where there is one

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"process {self.pid} on host {self.host}, since {since}"

    @property
    def works(self) -> bool | None:
        """Whether it goes on, or is about to end because its launcher is gone; None where it is not
        seen from here: on another machine, in another container, or gone."""
        found = seen(self.pid) if self.boot == boot() else None
        if found is None or found.born != self.born:
            return None
        return found.state != "Z" and self.launcher in (None, found.parent)


@dataclass(frozen=True)
class Seen:
    """What the kernel says of a process."""

    state: str  # Z: ended, and not asked for yet
    parent: int
    born: int  # clock ticks after the boot


def seen(pid: int) -> Seen | None:
    """A process of this machine; None where there is none of this pid."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return Seen(fields[0], int(fields[1]), int(fields[19]))


def boot() -> str:
    """What tells this machine, since it was started, from all others."""
    return BOOT.read_text().strip()


def this_process(launcher: int | None) -> Holder:
    """This one, as others are to know it."""
    me = seen(os.getpid())
    assert me
    return Holder(socket.gethostname(), os.getpid(), time.time(), boot(), me.born, launcher)


def holder_of(descriptor: int) -> Holder | None:
    """Who an open `.running` names; None while it names nobody."""
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError, RecursionError):
        return None


def require_free(folder: Path) -> None:
    """Raise ValueError for a run folder in which a process of this machine is at work.

    Only a look, so as to answer at once: `Hold.take` decides.
    """
    with suppress(OSError), (folder / HOLD).open("rb") as stream:
        holder = holder_of(stream.fileno())
        if holder and holder.works:
            raise ValueError(in_use(folder, holder))


def in_use(folder: Path, holder: Holder | None) -> str:
    """What is said to the second run in a folder."""
    return (
        f"SAVE_DIR {folder} is in use by another run ({holder or 'which is just starting'}): stop "
        "that one or wait for its end, or name another SAVE_DIR"
    )


class Hold:
    """The hold of this process on a run folder, once taken; as a context manager it lets go.

    launcher: the pid of the process that asks this one to stop, None where there is none. stopped:
    asked while waiting. lost: called with the reason, in a thread, when the folder was removed
    under the run and another run is in it: this one must end and write nothing.
    """

    def __init__(
        self,
        folder: Path,
        launcher: int | None,
        stopped: Callable[[], bool],
        lost: Callable[[str], None],
    ) -> None:
        self.folder, self.file, self.launcher = folder, folder / HOLD, launcher
        self.stopped, self.lost = stopped, lost
        self.descriptor: int | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, name="hold", daemon=True)

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        if self.descriptor is not None:
            self.thread.join(BEAT_S)
            with suppress(OSError):
                if self._is_there(self.descriptor):
                    self.file.unlink()
            os.close(self.descriptor)

    def take(self) -> None:
        """Hold the folder, which is there; raises OSError, naming the process, if another does.

        Waits for a run that lost its launcher, which saves and ends, and, where the lock does not
        tell, for a sign of life.
        """
        began, first, said = time.monotonic(), 0, False
        while True:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            locked, holder = lock(descriptor), holder_of(descriptor)
            beat, waited_s = os.fstat(descriptor).st_mtime_ns, time.monotonic() - began
            first = first or beat
            works = holder.works if holder else None
            if locked is not False and self._is_there(descriptor):
                ours = holder is None or (locked and holder.boot == boot())
                if ours or (works is None and beat == first and waited_s > SILENT_S):
                    break
            os.close(descriptor)
            if works or (works is None and beat != first) or waited_s > ENDING_S:
                raise OSError(in_use(self.folder, holder))
            if self.stopped():
                raise OSError(f"stopped while another run held SAVE_DIR {self.folder}")
            if holder and not said:
                logger.info("waiting: SAVE_DIR %s was last held by %s", self.folder, holder)
                said = True
            time.sleep(0.2)
        self._name(descriptor)
        if not locked:
            self._require_alone(descriptor)
        self.descriptor = descriptor
        self.thread.start()

    def _name(self, descriptor: int) -> None:
        """Write who holds it now."""
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(this_process(self.launcher))).encode(), 0)
        os.fsync(descriptor)

    def _require_alone(self, descriptor: int) -> None:
        """Without locks two that start at once both write: the last one stays."""
        time.sleep(TOGETHER_S)
        with self.file.open("rb") as stream:  # opened anew: a network file system looks again
            holder = holder_of(stream.fileno())
        if holder is None or (holder.boot, holder.pid) != (boot(), os.getpid()):
            os.close(descriptor)
            raise OSError(in_use(self.folder, holder))

    def _is_there(self, descriptor: int) -> bool:
        """Whether the file has its name still: one that was removed tells nobody anything."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.file.stat())
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            assert self.descriptor is not None
            with suppress(OSError):  # a network file system may be away for a while
                if self._is_there(self.descriptor):
                    os.utime(self.descriptor)
                else:
                    self._take_again()

    def _take_again(self) -> None:
        """The folder was removed under the run: make it anew, unless another run has."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        locked, holder = lock(descriptor), holder_of(descriptor)
        if locked is False or holder:
            os.close(descriptor)
            other = holder or "which is just starting"
            self.lost(
                f"SAVE_DIR {self.folder} was removed, and another run is in it now ({other}): this "
                "one ends and writes nothing"
            )
            return
        logger.warning(
            "SAVE_DIR %s was removed under the run: what was in it is lost; the run goes on, and "
            "its next checkpoint will be there",
            self.folder,
        )
        self._name(descriptor)
        if self.descriptor is not None:
            os.close(self.descriptor)  # of the removed file
        self.descriptor = descriptor


def lock(descriptor: int) -> bool | None:
    """Whether this process has the lock now; None where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise
    return True
