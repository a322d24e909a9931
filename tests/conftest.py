"""Signals as in a terminal, also where the tests are started by nohup or a service that ignores SIGHUP."""

import signal

signal.signal(signal.SIGHUP, signal.SIG_DFL)
