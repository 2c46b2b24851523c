"""What the fork server loads once for all workers.

They share its memory until they write to it, and the garbage collector writes to every object that it looks at: left
alone, the first full collection gives each worker 17 MiB of its own. A fork server that ends takes all workers with it.
"""

import gc
import signal

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(
        number, signal.SIG_IGN
    )  # workers inherit it: sent to the whole group, it is the daemon's to obey

from core_dump_collector import upload  # noqa: E402  the signal comes first

__all__ = ["upload"]

gc.freeze()
