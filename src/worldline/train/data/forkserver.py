"""Signals are ignored where this is imported: in the process that forks workers, before torch.

One to a whole group of processes would end it, and its workers with it, while the run still saves.
"""

import signal

for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
