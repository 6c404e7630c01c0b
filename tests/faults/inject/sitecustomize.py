"""Python reads this at its start if the folder is on PYTHONPATH: real ranks of a real launcher, and
one of them, told by FAULT, is struck."""

import os

if "FAULT" in os.environ and "RANK" in os.environ:
    from tests.faults.strike import arm

    arm(os.environ["FAULT"])
if "CLOCK_OFF_S" in os.environ:
    from tests.faults.strike import shift_clock

    shift_clock(float(os.environ["CLOCK_OFF_S"]))
