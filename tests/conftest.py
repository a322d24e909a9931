"""The same surroundings however the tests are started: one thread, and signals as in a terminal.

Sums depend on the number of threads, and runs are compared bit by bit; nohup and services ignore SIGHUP.
"""

import os
import signal

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
signal.signal(signal.SIGHUP, signal.SIG_DFL)
