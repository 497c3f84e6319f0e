"""A program in Python's place (see quick_python.py): `stand_in.py SOCKET -m MODULE ...`.

The server forks a process for it. This one lends it descriptors, environment and folder, passes
signals on, and ends as it does; the server kills a process whose stand-in is gone. It imports
little, to start in a moment.
"""

import array
import marshal
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
OPTIONS = ("-u", "-B")  # with any other, Python itself is started
LOST = 1 << 8  # the status of a process whose server is gone: exit code 1


def open_descriptors() -> list[int]:
    """All that a process in this one's place would inherit."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:  # of the listing itself
            continue
        found.append(int(name))
    return found


def main(address: str, words: list[str]) -> int:
    """The wait status of the process that the server forks."""
    lent = open_descriptors()
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        pid = int.from_bytes(server.recv(4), "little")
        for number in PASSED_ON:
            signal.signal(number, lambda number, frame: os.kill(pid, number))
        request = marshal.dumps((words, os.getcwdb(), dict(os.environb), lent))
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", lent))]
        server.sendmsg([len(request).to_bytes(4, "little")], ancillary)
        server.sendall(request)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        status = server.recv(4)
        return int.from_bytes(status, "little") if status else LOST


if __name__ == "__main__":
    first = next((word for word in sys.argv[2:] if word not in OPTIONS), "-i")
    if first.startswith("-") and first not in ("-c", "-m"):
        os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
    code = os.waitstatus_to_exitcode(main(sys.argv[1], sys.argv[2:]))
    if code < 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.kill(os.getpid(), -code)
    os._exit(code)
