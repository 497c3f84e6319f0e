"""A Python whose libraries are loaded: a process of the tests costs a fork, not seconds of imports.

conftest.py keeps one server for all tests. At the first request it imports LOADED, and it forks for
each. PYTHON is a program with Python's own command line, -m MODULE, -c CODE or FILE: it asks
for a process and stands in for it (stand_in.py). The process does all that Python would do but
start: tests of what is imported, of memory and of trees of processes take sys.executable.
"""

import atexit
import fcntl
import gc
import importlib
import io
import marshal
import multiprocessing.spawn
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from stand_in import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "SENSEFLOW_TEST_PYTHON"
LOADED = (
    "senseflow.launch.launch",
    "senseflow.launch.worker",
    "senseflow.sampling.cli",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    "torch.utils.tensorboard",
)
SELDOM = (20_000, 20, 20)  # of the collector, which else takes a tenth of a short run
OUT_OF_THE_WAY = 512  # descriptors from here on are nobody's


@contextmanager
def kept_server() -> Iterator[None]:
    """A server whose program is named in the environment; its CPU time is that of a child."""
    with (
        tempfile.TemporaryDirectory(prefix="python") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        program, address = Path(folder) / "python", Path(folder) / "socket"
        stand_in = Path(__file__).with_name("stand_in.py")
        line = f'exec "{sys.executable}" -I -S "{stand_in}" "{address}" "$@"'
        program.write_text(f"#!/bin/sh\n{line}\n")
        program.chmod(0o755)
        listener.bind(str(address))
        listener.listen(64)
        variables = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        with subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), program],
            stdin=subprocess.PIPE,  # the server ends with it
            env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ""},
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is pytest's
        ) as process:
            listener.close()  # requests fail if the server has
            os.environ[VARIABLE] = str(program)
            yield
            process.stdin.close()


class Server:
    """Forks for requests; a child leaves `serve` with its connection, the server with None."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.children: dict[int, socket.socket] = {}
        self.awake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.poll = select.poll()
        for fd in (0, self.awake, listener.fileno()):
            self.poll.register(fd, select.POLLIN)

    def serve(self) -> socket.socket | None:
        """Until stdin ends."""
        while True:
            for fd, _ in self.poll.poll():
                if fd == 0:
                    for pid in self.children:
                        os.kill(pid, signal.SIGKILL)
                    return None
                if fd == self.awake:
                    os.read(self.awake, 1 << 16)
                    self.reap()
                elif fd == self.listener.fileno():
                    connection = self.listener.accept()[0]
                    if self.fork(connection) == 0:
                        return connection
                else:
                    self.poll.unregister(fd)
                    self.kill(fd)

    def fork(self, connection: socket.socket) -> int:
        """Begin a child; returns 0 in it."""
        load()
        pid = os.fork()
        if pid:
            self.children[pid] = connection
            self.poll.register(connection, select.POLLRDHUP)
            with suppress(BrokenPipeError):
                connection.sendall(pid.to_bytes(4, "little"))
        else:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.close(signal.set_wakeup_fd(-1))
            os.close(self.awake)
            for other in (self.listener, *self.children.values()):
                other.close()
        return pid

    def reap(self) -> None:
        """Tell the stand-ins of children that ended."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self.children.pop(pid) as connection:
                with suppress(KeyError):
                    self.poll.unregister(connection)
                with suppress(BrokenPipeError):
                    connection.sendall(status.to_bytes(4, "little"))

    def kill(self, fd: int) -> None:
        """End the child whose stand-in is gone."""
        for pid, connection in self.children.items():
            if connection.fileno() == fd:
                os.kill(pid, signal.SIGKILL)


def load() -> None:
    """Import what processes of the tests need; only the first time takes any."""
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()
    gc.set_threshold(*SELDOM)


def become(connection: socket.socket) -> list[str]:
    """Take a stand-in's descriptors, environment and folder; returns its command line."""
    header, fds, _, _ = socket.recv_fds(connection, 4, 250)
    with connection, connection.makefile("rb") as stream:
        words, folder, environment, numbers = marshal.loads(
            stream.read(int.from_bytes(header, "little"))
        )
    lent = [fcntl.fcntl(fd, fcntl.F_DUPFD, OUT_OF_THE_WAY) for fd in fds]
    for fd in {0, 1, 2, *fds}:
        os.close(fd)
    for fd, number in zip(lent, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.environb.clear()
    os.environb.update(environment)
    os.chdir(folder)
    return words


def is_another_package(place: Path) -> bool:
    """Whether a folder on the path has a package of our name that is not the loaded one."""
    package = place / "senseflow"
    return package.exists() and not package.samefile(ROOT / "senseflow")


def end(code: object) -> NoReturn:
    """As the interpreter ends, but for taking apart what it holds, a second's work."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(words: list[str], program: str, base: list[str]) -> None:
    """As Python runs a command line; base: its path without what the line and PYTHONPATH add."""
    start = next(i for i, word in enumerate(words) if word not in OPTIONS)
    options, (kind, *rest) = words[:start], words[start:]
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(write_through="-u" in options)  # stderr always writes at once
    sys.executable = program
    multiprocessing.spawn.set_executable(program)
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if any(is_another_package(Path(place)) for place in ("", *places)):
        for name in [name for name in sys.modules if name.partition(".")[0] == "senseflow"]:
            del sys.modules[name]
    if kind == "-m":
        sys.argv, sys.path = rest, [os.getcwd(), *places, *base]
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv, sys.path = ["-c", *rest[1:]], ["", *places, *base]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path = [kind, *rest], [str(Path(kind).parent), *places, *base]
        runpy.run_path(kind, run_name="__main__")


def main(listener: int, program: str) -> None:
    """The server, and in a child a process that was asked for."""
    base = sys.path[1:]
    sys.path[:1] = [str(ROOT)]
    connection = Server(socket.socket(fileno=listener)).serve()
    if connection is None:
        os._exit(0)
    try:
        run(become(connection), program, base)
    except SystemExit as stop:
        end(stop.code)
    except KeyboardInterrupt:
        sys.excepthook(*sys.exc_info())
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        end(1)
    end(None)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
