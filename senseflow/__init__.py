"""SenseFlow: distils many-step text-to-image teachers into four-step students."""

import os
import signal
import sys

__version__ = "0.1.0"


def end_on_ctrl_c() -> None:
    """Until a command listens (`senseflow.common.commands.exit_status`, or a training's launcher)
    there is nothing to save and nothing to say: Ctrl-C ends the process, quietly."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


# While Python looks up the module that -m names, the first of its arguments is -m itself.
if sys.argv[:1] == ["-m"]:
    end_on_ctrl_c()

# Before torch is loaded, which reads it: idle OpenMP threads that spin take the cores from those
# that work. Every command comes through here; a setting of the user's own stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
