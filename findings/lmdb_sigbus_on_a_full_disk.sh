#!/bin/sh
# LMDB makes its lock file sparse (ftruncate) and writes to it through a map of it. On a disk without
# a free page that write has nowhere to go, and the kernel ends the process with SIGBUS: no
# exception, no message, nothing that a caller could catch. With lock=False the same open raises
# lmdb.Error "No space left on device".
#
# Seen with py-lmdb 3.0.0 (LMDB 0.9.36) on a full tmpfs. Needs the right to mount one, as root or in
# a user namespace of its own.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${FINDINGS_PYTHON:-}
if [ -z "$python" ]; then
    python3 -m venv "$folder/env"
    python="$folder/env/bin/python"
    "$python" -m pip install --quiet lmdb==3.0.0
fi
mkdir "$folder/disk"
cat > "$folder/see.py" <<'PYTHON'
import os
import subprocess
import sys

import lmdb

disk = sys.argv[1]
print("py-lmdb %s, LMDB %s" % (lmdb.__version__, ".".join(map(str, lmdb.version()))))
assert lmdb.__version__ == "3.0.0", "another version than the pinned one"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
with open(disk + "/fill", "wb") as stream:
    try:
        stream.write(b"0" * 2**17)
        stream.flush()
    except OSError as error:
        print("the disk is full:", error.strerror)
open_it = "import lmdb, sys; lmdb.open(sys.argv[1], lock=sys.argv[2] == 'lock')"
for number, lock in enumerate(("lock", "none")):
    place = "%s/%d" % (disk, number)
    os.mkdir(place)
    done = subprocess.run([sys.executable, "-c", open_it, place, lock], capture_output=True, text=True)
    said = done.stderr.strip().split("\n")[-1]
    print("lock=%s: exit status %d, it says: %r" % (lock == "lock", done.returncode, said))
    if lock == "lock":
        assert done.returncode == -7 and not said, "no SIGBUS any longer"
    else:
        assert done.returncode == 1 and "No space left on device" in said
subprocess.run(["umount", "--lazy", disk], check=True)
PYTHON
if [ "$(id -u)" = 0 ]; then
    "$python" "$folder/see.py" "$folder/disk"
else
    unshare --map-root-user --mount "$python" "$folder/see.py" "$folder/disk"
fi
