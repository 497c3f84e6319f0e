"""Two hosts on one machine: network namespaces with an address each and a cable between them."""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

ADDRESSES = ("10.79.31.1", "10.79.31.2")


def ip(words: str, check: bool = True) -> None:
    """A command of iproute2; raises CalledProcessError."""
    subprocess.run(["ip", *words.split()], check=check, capture_output=True, text=True)


@contextmanager
def two_hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces; they, and with them the cable, are gone afterwards.

    Raises PermissionError, in words, where namespaces cannot be made.
    """
    if not shutil.which("ip"):
        raise PermissionError("network namespaces need iproute2")
    names = (f"host0-{uuid.uuid4().hex[:8]}", f"host1-{uuid.uuid4().hex[:8]}")
    try:
        connect(names)
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}", check=False)


def connect(names: tuple[str, str]) -> None:
    """Make both hosts and lay the cable."""
    try:
        for name in names:
            ip(f"netns add {name}")
        ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip(f"-n {name} addr add {address}/24 dev cable")
            ip(f"-n {name} link set cable up")
            ip(f"-n {name} link set lo up")
    except subprocess.CalledProcessError as error:
        raise PermissionError(f"network namespaces cannot be made here: {error.stderr}") from error


def pull_cable(host: str) -> None:
    """Packets are lost from now on; no connection is reset."""
    ip(f"-n {host} link set cable down")


def on_host(host: str, line: list[str]) -> list[str]:
    """The same command on a host; `ip` becomes it, under the same process id."""
    return ["ip", "netns", "exec", host, *line]


def node_environment(rank: int, port: int = 29533) -> dict[str, str]:
    """What the user sets on each node."""
    return {
        **os.environ,
        "NODE_RANK": str(rank),
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(port),
    }


def torchrun_environment(rank: int, port: int = 29533) -> dict[str, str]:
    """The same on every node: what torchrun itself reads."""
    endpoint = f"{ADDRESSES[0]}:{port}"
    return {**os.environ, "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": endpoint}
