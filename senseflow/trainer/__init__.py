"""A module per recipe: `python -m senseflow.trainer.trainer_X` starts a training."""

import signal
import sys

# While Python looks up the module that -m names, the first of its arguments is -m itself. In the
# tenths of a second until the launcher listens there is nothing to save: Ctrl-C ends it, quietly.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
