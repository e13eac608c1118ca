"""Start 16 descendants that fork and leave their parent again and again, so that each lives a millisecond under a pid.

With the argument "setsid" each takes a session of its own as well. They give up after ten seconds. Says "ready".
"""

import os
import signal
import sys
import time

if os.fork():
    print("ready", flush=True)
    while True:
        signal.pause()
for _ in range(4):
    os.fork()
give_up_at = time.monotonic() + 10
while time.monotonic() < give_up_at:
    if os.fork():
        os._exit(0)
    if sys.argv[1:] == ["setsid"]:
        os.setsid()
    time.sleep(0.001)
