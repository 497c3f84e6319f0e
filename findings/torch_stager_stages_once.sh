#!/bin/sh
# torch 2.11's DefaultStager, which copies a state to host memory for a save in the background,
# stages one state alone: it closes what it copies with behind the first one, and with that the
# memory it is made to keep. The second state of the same stager, as of the second save of a run
# that hands its own to dcp.async_save, is a KeyError: <class 'type'>.
#
# Seen with torch 2.11.0, on the CPU, without threads, pinned or shared memory. In 2.15.0 the close is gone.
set -eu
packages="torch==2.11.0 numpy"
. "$(dirname "$0")/environment"
cat > "$folder/seen.py" <<'PYTHON'
import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


def made():
    return DefaultStager(StagingOptions(False, False, False, False))


state = {"weight": torch.arange(4.0)}
stager = made()
print("first:", stager.stage(state))
try:
    stager.stage(state)
    second = "staged"
except KeyError as error:
    second = f"KeyError: {error}"
print("second, of the same stager:", second)
print("of another stager:", made().stage(state))
assert torch.__version__.startswith("2.11.0")
assert second == "KeyError: <class 'type'>", second
PYTHON
"$python" "$folder/seen.py"
